"""`lbr plan` prints the plan of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.config.file import write_config
from lbr_dist.launch.cli import main
from tests.configs import tiny_run
from tests.unit.plan.cases import write_base


def test_the_command_prints_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path)
    arguments = ["plan", "launch/configs/medical-7b.yaml", f"--model.base={base}", "--nodes", "8", "--gpu", "h100"]
    arguments += ["--query-tokens", "40", "--document-tokens", "300", "--engine.live_elements=8000000000"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("Memory at the peak", "between nodes", "limit: ", "Weak scaling", "Strong scaling", "Assumed"):
        assert words in printed
    assert "gathered once, whole until the step's end" in printed
    assert "The largest batch that fits" in printed
    assert main([*arguments, "--nodes", "0"]) == 1
    assert "--nodes: found 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--nodes", "0"),
        ("--memory-gib", "0"),
        ("--tflops", "-1"),
        ("--between-gbs", "0"),
        ("--query-tokens", "-3"),
        ("--document-tokens", "0"),
        ("--efficiency", "nan"),
    ],
)
def test_an_option_out_of_range_is_named_as_it_was_given(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    write_config(tiny_run(tmp_path / "run", tmp_path, tmp_path), path)
    assert main(["plan", str(path), option, value]) == 1
    assert f"error: {option}: found {float(value):g}, expected" in capsys.readouterr().err
