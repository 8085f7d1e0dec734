"""What the tests of the export share: the exported folder of an untrained model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from lbr_dist.config import LearnConfig, ModelConfig, RepresentConfig, RunConfig
from lbr_dist.data.packing import TrainingSequence, pack_row
from lbr_dist.data.tokenizer import EmbeddingSettings, TextTokenizer
from lbr_dist.export import folder as export_folder
from lbr_dist.model.bottleneck import load_model
from lbr_dist.ranks import group
from tests import tiny
from tests.configs import tiny_run

TEXTS = list(tiny.texts().values())[:9]


def exported(base: Path, data: Path, folder: Path, pooling: str) -> tuple[Path, torch.Tensor, RunConfig]:
    """Export an untrained model; also return the vectors that training would pool for `TEXTS` as queries."""
    k = 4 if pooling.startswith("bottleneck") else 0
    represent = RepresentConfig(pooling=pooling, chunk_tokens=96)  # type: ignore[arg-type]
    model_config = ModelConfig(base=str(base), bottleneck_tokens=k, dtype="float32")
    learn = LearnConfig(bottleneck="mask" if k else "none")
    config = tiny_run(folder, base, data, model=model_config, learn=learn, represent=represent)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_query_tokens=40))
    ranks = group.start()
    tokenizer = TextTokenizer(base)
    model = load_model(model_config, base, tokenizer, seed=1)
    tokens = tokenizer.encode(["find: " + text for text in TEXTS], 40)
    rows = pack_row([TrainingSequence(t, k) for t in tokens], tokenizer.sink_id)
    vectors = torch.empty(len(TEXTS), 32)
    vectors[rows.order] = F.normalize(model(rows, task="embed", pooling=pooling), dim=1).detach()
    settings = EmbeddingSettings.of(config.data, represent.pooling)
    export_folder.export(model, tokenizer, settings, config, folder / "model", ranks)
    return folder / "model", vectors, config
