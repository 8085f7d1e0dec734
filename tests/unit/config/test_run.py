"""Settings of a run that are out of range."""

from __future__ import annotations

import pytest

from lbr_dist.config import CheckpointConfig
from lbr_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [("every_steps", 0), ("every_minutes", 0), ("keep", 0), ("keep_every", 0), ("keep_best", -1), ("resume", 0)],
)
def test_settings_out_of_range(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{field}: found {value}, expected"):
        CheckpointConfig(**{field: value})  # type: ignore[arg-type]
