"""A run folder with checkpoints, and ways to damage one, for the tests of checkpoints and of `lbr checkpoints`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from lbr_dist.checkpoint.manifest import Checkpoints, Manifest
from lbr_dist.config import StageName
from lbr_dist.config.file import write_config
from lbr_dist.launch import cli
from lbr_dist.storage.files import checksum
from tests.configs import tiny_run


def checkpoints(run: Path, stage: StageName = "learn") -> Checkpoints:
    return Checkpoints(run / stage / "checkpoints")


def publish(run: Path, step: int, score: float | None = None, age: float = 0.0, stage: StageName = "learn") -> Path:
    """A checkpoint of two ranks with 100 bytes each."""
    there = checkpoints(run, stage)
    there.begin(step)
    files = {}
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        path = there.saving(step) / name
        path.write_bytes(bytes([step % 256]) * 100)
        files[name] = {"bytes": 100, "xxh3_128": checksum(path)}
    saved_at = (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="seconds")
    values = {"loss": 1.0 + step}
    there.publish(Manifest(stage, step, 2, saved_at, {}, {}, {}, {}, {"step": step}, values, score, files))
    return there.folder(step)


def run_with_checkpoints(tmp_path: Path) -> Path:
    """A run folder with four checkpoints of stage 1, of which the third is the best, and a config with keep 3."""
    config = tiny_run(tmp_path / "run", tmp_path / "base", tmp_path)
    write_config(config, config.run_path / "config.yaml")
    for step, score in ((10, 3.0), (20, 2.0), (30, 1.0), (40, 1.5)):
        publish(config.run_path, step, score)
    return config.run_path


def command(*arguments: str | Path) -> int:
    return cli.main(["checkpoints", *map(str, arguments)])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    path.write_bytes(b"x" + path.read_bytes()[1:])
