"""A rank's file: what `write` puts on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lbr_dist.checkpoint import shards
from lbr_dist.storage.files import checksum


def test_a_file_system_need_not_know_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: int) -> None:
        asked.append(arguments)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    written = shards.write(tmp_path / "file", {"master/a": torch.ones(5 << 20)}, {})
    assert len(asked) == 2 and checksum(tmp_path / "file") == written.xxh3_128


def test_a_file_is_plain_safetensors(tmp_path: Path) -> None:
    tensors = {"master/a": torch.arange(7.0), "random/torch": torch.arange(5, dtype=torch.uint8)}
    written = shards.write(tmp_path / "x.safetensors", tensors, {"note": "é"})
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert written.num_bytes == (tmp_path / "x.safetensors").stat().st_size == shards.file_bytes(tensors, {"note": "é"})
    assert written.xxh3_128 == checksum(tmp_path / "x.safetensors")
