"""Settings of a run that are out of range."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from lbr_dist.config import CheckpointConfig, ModelConfig, sequence_tokens, to_dict
from lbr_dist.config.file import from_plain
from lbr_dist.data.packing import TrainingSequence
from lbr_dist.errors import ConfigError
from tests.configs import tiny_run


@pytest.mark.parametrize(
    ("field", "value"),
    [("every_steps", 0), ("every_minutes", 0), ("keep", 0), ("keep_every", 0), ("keep_best", -1), ("resume", 0)],
)
def test_settings_out_of_range(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{field}: found {value}, expected"):
        CheckpointConfig(**{field: value})  # type: ignore[arg-type]


OUT_OF_RANGE = {
    "seed": (-1, "0 to 4,294,967,295"),
    "run_dir": ("", "a folder"),
    "model.base": ("", "a folder"),
    "data.corpus": ("", "a path"),
    "data.cache_dir": ("", "a path"),
    "data.longest_document": (-5, "a positive number"),
    "learn.optimizer.lr": (0.0, "a positive number"),
    "learn.optimizer.beta1": (-1.0, "0 to below 1"),
    "learn.optimizer.beta2": (7.0, "0 to below 1"),
    "represent.optimizer.lr": (math.inf, "a positive number"),
    "represent.optimizer.spike_factor": (0.5, "0 or above 1"),
    "represent.optimizer.most_skipped": (0, "a positive number"),
    "evaluate.systems": ([], "at least one system"),
    "evaluate.chunk_tokens": (-1, "a positive number"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_under_the_name_that_its_user_writes(name: str, tmp_path: Path) -> None:
    value, expected = OUT_OF_RANGE[name]
    content = to_dict(tiny_run(tmp_path / "run", tmp_path, tmp_path))
    *sections, field = name.split(".")
    section = content
    for part in sections:
        section = section[part]
    section[field] = value
    with pytest.raises(
        ConfigError, match=rf"(^|: ){re.escape(name)}: found {re.escape(repr(value))}, expected {expected}"
    ):
        from_plain(content, tmp_path / "config.yaml")


def test_the_number_of_tokens_of_a_sequence() -> None:
    """Sink, text, bottleneck and the target's inputs: as `packing` lays them out."""
    sequence = TrainingSequence((5, 6, 7), 4, (8, 9))
    assert sequence.length == sequence_tokens(3, 4, 1) == 1 + 3 + 4 + 1
    assert ModelConfig(base="x", bottleneck_tokens=4).sequence_tokens(3) == 8
