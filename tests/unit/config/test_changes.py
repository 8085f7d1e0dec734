"""Which settings may change when a run resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lbr_dist.config import CheckpointConfig, to_dict
from lbr_dist.config.changes import forbidden_changes
from tests.configs import tiny_run


def test_what_may_change(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", tmp_path / "base", tmp_path)
    changed = dataclasses.replace(
        config,
        run_dir="moved",
        seed=3,
        checkpoint=CheckpointConfig(every_steps=7),
        engine=dataclasses.replace(config.engine, live_elements=1),
        learn=dataclasses.replace(config.learn, row_tokens=999, steps=5),
    )
    assert forbidden_changes(to_dict(config), to_dict(changed)) == ["learn.steps", "seed"]


def test_a_dtype_that_was_left_open_is_no_change(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", tmp_path / "base", tmp_path)
    plain = {dtype: dataclasses.replace(config.model, dtype=dtype) for dtype in ("auto", "bfloat16", "float32")}
    found = {name: to_dict(dataclasses.replace(config, model=model)) for name, model in plain.items()}
    assert forbidden_changes(found["auto"], found["bfloat16"]) == []
    assert forbidden_changes(found["bfloat16"], found["auto"]) == []
    assert forbidden_changes(found["bfloat16"], found["float32"]) == ["model.dtype"]
