"""Tokenise a corpus once, by several processes, into a cache that is there as a whole or not at all.

Everything is written in a hidden folder and renamed at the end (whole_folder.py), so that a build that was killed, or
ran out of disk, leaves nothing that could be taken for a cache.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from lbr_dist.config import RunConfig
from lbr_dist.data.fingerprint import fingerprint, signature
from lbr_dist.data.record_files import record_files
from lbr_dist.data.token_cache import MANIFEST, SCHEMA, TokenCache
from lbr_dist.data.token_parts import TOKENIZER_FILE, Part, Rules, Unit, units, write_part
from lbr_dist.data.whole_folder import building_folder, locked, publish, remove_stale
from lbr_dist.errors import DataError, LaunchError

Say = Callable[[str], None]

# what decides how transformers sets up a fast tokenizer
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
) -> TokenCache:
    """The token cache of a corpus, made first where there is none of this content and this tokenizer.

    Args:
        corpus: a file or folder as `record_files` knows them; of each record, `text` and `title` are read.
        tokenizer_folder: the base model's.
        cache_dir: where caches are kept, each in a folder named by what it was made from.
        processes: how many tokenise. The result does not depend on it.
        say: told what is being done, in plain lines.
        max_characters: longer texts are left out, and reported.

    Raises:
        DataError: the corpus cannot be used, the disk is full, or the cache there is damaged.
        ModelError: there is no tokenizer.
        LaunchError: one of the processes was killed.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes: one is the least")
    with _named_errors(cache_dir):
        files = record_files(corpus)
        seen = [signature(file) for file in files]
        # transformers is asked for its version only: importing it takes seconds, and a cache may be there already
        also = [f"{SCHEMA} {max_characters} {version('transformers')} {version('tokenizers')}"]
        made_by = [path for name in _TOKENIZER_FILES if (path := tokenizer_folder / name).is_file()]
        also += [path.name for path in made_by]
        folder = cache_dir / fingerprint([*files, *made_by], processes, cache_dir / "hashes", also)
        if not folder.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock"), say):
                if not folder.exists():
                    remove_stale(cache_dir)
                    _Build(corpus, files, folder, processes, say).run(tokenizer_folder, max_characters, seen)
        cache = TokenCache(folder)
    say(f"{corpus}: {cache.report}")
    return cache


class _Build:
    """One build: tokenised in a folder of its own, then published."""

    def __init__(self, corpus: Path, files: Sequence[Path], folder: Path, processes: int, say: Say) -> None:
        self.corpus, self.files, self.folder, self.processes, self.say = corpus, files, folder, processes, say
        self.building = building_folder(folder)
        self.expected = self.read = self.written = 0

    def run(self, tokenizer_folder: Path, max_characters: int, seen: list[tuple[int, ...]]) -> None:
        size = sum(each[0] for each in seen)
        self.expected = size // 2  # as for English and a common tokenizer; mended as parts come in
        try:
            self.building.mkdir()
            rules = _write_tokenizer(tokenizer_folder, self.building / TOKENIZER_FILE, max_characters)
            work = list(units(self.files, max(_UNIT, size // _MOST_UNITS)))
            parts = list(self._parts(work, rules, 1 if size < _SMALL else min(self.processes, len(work) or 1)))
            for file, before in zip(self.files, seen, strict=True):
                if signature(file) != before:
                    raise DataError(f"{file}: it was changed while it was read. Start again when it is complete.")
            self._publish(parts, rules)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            shutil.rmtree(self.building, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free
            raise DataError(
                f"{self.folder.parent}: no room for the token cache of {self.corpus} ({error.strerror}): found "
                f"{_megabytes(free)} free, expected about {_megabytes(self.expected)}. Free some space, raise the "
                "quota, or put the cache in another folder; what was written is removed."
            ) from error
        finally:
            shutil.rmtree(self.building, ignore_errors=True)

    def _parts(self, work: list[Unit], rules: Rules, processes: int) -> Iterator[Part]:
        """What became of every unit, in their order."""
        total = sum(unit.weight for unit in work)
        self.expected = total // 2  # tables are compressed on the disk
        self.say(f"{self.corpus}: tokenising {_megabytes(total)} in {len(work)} parts with {processes} process(es)")
        began = said = time.monotonic()
        for unit, part in zip(work, _run(work, self.building, rules, processes), strict=True):
            yield part
            self.read += unit.weight
            self.written += part.tokens * int(rules.dtype[-1]) + 4 * part.documents
            self.expected = self.written * total // max(1, self.read)
            now = time.monotonic()
            if now - said > _SAY_EVERY:
                said = now
                left = (now - began) * (total / max(1, self.read) - 1)
                self.say(f"{self.corpus}: tokenised {_megabytes(self.read)} of {_megabytes(total)}, {left:.0f} s to go")

    def _publish(self, parts: list[Part], rules: Rules) -> None:
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
            raise DataError(f"{self.corpus}: found no documents to learn from, {found or 'and none left out'}.")
        with (self.building / MANIFEST).open("x", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if not publish(self.building, self.folder):
            self.say(f"{self.corpus}: another job made the same cache meanwhile; it is used")


def _write_tokenizer(folder: Path, to: Path, max_characters: int) -> Rules:
    """The tokenizer as transformers sets it up, for processes that do without transformers."""
    from lbr_dist.model.tokens import TextTokenizer

    tokenizer = TextTokenizer(folder)
    to.write_text(tokenizer.hf.backend_tokenizer.to_str(), encoding="utf-8")
    with to.open("rb") as file:
        os.fsync(file.fileno())
    dtype = "<u2" if tokenizer.highest_id < 2**16 else "<u4"
    return Rules(dtype, max_characters, bool(getattr(tokenizer.hf, "split_special_tokens", False)))


# ---- processes ----------------------------------------------------------------------------------------------------


def _run(work: list[Unit], folder: Path, rules: Rules, processes: int) -> Iterator[Part]:
    arguments = (folder / TOKENIZER_FILE, folder, rules)
    if processes == 1:
        yield from (write_part(unit, *arguments) for unit in work)
        return
    # spawned, not forked: the parent may hold threads and an accelerator
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    with held, ProcessPoolExecutor(processes, context, _start_process, (lifeline,)) as pool:
        try:
            # not pool.map: it cancels what is left, and a pool whose processes end takes that for a defect
            for future in _submitted(pool, work, arguments):
                yield future.result()
        except BrokenProcessPool as error:
            raise LaunchError(
                f"{folder}: one of the {processes} processes that tokenise was killed, often for want of memory: each "
                "takes up to 1 GB where texts are long. Lower their number, or the longest text."
            ) from error
        except BaseException:
            held.close()  # the others would end their parts first
            raise


def _submitted(pool: ProcessPoolExecutor, work: list[Unit], arguments: tuple[Path, Path, Rules]) -> list[Future[Part]]:
    try:
        return [pool.submit(write_part, unit, *arguments) for unit in work]
    except OSError as error:
        if error.errno is not None:  # the system refused a process
            raise
        # "handle is closed": one process died and the pool closed its pipes while the others were being started
        raise BrokenProcessPool(str(error)) from error


def _start_process(lifeline: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process, without a traceback of its own
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    """Ends this process once its parent closes the other end, or dies: a pool's own processes would wait for ever."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


@contextlib.contextmanager
def _named_errors(cache_dir: Path) -> Iterator[None]:
    """Turns the system's errors into the user's."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or cache_dir}: cannot be read or written ({error.strerror or error}) while a token cache "
            f"is made in {cache_dir}. Mend that, or put the cache in another folder."
        ) from error


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def token_cache(config: RunConfig, processes: int, say: Say) -> TokenCache:
    """Stage 1's text of a run, tokenised: from the cache, or now. Raises as `build` does."""
    data = config.data
    folder = Path(data.cache_dir).expanduser()
    corpus = Path(data.learn_corpus or data.corpus)
    return build(corpus, Path(config.model.base), folder, processes, say, data.longest_document)
