"""Checks that run before a rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lbr_dist import preflight
from lbr_dist.errors import LaunchError
from tests.configs import tiny_run


def test_a_full_disk_is_reported_before_a_rank_starts(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path / "run", tiny_model, tiny_data)
    elements = sum(tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    said: list[str] = []
    for room, words in ((12 * elements - 1, None), (12 * elements, 1), (12 * elements * 7, 0)):
        monkeypatch.setattr(preflight, "free_bytes", lambda _, room=room: room)
        if words is None:
            with pytest.raises(LaunchError, match=r"GiB free; a checkpoint takes .* Make room"):
                preflight.check_disk(config, ("learn", "represent"), said.append)
            continue
        preflight.check_disk(config, ("learn", "represent"), said.append)
        assert len(said) == words
        said.clear()
