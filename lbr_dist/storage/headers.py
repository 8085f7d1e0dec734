"""Shapes of the tensors in a safetensors file, from its header alone. Imports no torch."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from lbr_dist.errors import ModelError


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name.

    Raises:
        ModelError: the file has no readable safetensors header.
    """
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: its safetensors header cannot be read ({error}). Copy the file again.") from None
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def num_elements(file: Path) -> int:
    """Elements of all tensors of a file. Raises as `tensor_shapes` does."""
    return sum(math.prod(shape) for shape in tensor_shapes(file).values())
