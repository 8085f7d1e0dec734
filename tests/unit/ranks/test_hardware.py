"""What the environment's variables say about GPUs and threads."""

from __future__ import annotations

import pytest

from lbr_dist.errors import LaunchError
from lbr_dist.ranks.hardware import omp_threads, visible_gpus


@pytest.mark.parametrize(
    ("variable", "count"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("2", 1),
        ("0,3", 2),
        (" 0, 1", 2),
        ("0,-1,1", 1),  # nothing after the first that is invalid
        ("0,7,1", 1),
        ("NoDevFiles", 0),
        ("GPU-8932f937-d72c,GPU-6a3b", 2),
        ("MIG-4b1c", 1),
    ],
)
def test_visible_gpus(variable: str | None, count: int) -> None:
    assert visible_gpus(variable, 4) == count


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), (" 4 , 2", 4), ("", None), (None, None)])
def test_omp_threads(monkeypatch: pytest.MonkeyPatch, value: str | None, threads: int | None) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert omp_threads() == threads


@pytest.mark.parametrize("value", ["0", "-2", "many", ",4"])
def test_wrong_omp_threads_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(LaunchError, match=f"OMP_NUM_THREADS: found '{value}'"):
        omp_threads()
