"""The lines that report the progress of long work."""

from __future__ import annotations

import pytest

from lbr_dist import console as progress_lines


def test_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    clock = iter([0.0, 4.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: next(clock))
    progress = progress_lines.Progress(printed.append, "encoded", "texts", 4000)
    progress.within(1000, 100, 200)
    progress.add(1000)
    progress.add(500)
    progress.within(1000, 50, 100)
    assert printed == [
        "encoded 1,000 of 4,000 texts of the first rank, left 60 s",
        "encoded 2,000 of 4,000 texts of the first rank, left 40 s",
    ]
