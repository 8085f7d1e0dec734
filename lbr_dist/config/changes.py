"""What may change in a run's config between two starts, and what may not. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHANGES_NO_RESULT = (
    "run_dir",
    "checkpoint",
    "cluster",
    "engine",
    "evaluate",
    "slurm",
    "data.cache_dir",
    "data.dev",
    "data.test",
    "data.test_documents",
    "model.activation_checkpointing",
    "model.attention",
    "learn.diagnose_every",
    "learn.row_tokens",
    "represent.chunk_tokens",
    "represent.diagnose_every",
    "represent.exchange",
    "represent.keep_graphs",
    "represent.separate_sides",
)
"""Sections and fields that may change when a run resumes: they change its results by rounding at most."""


def forbidden_changes(found: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted names of the fields that have changed in a run's plain config, but must not: the run could not resume."""
    below = tuple(f"{name}." for name in CHANGES_NO_RESULT)
    names = [n for n in differences(found, now) if n not in CHANGES_NO_RESULT and not n.startswith(below)]
    # `auto` is what the run started with, or will start with
    dtypes = {plain.get("model", {}).get("dtype") for plain in (found, now)}
    return [n for n in names if n != "model.dtype" or "auto" not in dtypes]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two plain configs differ."""
    names: list[str] = []
    for key in sorted({*found, *expected}):
        a, b = found.get(key), expected.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names
