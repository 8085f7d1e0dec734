"""Tokenise a corpus once, with several processes or ranks, into a cache that is complete or absent.

Everything is written to a hidden folder and renamed at the end (whole_folder.py), so a build that was killed or ran out
of disk leaves nothing that could be mistaken for a cache. The build after an interrupted one keeps the finished parts
(work.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from lbr_dist.config import RunConfig
from lbr_dist.console import Say, size_text
from lbr_dist.data.record_files import Columns, also_read_as, record_files
from lbr_dist.data.token_cache.cache import MANIFEST, SCHEMA, TokenCache
from lbr_dist.data.token_cache.part import DONE, TOKENIZER_FILE, Part, TokenRules, Unit, units, write_part
from lbr_dist.data.token_cache.work import finished_numbers, finished_parts, plan_of, work_folder
from lbr_dist.errors import DataError, LaunchError, ModelError
from lbr_dist.storage.files import write_atomic
from lbr_dist.storage.fingerprint import fingerprint, signature
from lbr_dist.storage.whole_folder import discard, locked, publish, remove_stale

if TYPE_CHECKING:
    from lbr_dist.ranks.group import Ranks

# the files that determine how transformers sets up a fast tokenizer
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_SMALL = 8 << 20
_UNIT = 8 << 20
_MOST_UNITS = 1024
_SAY_EVERY = 10.0
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def build(
    corpus: Path,
    tokenizer_folder: Path,
    cache_dir: Path,
    processes: int,
    say: Say,
    max_characters: int = 10_000_000,
    ranks: Ranks | None = None,
    columns: Columns | None = None,
) -> TokenCache:
    """The token cache of a corpus; built first if there is none for this content and tokenizer.

    Args:
        corpus: a file or folder that `record_files` accepts; `text` and `title` of each record are read.
        tokenizer_folder: the base model's.
        cache_dir: where caches are kept, each in a folder named after a hash of its inputs.
        processes: tokenising processes per rank. The result does not depend on it.
        say: called with each line of progress.
        max_characters: longer texts are left out and reported.
        ranks: all ranks must call this; each tokenises its share, and the first one publishes.
        columns: `data.columns`, where the names of the files' columns differ from ours.

    Raises:
        DataError: the corpus cannot be used, the disk is full, or the existing cache is damaged.
        ModelError: there is no tokenizer.
        LaunchError: one of the processes was killed.
    """
    if processes < 1:
        raise ValueError(f"found {processes} processes, expected at least 1")
    with _named_errors(cache_dir):
        if ranks is not None and not ranks.is_first:
            folder = _help(processes, ranks)
        else:
            folder = _find_or_make(corpus, tokenizer_folder, cache_dir, processes, say, max_characters, ranks, columns)
        cache = TokenCache(folder)
    say(f"{corpus}: {cache.report}")
    return cache


def _find_or_make(
    corpus: Path,
    tokenizer_folder: Path,
    cache_dir: Path,
    processes: int,
    say: Say,
    max_characters: int,
    ranks: Ranks | None,
    columns: Columns | None,
) -> Path:
    files = record_files(corpus)
    # only those of the fields that are read
    columns = {ours: theirs for ours, theirs in sorted((columns or {}).items()) if ours in ("text", "title")}
    seen = [signature(file) for file in files]
    # only the version of transformers: importing it takes seconds, and the cache may exist already
    also = [f"{SCHEMA} {max_characters} {version('transformers')} {version('tokenizers')}"]
    made_by = [path for name in _TOKENIZER_FILES if (path := tokenizer_folder / name).is_file()]
    also += [path.name for path in made_by]
    also += also_read_as(files, columns)
    folder = cache_dir / fingerprint([*files, *made_by], processes, cache_dir / "hashes", also)
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), say) as held:
            if not folder.exists():
                building, can_go_on = work_folder(folder, held)
                remove_stale(cache_dir, building)
                made = _Build(corpus, files, folder, building, processes, say, ranks, columns)
                made.run(tokenizer_folder, max_characters, seen, can_go_on)
                return folder
    _share(_Task(folder), ranks)
    return folder


# ---- ranks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """What the first rank sends to the others."""

    folder: Path
    building: Path | None = None
    """None if the cache already exists."""

    rules: TokenRules | None = None
    missing: tuple[Unit, ...] = ()
    """The units left to tokenise; each rank takes its share."""


def _share(task: _Task | None, ranks: Ranks | None) -> _Task:
    """The first rank's task, on every rank."""
    if ranks is not None:
        from lbr_dist.ranks.group import from_first

        task = from_first(task, ranks)
    assert task is not None
    return task


def _all_parts(parts: Sequence[Part], ranks: Ranks | None) -> list[Part]:
    """Every rank's parts, once all ranks have written theirs."""
    if ranks is None:
        return list(parts)
    from lbr_dist.ranks.group import from_all

    return [part for theirs in from_all(list(parts), ranks) for part in theirs]


def _help(processes: int, ranks: Ranks) -> Path:
    """The work of every rank but the first. Returns the cache's folder once it is published."""
    task = _share(None, ranks)
    if task.building is None or task.rules is None:
        return task.folder
    mine = list(task.missing[ranks.rank :: ranks.world_size])
    try:
        parts = list(_run(mine, task.building, task.rules, min(processes, len(mine) or 1)))
    except (DataError, OSError) as error:
        if isinstance(error, DataError) or error.errno in _FULL:
            discard(task.building)
        raise
    _all_parts(parts, ranks)
    _all_parts([], ranks)  # wait until the cache is published
    return task.folder


class _Build:
    """One build by this process and any other ranks: tokenised in a work folder, then published."""

    def __init__(
        self,
        corpus: Path,
        files: Sequence[Path],
        folder: Path,
        building: Path,
        processes: int,
        say: Say,
        ranks: Ranks | None,
        columns: Columns,
    ) -> None:
        self.columns = tuple(columns.items())
        self.corpus, self.files, self.folder, self.building = corpus, files, folder, building
        self.processes, self.say, self.ranks = processes, say, ranks
        self.expected = self.read = self.written = 0

    def run(self, tokenizer_folder: Path, max_characters: int, seen: list[tuple[int, ...]], can_go_on: bool) -> None:
        size = sum(each[0] for each in seen)
        self.expected = size // 2  # typical of English and a common tokenizer; corrected as parts come in
        keep = False
        try:
            self.building.mkdir(exist_ok=True)
            rules = _write_tokenizer(tokenizer_folder, self.building / TOKENIZER_FILE, max_characters)
            rules = replace(rules, columns=self.columns)
            weight = max(_UNIT, size // _MOST_UNITS)
            work = list(units(self.files, weight))
            parts = finished_parts(self.building, plan_of(self.files, weight, rules, self.building), rules)
            task = _Task(self.folder, self.building, rules, tuple(unit for unit in work if unit.number not in parts))
            _share(task, self.ranks)
            mine = list(task.missing if self.ranks is None else task.missing[:: self.ranks.world_size])
            processes = 1 if size < _SMALL else min(self.processes, len(mine) or 1)
            made = _all_parts(list(self._parts(work, mine, rules, processes)), self.ranks)
            parts |= {part.number: part for part in made}
            for file, before in zip(self.files, seen, strict=True):
                if signature(file) != before:
                    raise DataError(f"{file}: changed while it was being read. Start again when it is complete.")
            self._publish([parts[unit.number] for unit in work], rules)
            _all_parts([], self.ranks)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            discard(self.building)
            free = shutil.disk_usage(self.folder.parent).free
            raise DataError(
                f"{self.folder.parent}: no room for the token cache of {self.corpus} ({error.strerror}): found "
                f"{size_text(free)} free, expected about {size_text(self.expected)}. Free some space, raise the "
                "quota, or put the cache in another folder. The unfinished cache has been removed."
            ) from error
        except (DataError, ModelError):
            raise
        except BaseException:
            keep = can_go_on  # a process was killed, or this one was asked to stop: the finished parts are good
            raise
        finally:
            if not keep:
                discard(self.building)

    def _parts(self, work: Sequence[Unit], mine: list[Unit], rules: TokenRules, processes: int) -> Iterator[Part]:
        """The part made from each unit of this process, in order."""
        weights = {unit.number: unit.weight for unit in work}
        total = sum(weights.values())
        self.expected = total // 2  # tables are compressed on disk
        before = sum(weights[number] for number in finished_numbers(self.building))
        ranks = f" on {self.ranks.world_size} ranks" if self.ranks is not None else ""
        there = f"; {size_text(before)} already done by an earlier build" if before else ""
        how = f"with {processes} process(es){ranks}{there}"
        self.say(f"{self.corpus}: tokenising {size_text(total)} in {len(work)} parts {how}")
        began = said = time.monotonic()
        for unit, part in zip(mine, _run(mine, self.building, rules, processes), strict=True):
            yield part
            self.read += unit.weight
            self.written += part.tokens * int(rules.dtype[-1]) + 4 * part.documents
            self.expected = self.written * total // max(1, self.read)
            now = time.monotonic()
            if now - said > _SAY_EVERY:
                said = now
                done = sum(weights[number] for number in finished_numbers(self.building))
                left = (now - began) * (total - done) / max(1, done - before)
                self.say(f"{self.corpus}: tokenised {size_text(done)} of {size_text(total)}, {left:.0f} s to go")

    def _publish(self, parts: list[Part], rules: TokenRules) -> None:
        skipped: dict[str, tuple[int, str]] = {}
        for part in parts:
            for reason, (count, place) in part.skipped.items():
                before, first = skipped.get(reason, (0, ""))
                skipped[reason] = (before + count, first or str(place))
        manifest = {
            "schema": SCHEMA,
            "corpus": str(self.corpus),
            "dtype": rules.dtype,
            "documents": sum(part.documents for part in parts),
            "tokens": sum(part.tokens for part in parts),
            "skipped": skipped,
            "parts": [{k: v for k, v in asdict(part).items() if k != "skipped"} for part in parts],
        }
        if not manifest["documents"]:
            found = ", ".join(f"{count} {reason} (the first: {first})" for reason, (count, first) in skipped.items())
            raise DataError(f"{self.corpus}: found no documents to learn from; left out: {found or 'none'}.")
        write_atomic(self.building / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(self.building / DONE)
        if not publish(self.building, self.folder):
            self.say(f"{self.corpus}: another job made the same cache in the meantime; using that one")


def _write_tokenizer(folder: Path, to: Path, max_characters: int) -> TokenRules:
    """Save the tokenizer as transformers sets it up, for processes that do not import transformers."""
    from lbr_dist.data.tokenizer import TextTokenizer

    tokenizer = TextTokenizer(folder)
    write_atomic(to, tokenizer.hf.backend_tokenizer.to_str())
    dtype = "<u2" if tokenizer.highest_id < 2**16 else "<u4"
    return TokenRules(dtype, max_characters, bool(getattr(tokenizer.hf, "split_special_tokens", False)))


# ---- processes ----------------------------------------------------------------------------------------------------


def _run(work: list[Unit], folder: Path, rules: TokenRules, processes: int) -> Iterator[Part]:
    """Tokenise units in this process or in several; gives the part made from each, in order."""
    try:
        yield from _run_here(work, folder, rules) if processes == 1 else _run_pool(work, folder, rules, processes)
    except FileNotFoundError as error:
        if folder.exists():
            raise
        raise LaunchError(f"{folder}: another rank gave up on this token cache; see its message.") from error


def _run_here(work: list[Unit], folder: Path, rules: TokenRules) -> Iterator[Part]:
    yield from (write_part(unit, folder / TOKENIZER_FILE, folder, rules) for unit in work)


def _run_pool(work: list[Unit], folder: Path, rules: TokenRules, processes: int) -> Iterator[Part]:
    arguments = (folder / TOKENIZER_FILE, folder, rules)
    # spawned, not forked: the parent may have threads and an accelerator
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    with held, ProcessPoolExecutor(processes, context, _start_process, (lifeline,)) as pool:
        try:
            # not pool.map: it cancels what is left, and a pool whose processes exit reports that as an error
            for future in _submitted(pool, work, arguments):
                yield future.result()
        except BaseException as error:
            # otherwise the other processes would finish their parts first. And nothing terminates a process that
            # was started while the pool broke: it can wait forever for a lock of the killed one, and the pool for it
            held.close()
            if isinstance(error, BrokenProcessPool):
                raise LaunchError(
                    f"{folder}: one of the {processes} tokenising processes was killed, often for lack of memory: "
                    "each takes up to 1 GB if texts are long. Use fewer processes, or lower data.longest_document."
                ) from error
            raise


def _submitted(
    pool: ProcessPoolExecutor, work: list[Unit], arguments: tuple[Path, Path, TokenRules]
) -> list[Future[Part]]:
    try:
        return [pool.submit(write_part, unit, *arguments) for unit in work]
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system refused a process
            raise
        # "handle is closed", "bad value(s) in fds_to_keep": one process died, and the pool closed its pipes while it
        # was starting the others
        raise BrokenProcessPool(str(error)) from error


def _start_process(lifeline: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process, so it prints no traceback
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    """Exits once the parent closes the other end or dies: a pool's processes would otherwise wait forever."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


@contextlib.contextmanager
def _named_errors(cache_dir: Path) -> Iterator[None]:
    """Turns operating system errors into errors for the user."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or cache_dir}: cannot be read or written ({error.strerror or error}) while making a "
            f"token cache in {cache_dir}. Fix this, or put the cache in another folder."
        ) from error


def token_cache(config: RunConfig, processes: int, say: Say) -> TokenCache:
    """A run's tokenised text for stage 1, built if it is not in the cache. Raises as in `build`."""
    data = config.data
    folder = Path(data.cache_dir).expanduser()
    corpus = Path(data.learn_corpus or data.corpus)
    base = Path(config.model.base)
    return build(corpus, base, folder, processes, say, data.longest_document, columns=data.columns)
