"""The three top-level folders are links into the package, and shadow nobody's imports."""

from __future__ import annotations

import importlib.util
import re
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


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_every_floor_is_a_version_that_the_suite_runs_with() -> None:
    """Each lower bound in setup.py is in constraints-floors.txt, which `make floors` installs, or is the pinned one."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    floors = dict(re.findall(r'"([\w.-]+)>=([\w.]+)"', text))
    ran, pinned = _pins("constraints-floors.txt"), _pins("constraints.txt")
    untested = {"flash-attn", "liger-kernel", "ruff", "mypy", "torch"}
    """For GPUs, or not of the library's own; torch 2.11 ran on a GPU, and nothing older."""
    wrong = [f"{n}>={v}" for n, v in floors.items() if n not in untested and v not in (ran.get(n), pinned.get(n))]
    assert not wrong and floors["torch"] == "2.11" and ran["torch"] == pinned["torch"]
