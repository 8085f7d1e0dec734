"""The settings of mining negatives, and the work folder from which an interrupted mining resumes.

The folder is named after the result. It holds the settings with a fingerprint of all files that matter, vectors and
finished parts; it is deleted once the result is written. Imports no torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lbr_dist.console import Say
from lbr_dist.data.record_files import also_read_as, record_files
from lbr_dist.data.records import write_jsonl
from lbr_dist.encode.dtype import encoding_dtype
from lbr_dist.errors import ConfigError
from lbr_dist.mining.candidates import MiningRules
from lbr_dist.storage.fingerprint import fingerprint, visible_files

SETTINGS = "settings.json"
_SCHEMA = "negatives 1"
_FILES = "contents of files, or the version of torch or transformers"
_OPTIONS = {"miner": "with"}


@dataclass(frozen=True, slots=True)
class MiningSettings:
    """What to mine, and how; the fields are the options of `lbr data negatives`."""

    pairs: str
    documents: str
    out: str
    model: str | None = None
    miner: Literal["model", "bm25"] = "model"
    index: Literal["exact", "ivf"] = "exact"
    negatives: int = 8
    first: int = 1
    last: int = 100
    margin_percent: float | None = None
    margin_absolute: float | None = None
    sample: Literal["top", "random"] = "top"
    seed: int = 0
    bm25_tokens: Literal["words", "characters"] = "words"
    chunk_tokens: int = 8192
    threads: int = 1
    """Threads per rank on a CPU. Does not follow from the number of ranks, since sums may depend on it."""

    device: str = "cpu"
    columns: dict[str, str] | None = None
    unit: int = 256
    """Texts per file of vectors, pairs per part: a killed rank loses at most this. Larger in large collections."""

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        for name in ("negatives", "first", "chunk_tokens", "threads", "unit"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "one or more")
        _require(self.last >= self.first, "first", self.first, f"at most --last, which is {self.last}")
        window = self.last - self.first + 1
        _require(self.negatives <= window, "negatives", self.negatives, f"at most {window} (--first to --last)")
        percent, absolute = self.margin_percent, self.margin_absolute
        _require(percent is None or absolute is None, "margin-absolute", absolute, "no --margin-percent with it")
        _require(percent is None or 0 < percent <= 1, "margin-percent", percent, "above 0 and at most 1")
        _require(
            absolute is None or (absolute >= 0 and math.isfinite(absolute)), "margin-absolute", absolute, "0 or more"
        )
        if self.miner == "bm25":
            _require(self.index == "exact", "index", self.index, "exact with --with bm25, which has its own index")
        else:
            _require(self.model is not None, "model", self.model, "a model folder, or --with bm25")

    @property
    def rules(self) -> MiningRules:
        return MiningRules(
            self.negatives,
            self.first,
            self.last,
            self.margin_percent,
            self.margin_absolute,
            self.sample,
            self.seed,
        )

    def beside(self, ending: str) -> Path:
        """The path of the result with `.ending` added."""
        return Path(f"{self.out}.{ending}")

    def document_unit(self, count: int) -> int:
        """Documents per file, for this many documents: at most 4,096 files."""
        return max(self.unit, math.ceil(count / 4096))

    def pair_unit(self, count: int) -> int:
        """Pairs per part, for this many pairs: at most 512 parts, since each reads all vectors."""
        return max(self.unit, math.ceil(count / 512))

    @property
    def work(self) -> Path:
        return self.beside("work")


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')}: found {found}, expected {expected}.")


# ---- the work folder ----------------------------------------------------------------------------------------------


def prepare(settings: MiningSettings, say: Say) -> None:
    """Make the work folder, or find that of an interrupted mining with the same settings and files.

    Raises:
        ConfigError: the folder holds another mining; the message names what differs.
    """
    folder = settings.work
    folder.mkdir(parents=True, exist_ok=True)
    files = [*record_files(Path(settings.pairs)), *record_files(Path(settings.documents))]
    also = [_SCHEMA, version("torch"), version("transformers"), *also_read_as(files)]
    if settings.model is not None:
        model = Path(settings.model)
        inside = visible_files(model)
        files += inside
        also += [*(str(path.relative_to(model)) for path in inside), encoding_dtype(model)]
    digest = fingerprint(files, len(os.sched_getaffinity(0)), folder / "hashes", also)
    content: dict[str, Any] = {"settings": asdict(settings), _FILES: digest}
    path = folder / SETTINGS
    if not path.exists():
        write_jsonl(path, [content])
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in content["settings"].items() if found["settings"].get(name) != value]
        differing = [f"--{_OPTIONS.get(name, name)}".replace("_", "-") for name in changed]
        differing += [_FILES] if found[_FILES] != digest else []
    except (ValueError, TypeError, KeyError, AttributeError):
        differing = ["all of it"]
    if differing:
        raise ConfigError(
            f"{folder}: found an unfinished mining that differs in {', '.join(differing)}, expected "
            "one with the same settings and files. Give the same ones to resume, name another --out, or delete the "
            "folder to start over."
        )
    done = len(list(folder.glob("*.npy"))) + len(list(folder.glob("part-*.jsonl")))
    say(f"{folder}: resuming an unfinished mining, {done:,} of its files are done")


def read_settings(path: Path) -> MiningSettings:
    """The settings that `prepare` wrote."""
    return MiningSettings(**json.loads(path.read_text(encoding="utf-8"))["settings"])


def clean(settings: MiningSettings) -> None:
    """Remove the work folder of a finished mining."""
    shutil.rmtree(settings.work)
