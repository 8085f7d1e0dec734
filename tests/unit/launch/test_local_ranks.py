"""Each rank's output is in its log; the first one's also goes where the launcher's own output goes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

LINES = ("from Python", "a warning", "from a library", "checkpoint [saved]", "printed beside the bar", "at the end")
STEPS = ("learn     1/2  loss 2.500  left 0:0", "learn     2/2  loss 1.250  left 0:00")


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.unit.launch.talkative", str(folder)]


def logs(folder: Path) -> list[str]:
    return [(folder / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]


def test_output_to_files(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=120, check=True)
    first, second = logs(tmp_path)
    assert second == "I am the second\n"
    assert done.stderr == "a warning\nfrom a library\n", "the two streams stay apart"
    assert "at the end" in done.stdout and "from Python" in done.stdout and "warning" not in done.stdout
    for line in (*LINES, STEPS[1]):
        assert first.count(line) == 1, line
    assert sorted(first.splitlines()) == sorted((done.stdout + done.stderr).splitlines())


def test_both_streams_to_one_file_keep_the_order_of_the_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=True
    )
    assert done.stdout == logs(tmp_path)[0]


def on_terminal(folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of the launcher on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "CI")}
    env |= {"COLUMNS": "80", "TERM": "xterm"} | environment
    with subprocess.Popen(command(folder), stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
    os.close(ours)
    return process.returncode, shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the last process has closed it
        return b""


def test_output_to_a_terminal(tmp_path: Path) -> None:
    """The live bar is on the terminal alone, and the log has plain lines instead."""
    code, shown = on_terminal(tmp_path)
    first, second = logs(tmp_path)
    assert code == 0, shown
    assert second == "I am the second\n" and "second" not in shown
    assert "\x1b" in shown and "━" in shown and "loss 1.250" in shown
    assert "\x1b" not in first and "━" not in first and "\r" not in first
    for line in LINES:
        assert first.count(line) == 1 and shown.count(line) == 1, line
    for line in STEPS:
        assert first.count(line) == 1 and line not in shown, line


def test_the_first_ranks_error_is_on_the_terminal_and_in_its_log(tmp_path: Path) -> None:
    code, shown = on_terminal(tmp_path, STAGE="fails")
    assert code == 1 and shown.index("error: the fault") < shown.index("its message is above")
    assert "error: the fault\n" in logs(tmp_path)[0]


def test_output_that_nobody_reads_does_not_stop_the_run(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    subprocess.run(command(tmp_path), stdout=write, stderr=subprocess.DEVNULL, timeout=120, check=True)
    os.close(write)
    assert "at the end" in logs(tmp_path)[0]


def test_a_slow_reader_gets_the_last_line(tmp_path: Path) -> None:
    """The rank has exited long before the reader takes its last lines."""
    environment = os.environ | {"STAGE": "much"}
    with subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "from Python\n"
        time.sleep(2)
        assert process.stdout.read().endswith("much\nat the end\n")
    assert process.returncode == 0 and logs(tmp_path)[0].count("much\n") == 20_000
