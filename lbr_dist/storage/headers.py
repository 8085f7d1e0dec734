"""What the headers of a folder's safetensors say about its weights. Imports no torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lbr_dist.errors import ModelError

PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are meant as they are stored."""


def _header(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > file.stat().st_size:
                raise ValueError(f"a header of {size} bytes in a file of {file.stat().st_size}")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(size))
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: its safetensors header cannot be read ({error}). Copy the file again.") from None
    header.pop("__metadata__", None)
    return header


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name.

    Raises:
        ModelError: the file has no readable safetensors header.
    """
    return {name: tuple(entry["shape"]) for name, entry in _header(file).items()}


def num_elements(file: Path) -> int:
    """Elements of all tensors of a file. Raises as `tensor_shapes` does."""
    return sum(math.prod(shape) for shape in tensor_shapes(file).values())


def full_name(name: str, names: Collection[str]) -> str:
    """A tensor's name in a causal LM, where `names` may be those of a backbone that was saved alone."""
    alone = "embed_tokens.weight" in names
    return f"model.{name}" if alone and not name.startswith(("model.", "lm_head.")) else name


def check_plain_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse weights that are not meant as they are stored.

    Args:
        folder: a model folder.
        config: its config.json.

    Raises:
        ModelError: the config names a quantization, or a tensor has a dtype that needs scales.
    """
    advice = "Use the base that it was made from, or save it in bfloat16 with its scales multiplied in."
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{folder / 'config.json'}: found quantization_config ({method or 'no quant_method'}), expected weights "
            f"that are stored as they are meant. {advice}"
        )
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():  # other files in the folder may be of another format
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    for file in sorted(folder / name for name in names if (folder / name).exists()):
        for name, entry in _header(file).items():
            if str(entry["dtype"]).startswith(("F8", "F6", "F4")):
                raise ModelError(f"{file}: {name} is {entry['dtype']}, expected one of {', '.join(PLAIN)}. {advice}")
