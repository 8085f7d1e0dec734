"""The shape of Qwen2.5-7B, and planners for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lbr_dist.config import DataConfig, EngineConfig, ModelConfig, RepresentConfig, RunConfig
from lbr_dist.plan.machine import MACHINES, Cluster
from lbr_dist.plan.model import graph_bytes, model_sizes
from lbr_dist.plan.planner import StepPlanner

GIB = 2**30
D, INNER, LAYERS, VOCABULARY, KV = 3584, 18944, 28, 152064, 512
LAYER = 2 * D * D + 2 * D * KV + 3 * D * INNER + 2 * D + D + 2 * KV
"""Elements of a layer of Qwen2.5-7B: its projections, two norms, three biases."""


def write_base(folder: Path) -> Path:
    """A folder with only the config of Qwen2.5-7B in it."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": D,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_config(base: Path, **settings: Any) -> ModelConfig:
    """A folder's model in bfloat16, as GPUs run it."""
    return ModelConfig(base=str(base), dtype="bfloat16", **settings)


def planner(base: Path, ranks: int = 64, gib: float = 72.0, **sections: Any) -> StepPlanner:
    model = sections.pop("model", model_config(base))
    represent = RepresentConfig(**({"batch_pairs": 4096, "chunk_tokens": 8192} | sections.pop("represent", {})))
    engine = EngineConfig(**sections.pop("engine", {}))
    data = DataConfig(corpus="none", train="none", max_query_tokens=64, max_document_tokens=512)
    config = RunConfig(
        run_dir="none", domain="none", model=model, data=data, represent=represent, engine=engine, **sections
    )
    cluster = Cluster(MACHINES["h100"], ranks, min(8, ranks))
    return StepPlanner(config, model_sizes(model, base), graph_bytes(model, base, "cuda"), cluster, gib * GIB)
