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
