"""The tensors of a checkpoint: written as plain safetensors, one file per rank, and read on any number of ranks.

A rank's file holds its slice of each trained parameter's master weights and of AdamW's two moments, flat and in
float32, as ``master/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME``. ZeRO-3 cuts a parameter of n elements into W parts
of ``ceil(n / W)``, so n, W and the rank say where a slice is. With another number of ranks, each rank reads the pieces
that it needs. Nothing is converted, and nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from lbr_dist.storage.files import open_private

KINDS = ("master", "exp_avg", "exp_avg_sq")
_NAMES = {torch.float32: "F32", torch.uint8: "U8"}
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written: its name, size and checksum."""

    name: str
    num_bytes: int
    xxh3_128: str


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


# ---- writing -------------------------------------------------------------------------------------------------------


def file_bytes(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> int:
    """The size of the file that `write` would write."""
    return len(_header(tensors, notes)) + sum(t.numel() * t.element_size() for t in tensors.values())


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Written:
    """Write a safetensors file and flush it to the disk.

    The checksum is computed from memory, so it also detects errors on the way to the disk.

    Args:
        path: the file to create or replace.
        tensors: contiguous, float32 or uint8; copied to the CPU one by one if they are elsewhere.
        notes: the file's ``__metadata__``.
    """
    hashed = xxhash.xxh3_128()
    size, on_its_way = 0, 0
    with open(path, "wb", buffering=0, opener=open_private) as stream:
        header = memoryview(_header(tensors, notes))
        for piece in (header, *(_bytes(tensor) for tensor in tensors.values())):
            for start in range(0, len(piece), _CHUNK):
                chunk = piece[start : start + _CHUNK]
                hashed.update(chunk)
                write_chunk(stream, chunk)
                size += len(chunk)
                if size - on_its_way >= _CHUNK:
                    # on this hint, Linux starts to write pages that are not on the disk yet: the disk works while the
                    # next chunk is copied, and the flush at the end has little left to do
                    with contextlib.suppress(OSError):  # only a hint: not every file system supports it
                        os.posix_fadvise(stream.fileno(), on_its_way, size - on_its_way, os.POSIX_FADV_DONTNEED)
                    on_its_way = size
        os.fsync(stream.fileno())
    return Written(path.name, size, hashed.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.cpu().numpy()
    return memoryview(array).cast("B")


def write_chunk(stream: BinaryIO, chunk: memoryview) -> None:
    """Write all of a chunk to an unbuffered file; one call of its `write` may write only part of it."""
    while chunk:
        chunk = chunk[stream.write(chunk) :]


def _header(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(notes)}
    offset = 0
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), name
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
    return len(text).to_bytes(8, "little") + text


# ---- reading -------------------------------------------------------------------------------------------------------


class ShardReader:
    """Reads slices of the parameters from the files of all ranks that saved. Use it as a context manager.

    Args:
        folder: of the checkpoint.
        shapes: of the parameters, by name.
        world_size: the number of ranks that saved.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]], world_size: int) -> None:
        self.folder, self.world_size = folder, world_size
        self.elements = {name: math.prod(shape) for name, shape in shapes.items()}
        self._files: dict[int, Any] = {}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(self.folder / file_name(rank), framework="pt")
        return self._files[rank]

    def pieces(self, kind: str, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Elements `start` to `stop` of a parameter's state, as pieces with the offset of each.

        Args:
            kind: one of `KINDS`.
        """
        part = math.ceil(self.elements[name] / self.world_size)
        while start < stop:
            rank = start // part
            end = min(stop, (rank + 1) * part)
            piece = self._file(rank).get_slice(f"{kind}/{name}")[start - rank * part : end - rank * part]
            yield start, piece
            start = end

    def whole(self, kind: str, name: str) -> Tensor:
        """All of a parameter's state, flat, in float32."""
        elements = self.elements[name]
        found = torch.empty(elements, dtype=torch.float32)
        for start, piece in self.pieces(kind, name, 0, elements):
            found[start : start + len(piece)] = piece
        return found

    def of_rank(self, rank: int) -> tuple[dict[str, str], dict[str, Tensor]]:
        """What a rank saved besides the parameters: its notes, and its ``random/...`` tensors."""
        file = self._file(rank)
        names = [name for name in file.keys() if name.startswith("random/")]  # noqa: SIM118  # no mapping
        return dict(file.metadata()), {name: file.get_tensor(name) for name in names}
