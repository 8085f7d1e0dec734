"""The three top-level folders are links into the package, and shadow nobody's imports."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import lbr_dist

ROOT = Path(lbr_dist.__file__).parents[1]


def test_links() -> None:
    for name in ("kernels", "launch", "slurm"):
        link = ROOT / "lbr_dist" / name
        assert link.is_symlink() and not Path(link.readlink()).is_absolute()
        assert link.resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()
        assert importlib.util.find_spec(f"lbr_dist.{name}") is not None


def test_nothing_machine_bound_is_committed() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert files
    for name in filter(None, files):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert str(ROOT) not in text, f"{name} names a path of this machine"
