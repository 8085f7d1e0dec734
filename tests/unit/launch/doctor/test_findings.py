"""Programs and checks that hang or fail."""

from __future__ import annotations

import time
from pathlib import Path

from lbr_dist.launch.doctor.findings import ask, ok, within


def test_ask_keeps_what_came_in_time() -> None:
    began = time.monotonic()
    answer = ask("sh", "-c", "sleep 60 & echo $!; sleep 60", seconds=1)
    assert answer.failure == "sh gave no answer within 1 s" and not answer.missing
    assert time.monotonic() - began < 15
    assert answer.text.strip().isdigit()
    child = Path("/proc", answer.text.strip(), "stat")  # what it started is dead too, or will be in a moment
    while child.exists() and child.read_text().split()[2] not in "ZX":
        assert time.monotonic() - began < 15
        time.sleep(0.05)
    assert ask("no-such-program").missing


def test_check_that_hangs_or_fails() -> None:
    began = time.monotonic()
    (found,) = within("hung", lambda: time.sleep(30) or [], seconds=0.2)
    assert found.state == "fault" and found.name == "hung" and "within 0.2 s" in found.found
    assert time.monotonic() - began < 15
    (found,) = within("broken", lambda: [ok("division", str(1 // 0))])
    assert found.state == "fault" and "ZeroDivisionError" in found.found
    (found,) = within("missing", lambda: [ok("file", Path("/proc/none").read_text())])
    assert found.state == "fault" and found.found == "/proc/none: No such file or directory"
