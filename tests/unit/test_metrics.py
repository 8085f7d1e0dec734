"""The step log: its file, its resume, and what it shows."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lbr_dist import metrics
from lbr_dist.metrics import MetricsLog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_step_is_one_flushed_line_with_null_for_non_finite_values(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "learn", "learn", 3, quiet=True) as log:
        log.log(1, loss=2.5, lr=1e-4)
        assert lines(tmp_path / "learn") == [{"step": 1, "loss": 2.5, "lr": 1e-4}]
        log.log(2, loss=math.nan, grad_norm=torch.tensor(math.inf), note="diverged")
        log.log(3, loss=torch.tensor(0.5), tokens=7)
    assert lines(tmp_path / "learn")[1:] == [
        {"step": 2, "loss": None, "grad_norm": None, "note": "diverged"},
        {"step": 3, "loss": 0.5, "tokens": 7},
    ]


def test_resuming_drops_the_steps_that_run_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, "learn", 6, quiet=True) as log:
        for step in range(1, 5):
            log.log(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a write
    with MetricsLog(tmp_path, "learn", 6, start_step=2, quiet=True) as log:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        log.log(3, loss=30.0)
        log.log(4, loss=40.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    with MetricsLog(tmp_path, "learn", 6, quiet=True) as log:
        log.log(1, loss=9.0)
    assert [line["loss"] for line in lines(tmp_path)] == [9.0]


def test_resuming_keeps_step_0_and_joins_the_lines_of_a_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, "learn", 6, quiet=True) as log:
        log.log(0, effective_rank=3.0)
        log.log(1, loss=1.0)
        log.log(2, loss=2.0)
        log.log(2, effective_rank=9.0)
        log.log(3, loss=3.0)
    with MetricsLog(tmp_path, "learn", 6, start_step=2, quiet=True):
        assert lines(tmp_path) == [
            {"step": 0, "effective_rank": 3.0},
            {"step": 1, "loss": 1.0},
            {"step": 2, "loss": 2.0, "effective_rank": 9.0},
        ]
    # a stage that starts over measures the untrained model again
    with MetricsLog(tmp_path, "learn", 6, quiet=True) as log:
        log.log(0, effective_rank=4.0)
    assert lines(tmp_path) == [{"step": 0, "effective_rank": 4.0}]


def test_plain_lines_come_first_last_and_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("lbr_dist.metrics.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with MetricsLog(tmp_path, "learn", 12, stream=stream) as log:
        for step in range(1, 13):
            clock[0] += 2.0
            log.log(step, loss=2.9131, target_loss=3.1, text_loss=2.61, lr=1e-4, tokens_per_second=1204.4)
    shown = stream.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == ["1/12", "4/12", "7/12", "10/12", "12/12"]
    assert shown[0] == "learn      1/12  loss 2.913  target 3.10  text 2.61  lr 1.0e-04  1,204 tok/s  left 0:22"
    assert shown[-1].endswith("left 0:00")


def test_represent_lines_and_long_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("lbr_dist.metrics.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with MetricsLog(tmp_path, "represent", 1000, start_step=500, stream=stream) as log:
        clock[0] = 10.0
        log.log(501, loss=math.nan, accuracy=0.5, pairs_per_second=3.25)
        log.say("checkpoint [saved]")
    assert stream.getvalue().splitlines() == [
        "represent  501/1000  loss nan  accuracy 0.50  3.2 pairs/s  left 1:23:10",
        "checkpoint [saved]",
    ]


HELDOUT = {"heldout_target_loss": 2.888, "heldout_target_loss_shuffled": 3.56, "heldout_target_loss_without": 4.1}


def test_diagnostics_and_skipped_steps_are_printed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("lbr_dist.metrics.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with MetricsLog(tmp_path, "learn", 8, stream=stream) as log:
        log.log(0, **HELDOUT, heldout_perplexity=13.61, effective_rank=85.2, effective_rank_limit=256)
        for step in range(1, 7):
            clock[0] += 1.0
            extra: dict[str, Any] = {2: {"skipped": 1}, 3: {"skipped": 0}, 4: HELDOUT}.get(step, {})
            log.log(step, loss=math.nan if step == 2 else 2.5, **extra)
        log.log(6, heldout_target_loss=2.0, effective_rank=1.26)
        log.log(6, heldout_perplexity=5.54e34)
    assert stream.getvalue().splitlines() == [
        "learn     0/8  held-out 2.89 (shuffled 3.56, without 4.10)  ppl 13.6  rank 85",
        "learn     1/8  loss 2.500  left 0:07",
        "learn     2/8  skipped  loss nan  left 0:06",
        "learn     4/8  loss 2.500  held-out 2.89 (shuffled 3.56, without 4.10)  left 0:04",
        "learn     6/8  held-out 2.00  rank 1.3",
        "learn     6/8  ppl 5.5e+34",
    ]


def test_dev_pair_metrics_are_printed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbr_dist.metrics.time.monotonic", lambda: 0.0)
    stream = io.StringIO()
    with MetricsLog(tmp_path, "represent", 8, stream=stream) as log:
        log.log(0, heldout_loss=2.3456, heldout_accuracy=0.25, heldout_mrr=0.417)
        log.log(1, loss=2.5)
        log.log(2, loss=2.25, accuracy=0.5, heldout_loss=math.nan)
    assert stream.getvalue().splitlines() == [
        "represent 0/8  held-out 2.346 (accuracy 0.25, mrr 0.42)",
        "represent 1/8  loss 2.500  left 0:00",
        "represent 2/8  loss 2.250  accuracy 0.50  held-out nan  left 0:00",
    ]


def test_the_time_left_ignores_measurements_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("lbr_dist.metrics.time.monotonic", lambda: clock[0])
    for start in (0, 20):
        stream = io.StringIO()
        with MetricsLog(tmp_path, "learn", 100, start_step=start, stream=stream) as log:
            clock[0] += 600.0
            log.log(start, effective_rank=5.0)
            for step in range(start + 1, start + 11):
                clock[0] += 2.0
                log.log(step, loss=1.0)
                log.log(step, effective_rank=5.0)
        shown = [line for line in stream.getvalue().splitlines() if "left" in line]
        assert shown[0].endswith(f"left {(99 - start) * 2 // 60}:{(99 - start) * 2 % 60:02}")
        assert shown[-1].startswith(f"learn      {start + 10}/100") and "loss" in shown[-1]
        assert shown[-1].endswith(f"left {(90 - start) * 2 // 60}:{(90 - start) * 2 % 60:02}")


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path, "learn", 1, quiet=True) as log:
        log.log(0, **HELDOUT)
        log.log(1, loss=1.0, skipped=1)
        log.say("hello")
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_and_whole_lines_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with MetricsLog(tmp_path, "represent", 4, stream=stream) as log:
        log.log(1, loss=1.5)
        log.say("checkpoint [bold] saved")
        log.log(2, loss=9.0, skipped=1)
        log.log(3, loss=1.0, effective_rank=77.0)
        log.log(4, loss=0.25, kl=0.5, accuracy=0.5, alignment=1.0, grad_norm=2.0, pairs_per_second=4321.0)
    shown = stream.getvalue()
    assert "checkpoint [bold] saved\n" in shown
    assert "represent 2/4  skipped  loss 9.000  left 0:00\n" in shown
    assert "represent 3/4  loss 1.000  rank 77  left 0:00\n" in shown
    assert "represent" in shown and "4/4" in shown and "loss 0.250" in shown and "4,321 pairs/s" in shown


STEP = {
    **{"loss": 2.184, "target_loss": 3.1, "text_loss": 2.61, "accuracy": 0.91, "grad_norm": 1.2, "lr": 1e-4},
    **{"tokens_per_second": 412_000.0, "peak_memory_bytes": 5 * 2**30},
}


def bar(width: int, stage: str = "learn", left: str = "3:12:40", **values: float) -> str:
    """The live bar as a terminal of this width shows it: one line, no longer than the terminal."""
    stream = Terminal()
    progress = metrics._live_bar(stream, width)
    progress.add_task(stage, total=12000, completed=310, left=left, values=metrics._shown(values, telling=True))
    progress.console.print(progress.get_renderable())
    (line,) = stream.getvalue().splitlines()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
    assert len(plain) <= width and "…" not in plain, plain
    return " ".join(plain.replace("━", " ").replace("╸", " ").replace("╺", " ").split())


def test_the_bar_shows_stage_step_and_time_left_first() -> None:
    assert bar(80, **STEP) == "learn 310/12000 left 3:12:40 loss 2.184 412,000 tok/s"
    assert bar(60, **STEP) == "learn 310/12000 left 3:12:40 loss 2.184"
    assert bar(120, **STEP) == (
        "learn 310/12000 left 3:12:40 loss 2.184 412,000 tok/s accuracy 0.91 target 3.10 text 2.61"
    )
    pairs = {"loss": 0.25, "kl": 0.013, "accuracy": 0.5, "pairs_per_second": 321.0}
    assert bar(80, "represent", "0:22", **pairs) == "represent 310/12000 left 0:22 loss 0.250 321 pairs/s"
    assert bar(80, **STEP, skipped=1) == "learn 310/12000 left 3:12:40 skipped loss 2.184"


def test_the_bar_of_a_narrow_terminal_keeps_the_step() -> None:
    assert bar(40, **STEP) == "learn 310/12000 left 3:12:40"
    assert bar(40, left="101:12:40", **STEP) == "learn 310/12000 left 101:12:40"
    assert bar(24, **STEP) == "learn 310/12000"


def test_the_file_is_complete_when_the_stage_dies(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), MetricsLog(tmp_path, "learn", 9, stream=Terminal()) as log:
        log.log(1, loss=1.0)
        raise RuntimeError("boom")
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_missing_tensorboard_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics._tell_once.cache_clear()
    with caplog.at_level(logging.INFO, "lbr_dist.metrics"):
        for stage in ("learn", "represent"):
            MetricsLog(tmp_path / stage, stage, 1, quiet=True).close()
    assert len([r for r in caplog.records if "tensorboard" in r.message]) == 1


def test_importing_the_module_imports_neither_tensorboard_nor_torch_nor_rich() -> None:
    code = (
        "import sys, lbr_dist.metrics; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'tensorboard', 'torch.utils.tensorboard', 'rich')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(metrics.__file__).parents[1])


def test_tensorboard_gets_the_scalars_and_a_resumed_run_replaces_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, "learn", 4, quiet=True) as log:
        for step in (1, 2, 3):
            log.log(step, loss=float(step), note="text")
    with MetricsLog(tmp_path, "learn", 4, start_step=1, quiet=True) as log:
        log.log(2, loss=20.0)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["learn/loss"]
    assert [(e.step, e.value) for e in events.Scalars("learn/loss")] == [(1, 1.0), (2, 20.0)]
    for value in (5.0, 6.0):
        with MetricsLog(tmp_path, "learn", 4, quiet=True) as log:
            log.log(0, loss=value)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("learn/loss")] == [(0, 6.0)]


def test_a_full_disk_costs_the_log_and_not_the_training(tmp_path: Path) -> None:
    stream = io.StringIO()
    with MetricsLog(tmp_path, "learn", 3, stream=stream) as log:
        log.log(1, loss=1.0)
        log._file.close()
        log._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
        log.log(2, loss=2.0)
        log.log(3, loss=3.0)
    assert stream.getvalue().count("warning: /dev/full: No space left on device. Training continues") == 1
    assert "3/3" in stream.getvalue()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
