"""The config of a run with a tiny model and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lbr_dist.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    LearnConfig,
    ModelConfig,
    OptimizerConfig,
    RepresentConfig,
    RunConfig,
)


def tiny_run(run_dir: Path, base: Path, files: Path, **sections: Any) -> RunConfig:
    """Both stages, a few steps each, in float32; `sections` replace whole sections."""
    optimizer = OptimizerConfig(lr=3e-3)
    defaults: dict[str, Any] = {
        "model": ModelConfig(base=str(base), bottleneck_tokens=4, dtype="float32"),
        "data": DataConfig(
            corpus=str(files / "corpus.jsonl"),
            train=str(files / "train.jsonl"),
            test=str(files / "test.jsonl"),
            query_prompt="find: ",
            max_query_tokens=24,
            max_document_tokens=48,
            cache_dir=str(files / "cache"),
        ),
        "learn": LearnConfig(steps=4, batch_texts=13, max_text_tokens=40, row_tokens=192, optimizer=optimizer),
        "represent": RepresentConfig(steps=4, batch_pairs=11, hard_negatives=1, chunk_tokens=192, optimizer=optimizer),
        "checkpoint": CheckpointConfig(every_steps=2, keep=3),
        "evaluate": EvaluateConfig(chunk_tokens=192, bootstrap=50, examples=2),
    }
    return RunConfig(run_dir=str(run_dir), domain="tiny", **(defaults | sections))
