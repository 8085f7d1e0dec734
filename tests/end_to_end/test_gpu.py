"""The pipeline on one GPU: NCCL, CUDA streams, bfloat16. Run with `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.runs import config_file, lbr


@pytest.mark.gpu
def test_run_on_a_gpu(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    path = config_file(tmp_path, tiny_model, tiny_data)
    done = lbr("run", str(path), "--ranks", "1", "--model.dtype=bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "a run" / "learn" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < steps[1]["loss"]  # the first line is from before the first step
    metrics = json.loads((tmp_path / "a run" / "report" / "metrics.json").read_text())
    assert set(metrics["systems"]) == {"bm25", "base", "learn", "lbr"}
