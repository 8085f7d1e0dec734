"""The single-process truth: plain PyTorch, one sequence at a time, dense float32, no engine, no packing, no cache."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lbr_dist.config import RunConfig
from lbr_dist.data.packing import Sequence
from lbr_dist.kernels.infonce import reference_info_nce
from lbr_dist.model.bottleneck import LBRModel, load_model
from lbr_dist.model.tokens import TextTokenizer
from lbr_dist.represent import PairBatch

Gradients = dict[str, Tensor]


def model_of(config: RunConfig) -> tuple[LBRModel, TextTokenizer]:
    tokenizer = TextTokenizer(Path(config.model.base))
    return load_model(config.model, Path(config.model.base), tokenizer, config.seed), tokenizer


def _bottleneck(model: LBRModel) -> Tensor:
    assert model.bottleneck is not None
    return model.bottleneck * getattr(model.backbone.get_input_embeddings(), "embed_scale", 1.0)


def _forward(model: LBRModel, inputs: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
    """Last hidden states ``[tokens, d]`` of one sequence of input embeddings under a mask ``[tokens, tokens]``."""
    backbone = model.backbone
    backbone.set_attn_implementation("eager")
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
    output: Tensor = backbone.model(
        inputs_embeds=inputs[None], position_ids=positions[None], attention_mask=bias, use_cache=False
    )[0]
    return output[0]


def _causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def learn_loss(model: LBRModel, sequences: list[Sequence], sink: int, form: str, text_weight: float) -> Tensor:
    """L_learn of a batch, as the head of lbr_dist/learn.py writes it."""
    embed, head = model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()
    text: list[Tensor] = []
    target: list[Tensor] = []
    for s in sequences:
        x, y = torch.tensor([sink, *s.context]), torch.tensor(s.target, dtype=torch.int64)
        fed = torch.tensor(s.target if s.target_inputs is None else s.target_inputs, dtype=torch.int64)[:-1]
        n, k, m = len(x), s.bottleneck, len(fed)
        if form == "none":
            hidden = _forward(model, embed(x), torch.arange(n), _causal(n))
        elif form == "mask":
            inputs = torch.cat([embed(x), _bottleneck(model), embed(fed)])
            seen = _causal(n + k + m)
            seen[n + k :, 1:n] = False
            hidden = _forward(model, inputs, torch.arange(n + k + m), seen)
            target.append(F.cross_entropy(head(hidden[n + k - 1 :]), y, reduction="none"))
        else:
            hidden = _forward(model, torch.cat([embed(x), _bottleneck(model)]), torch.arange(n + k), _causal(n + k))
            z = F.normalize(hidden[n:], dim=1) * model.embedding_norm
            inputs = torch.cat([embed(x[:1]), z, embed(fed)])
            positions = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(n, n + k + m)])
            second = _forward(model, inputs, positions, _causal(1 + k + m))
            target.append(F.cross_entropy(head(second[k:]), y, reduction="none"))
        text.append(F.cross_entropy(head(hidden[1 : n - 1]), x[2:], reduction="none"))
    if form == "none":
        return torch.cat(text).mean()
    return torch.cat(target).mean() + text_weight * torch.cat(text).mean()


def embed(model: LBRModel, tokens: tuple[int, ...], sink: int, pooling: str) -> Tensor:
    """One text's embedding, ``[d]``, not normalised."""
    x = torch.tensor([sink, *tokens])
    inputs = torch.cat([model.backbone.get_input_embeddings()(x), _bottleneck(model)])
    hidden = _forward(model, inputs, torch.arange(len(inputs)), _causal(len(inputs)))
    n = len(x)
    spans = {
        "bottleneck_last": hidden[-1:],
        "bottleneck_mean": hidden[n:],
        "last": hidden[n - 1 : n],
        "mean": hidden[1:n],
    }
    return spans[pooling].mean(0)


def represent_loss(model: LBRModel, batch: PairBatch, sink: int, temperature: float, pooling: str) -> Tensor:
    """L_represent of a batch: the mean over its queries."""
    queries = torch.stack([embed(model, tokens, sink, pooling) for tokens in batch.queries])
    documents = torch.stack([embed(model, tokens, sink, pooling) for tokens in batch.documents])
    positives = torch.tensor(batch.positives)
    return reference_info_nce(queries, documents, positives, batch.masked, temperature) / len(queries)


def gradients(model: LBRModel, loss: Tensor) -> Gradients:
    """The gradient of each parameter by its name."""
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
