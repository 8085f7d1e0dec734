"""What a mining of negatives is asked for, and the folder in which it can be interrupted and go on.

The folder is named after the result. It holds the settings with a fingerprint of all files that matter, vectors and
finished parts; it goes when the result is there. Imports no torch, so that a mistake is named at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lbr_dist.data.record_files import record_files
from lbr_dist.data.records import write_jsonl
from lbr_dist.errors import ConfigError
from lbr_dist.mining.candidates import MiningRules
from lbr_dist.storage.fingerprint import fingerprint

Say = Callable[[str], None]

SETTINGS = "settings.json"
_SCHEMA = "negatives 1"
_FILES = "contents of files, or the version of torch or transformers"
_OPTIONS = {"miner": "with"}


@dataclass(frozen=True, slots=True)
class MiningSettings:
    """What to mine, from what and with what; the fields are the options of `lbr data negatives`."""

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
    """Threads of a rank on a CPU. Not taken from the number of ranks, since sums may depend on it."""

    device: str = "cpu"
    unit: int = 256
    """Texts of a file of vectors, pairs of a part: what a killed rank loses at most. Larger in large collections."""

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        for name in ("negatives", "first", "chunk_tokens", "threads", "unit"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "one or more")
        _require(self.last >= self.first, "first", self.first, f"at most --last, which is {self.last}")
        window = self.last - self.first + 1
        _require(self.negatives <= window, "negatives", self.negatives, f"at most the {window} of --first to --last")
        percent, absolute = self.margin_percent, self.margin_absolute
        _require(percent is None or absolute is None, "margin-absolute", absolute, "no --margin-percent beside it")
        _require(percent is None or 0 < percent <= 1, "margin-percent", percent, "above 0 and at most 1")
        _require(
            absolute is None or (absolute >= 0 and math.isfinite(absolute)), "margin-absolute", absolute, "0 or more"
        )
        if self.miner == "bm25":
            _require(
                self.index == "exact", "index", self.index, "exact with --with bm25, which has an index of its own"
            )
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
        """A file or folder whose name is that of the result with something behind."""
        return Path(f"{self.out}.{ending}")

    def document_unit(self, count: int) -> int:
        """Of so many documents: at most 4,096 files."""
        return max(self.unit, math.ceil(count / 4096))

    def pair_unit(self, count: int) -> int:
        """Of so many pairs: all vectors are read once for each unit."""
        return max(self.unit, math.ceil(count / 512))

    @property
    def work(self) -> Path:
        return self.beside("work")


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')}: found {found}, expected {expected}.")


# ---- the work folder ----------------------------------------------------------------------------------------------


def prepare(settings: MiningSettings, say: Say) -> None:
    """Make the work folder, or find the one of an interrupted mining with the same settings and files.

    Raises:
        ConfigError: the folder holds another mining, and names what differs.
    """
    folder = settings.work
    folder.mkdir(parents=True, exist_ok=True)
    files = [*record_files(Path(settings.pairs)), *record_files(Path(settings.documents))]
    also = [_SCHEMA, version("torch"), version("transformers")]
    if settings.model is not None:
        model = Path(settings.model)
        inside = sorted(
            p for p in model.rglob("*") if p.is_file() and not p.relative_to(model).parts[0].startswith(".")
        )
        files += inside
        also += [str(path.relative_to(model)) for path in inside]
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
            "one with the same settings and files. Give the former ones to go on, name another --out, or delete the "
            "folder to start again."
        )
    done = len(list(folder.glob("*.npy"))) + len(list(folder.glob("part-*.jsonl")))
    say(f"{folder}: going on with an unfinished mining, {done:,} files of it are there")


def read_settings(path: Path) -> MiningSettings:
    """The settings that `prepare` has written."""
    return MiningSettings(**json.loads(path.read_text(encoding="utf-8"))["settings"])


def clean(settings: MiningSettings) -> None:
    """Remove the work folder of a finished mining."""
    shutil.rmtree(settings.work)
