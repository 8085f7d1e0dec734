"""The dtype in which a model folder encodes on this machine. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from lbr_dist.config import Dtype
from lbr_dist.ranks.hardware import count_gpus, fitting_dtype


def encoding_dtype(folder: Path) -> Dtype:
    """float32 for a folder of float32 weights, and where bfloat16 would be emulated; bfloat16 otherwise."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = config.get("dtype", config.get("torch_dtype"))  # the second is what transformers 4 writes
    except (OSError, ValueError, AttributeError):
        stored = None  # whoever opens the folder says what is wrong with it
    return "float32" if stored == "float32" else fitting_dtype(count_gpus())
