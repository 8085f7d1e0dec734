"""The checksums of an exported model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbr_dist.errors import CheckpointError
from lbr_dist.export.checksums import verify_export, write_checksums


def test_an_export_is_verified(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"checksums.json: cannot be read"):
        verify_export(tmp_path)
    write_checksums(tmp_path)
    verify_export(tmp_path)
    (tmp_path / "notes.txt").write_text("added later")
    verify_export(tmp_path)
    assert set(json.loads((tmp_path / "checksums.json").read_text())) == {"1_Pooling/config.json", "model.safetensors"}
    (tmp_path / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(CheckpointError, match="damaged"):
        verify_export(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        verify_export(tmp_path)
