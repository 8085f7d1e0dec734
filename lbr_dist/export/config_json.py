"""The export's config.json: what transformers 5 writes, and the same values under the names that other readers know.

Transformers 4, vLLM, text-embeddings-inference and llama.cpp's converter read `rope_theta`, `rope_scaling` and
`torch_dtype`. Where these are missing they don't complain: they take a default, and the vectors are wrong.
"""

from __future__ import annotations

from typing import Any

LOCAL = ("_name_or_path", "is_local", "local_files_only")
"""True of the machine that exported the model, and nowhere else."""

OF_THE_BASE = ("auto_map", "quantization_config")
"""Describe files of the base that the export does not have: its code, and its weights as they were stored."""

NOT_IN_ROPE_SCALING = ("rope_theta", "rope_type", "partial_rotary_factor")


def config_json(content: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What to write as config.json.

    Args:
        content: what transformers 5 would write.
        dtype: of the stored weights.
    """
    kept = {name: value for name, value in content.items() if name not in LOCAL + OF_THE_BASE}
    return kept | {"dtype": dtype, "torch_dtype": dtype} | _rope(kept.get("rope_parameters") or {})


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """The older names of `rope_parameters`, which is one dictionary, or one for each type of layer (Gemma 3)."""
    if not parameters:
        return {}
    names: dict[str, Any] = {}
    nested = {kind: value for kind, value in parameters.items() if isinstance(value, dict)}
    if nested:
        if "sliding_attention" in nested:
            names["rope_local_base_freq"] = nested["sliding_attention"]["rope_theta"]
        parameters = nested.get("full_attention") or next(iter(nested.values()))
    kind = parameters["rope_type"]
    scaling = {name: value for name, value in parameters.items() if name not in NOT_IN_ROPE_SCALING}
    names["rope_theta"] = parameters["rope_theta"]
    names["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **scaling}
    if "partial_rotary_factor" in parameters:
        names["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return names
