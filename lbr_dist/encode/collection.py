"""Encode a collection of any size into a file of vectors, on any number of ranks; resumes where it was interrupted.

The collection is split into parts of a fixed number of texts. Each part is encoded by one rank, and the result does not
depend on which one. The parts stay in a folder named after the result until all of them are done:

    OUT.parts/parts.json        what the parts depend on, written when the whole collection was checked
    OUT.parts/ids               the ids of all texts, one JSON string per line
    OUT.parts/part-00003.npy    the vectors of texts 3 n to 4 n
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lbr_dist.console import Progress, Say
from lbr_dist.data.record_files import Columns, also_read_as, record_files, root_of
from lbr_dist.data.records import documents
from lbr_dist.encode.dtype import encoding_dtype
from lbr_dist.encode.encoder import Kind, open_encoder
from lbr_dist.encode.vectors import Vectors, check_ending, write_vectors
from lbr_dist.errors import ConfigError, DataError, LaunchError
from lbr_dist.ranks.group import Ranks, from_all, from_first
from lbr_dist.storage.files import atomic_file, sync, write_atomic
from lbr_dist.storage.fingerprint import fingerprint, signature, visible_files
from lbr_dist.storage.whole_folder import is_at, try_lock

MANIFEST = "parts.json"
IDS = "ids"
_SCHEMA = 1
_LOCK = "lock"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """What to encode, with what, and how; the fields are the arguments of `lbr encode`."""

    model: Path
    collection: Path
    out: Path
    kind: Kind = "document"
    chunk_tokens: int = 8192
    part_texts: int = 4096
    """Texts in a part: the most that a killed rank loses."""

    threads: int | None = None
    """Threads per rank on a CPU; rounding depends on it. None: the number that existing parts were made with, or else
    the first rank's number of threads."""

    columns: Columns | None = None
    """As `data.columns` of a run."""

    def __post_init__(self) -> None:
        """Raises ConfigError that names the option."""
        for name in ("chunk_tokens", "part_texts", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: found {value}, expected one or more.")

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.npy"

    def part_size(self, number: int, texts: int) -> int:
        """Number of texts in a part; `texts` is the total."""
        return min(self.part_texts, texts - number * self.part_texts)


@dataclass(frozen=True, slots=True)
class _Work:
    """What the first rank found, and sends to the others."""

    texts: int
    missing: list[int]
    threads: int


def encode_collection(job: EncodeJob, ranks: Ranks, say: Say) -> None:
    """Encode a collection into `job.out`; every rank encodes its share. A collective.

    With the same `threads`, the file's bytes depend neither on the number of ranks nor on earlier interruptions.

    Raises:
        ConfigError, DataError, ModelError: if the input is invalid (on the first rank and before anything is encoded,
            where possible), existing parts were made from something else, or the disk is full.
        LaunchError: if another job is encoding into the same file.
    """
    check_ending(job.out)
    with _named_full_disk(job), _owned(job) if ranks.is_first else contextlib.nullcontext():
        before = [signature(file) for file in record_files(job.collection)] if ranks.is_first else []
        work = from_first(_prepare(job, ranks, say) if ranks.is_first else _Work(0, [], 1), ranks)
        if ranks.device.type == "cpu":
            torch.set_num_threads(work.threads)
        _encode(job, work, work.missing[ranks.rank :: ranks.world_size], say)
        from_all(None, ranks)  # wait until every part exists
        if ranks.is_first:
            if [signature(file) for file in record_files(job.collection)] != before:
                raise DataError(
                    f"{job.collection}: it was changed while it was read. Delete {job.folder}, and start again when "
                    "the collection is complete."
                )
            _join(job, work.texts)
    if ranks.is_first:
        by = f", by {ranks.world_size} ranks" if ranks.world_size > 1 else ""
        say(f"written to {job.out}: {work.texts:,} vectors{by}")
    from_all(None, ranks)


# ---- the folder of parts ------------------------------------------------------------------------------------------


def _prepare(job: EncodeJob, ranks: Ranks, say: Say) -> _Work:
    """Check the whole collection, unless an earlier attempt did, and find the missing parts."""
    path = job.folder / MANIFEST
    threads = job.threads or _recorded_threads(path) or torch.get_num_threads()
    made_of = _made_of(job, threads, ranks.device)
    if not path.exists():
        for left in job.folder.glob("*part-*"):  # a finished job was interrupted while it cleaned up
            left.unlink()
        texts = _write_ids(job)
        write_atomic(path, json.dumps(made_of | {"texts": texts}, indent=1) + "\n")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        texts = int(found.pop("texts"))
    except (ValueError, KeyError, AttributeError):
        found = {}
    differing = [name for name, value in made_of.items() if found.get(name) != value]
    if differing:
        raise DataError(
            f"{job.folder}: found parts that differ in {', '.join(differing)}, expected those of this command. Use the "
            "earlier model, collection and options to continue with them, name another --out, or delete the folder."
        )
    for left in job.folder.glob(".part-*"):
        left.unlink()
    numbers = range(-(-texts // job.part_texts))
    missing = [number for number in numbers if _shape(job.part(number)) != job.part_size(number, texts)]
    if len(missing) < len(numbers):
        say(f"{job.folder}: {len(numbers) - len(missing)} of {len(numbers)} parts exist already")
    return _Work(texts, missing, threads)


def _recorded_threads(path: Path) -> int | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["--threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _made_of(job: EncodeJob, threads: int, device: torch.device) -> dict[str, Any]:
    """Everything that a part's bytes depend on, by the name under which a difference is reported."""
    cores, known = len(os.sched_getaffinity(0)), job.folder / "hashes"
    inside = visible_files(job.model)
    files, root = record_files(job.collection), root_of(job.collection)
    read_as = also_read_as(files, job.columns)
    if read_as:  # ids may come from the files' names
        read_as += [str(file.relative_to(root)) for file in files]
    on_cpu = device.type == "cpu"
    return {
        "the format of the parts": _SCHEMA,
        "the model": fingerprint(inside, cores, known, [str(path.relative_to(job.model)) for path in inside]),
        "the collection": fingerprint(files, cores, known, read_as),
        "--kind": job.kind,
        "--chunk-tokens": job.chunk_tokens,
        "--part-texts": job.part_texts,
        "--threads": threads if on_cpu else None,
        "the dtype": encoding_dtype(job.model),
        "the device": device.type if on_cpu else torch.cuda.get_device_name(device),
        "the version of torch or transformers": [version("torch"), version("transformers")],
    }


def _write_ids(job: EncodeJob) -> int:
    """Read the whole collection, so that an error in it is reported now, and write its ids. Returns their number."""
    seen: set[str] = set()
    with (job.folder / IDS).open("w", encoding="utf-8") as file:
        for place, name, _ in documents(job.collection, job.columns):
            if name in seen:
                raise place.error(
                    f"document id {name!r} again", "each id once", "Remove one of the two, or give it an id of its own."
                )
            if job.out.suffix == ".npy" and name.splitlines() != [name]:
                expected = "one line, as FILE.ids has one for each text"
                raise place.error(f"the id {name!r}", expected, "Write FILE.parquet, or give it another id.")
            seen.add(name)
            file.write(json.dumps(name) + "\n")
    sync(job.folder / IDS)
    if not seen:
        raise DataError(f"{job.collection}: found no documents, expected at least one record with `id` and `text`.")
    return len(seen)


def _shape(part: Path) -> int | None:
    """The number of vectors in a part; None if it does not exist or is not complete."""
    try:
        return len(np.load(part, mmap_mode="r"))
    except (OSError, ValueError, EOFError):
        return None


@contextlib.contextmanager
def _owned(job: EncodeJob) -> Iterator[None]:
    """Make the folder of parts, and lock it against other jobs. It is deleted afterwards if it has no manifest."""
    path = job.folder / _LOCK
    while True:
        job.folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            held = try_lock(file.fileno())
            if held == "busy":
                raise LaunchError(
                    f"{job.folder}: another job encodes into {job.out}. Wait for it, stop it, or name another --out."
                )
            if held == "held" and not is_at(path, file.fileno()):
                continue  # the job that held the lock has deleted it
            try:
                yield
            finally:
                if not (job.folder / MANIFEST).exists():
                    shutil.rmtree(job.folder)
            return


# ---- parts --------------------------------------------------------------------------------------------------------


def _encode(job: EncodeJob, work: _Work, mine: list[int], say: Say) -> None:
    """Encode some of the parts."""
    if not mine:
        return
    encoder = open_encoder(job.model, None, job.chunk_tokens)
    sizes = {number: job.part_size(number, work.texts) for number in mine}
    progress = Progress(say, "encoded", "texts", sum(sizes.values()))
    for number, texts in _texts(job, sizes):
        vectors = encoder.encode(texts, job.kind, partial(progress.within, sizes[number]))
        _write_part(job.part(number), vectors.numpy())
        progress.add(sizes[number])


def _texts(job: EncodeJob, sizes: Collection[int]) -> Iterator[tuple[int, list[str]]]:
    """The texts of some parts, in order. Reads the collection once, and holds only one part in memory."""
    last = max(sizes)
    held: list[str] = []
    for index, (_, _, text) in enumerate(documents(job.collection, job.columns)):
        number, place = divmod(index, job.part_texts)
        if place == 0 and held:
            yield number - 1, held
            held = []
        if number > last:
            return
        if number in sizes:
            held.append(text)
    if held:
        yield last, held


def _write_part(path: Path, vectors: Vectors) -> None:
    with atomic_file(path) as file:
        np.save(file, vectors)


def _join(job: EncodeJob, texts: int) -> None:
    """Join all parts into one file, then delete the manifest: a folder without one was left by a finished job."""

    def parts() -> Iterator[Vectors]:
        for number in range(-(-texts // job.part_texts)):
            part: Vectors = np.load(job.part(number))
            if len(part) != job.part_size(number, texts):
                raise DataError(
                    f"{job.part(number)}: found {len(part)} vectors, expected {job.part_size(number, texts)}: the "
                    f"collection was changed while it was read. Delete {job.folder}, and start again."
                )
            yield part

    with (job.folder / IDS).open(encoding="utf-8") as ids:
        write_vectors(job.out, (json.loads(line) for line in ids), parts(), texts)
    (job.folder / MANIFEST).unlink()


@contextlib.contextmanager
def _named_full_disk(job: EncodeJob) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(job.out.absolute().parent).free
        raise DataError(
            f"{job.out}: no room for the vectors ({error.strerror}): found {free / 1e6:,.1f} MB free. Free some space "
            "and start again: finished parts are kept."
        ) from error
