"""The headers of safetensors files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from lbr_dist.errors import ModelError
from lbr_dist.storage.headers import tensor_shapes


@pytest.mark.parametrize(
    "content",
    [b"", b"not", b"not a model", struct.pack("<Q", 2) + b"{", struct.pack("<Q", 9) + b"not json."],
    ids=["empty", "short", "a header larger than the file", "cut off", "no JSON"],
)
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: its safetensors header cannot be read"):
        tensor_shapes(file)
