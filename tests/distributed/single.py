"""The single-process reference: plain PyTorch, one sequence at a time, dense float32, no engine, packing or cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lbr_dist.config import LearnConfig, RepresentConfig, RunConfig
from lbr_dist.data.packing import TrainingSequence, pack_row
from lbr_dist.data.pairs import PairBatch
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.learn import unit_noise
from lbr_dist.model.bottleneck import LBRModel, load_model
from lbr_dist.model.sharding import whole

Gradients = dict[str, Tensor]


def model_of(config: RunConfig) -> tuple[LBRModel, TextTokenizer]:
    tokenizer = TextTokenizer(Path(config.model.base))
    variational = config.learn.kl_weight > 0
    base = Path(config.model.base)
    temperature = config.represent.temperature if config.represent.learn_temperature else None
    model = load_model(config.model, base, tokenizer, config.seed, variational=variational, temperature=temperature)
    return model, tokenizer


def stir(parameters: Iterable[tuple[str, Any]]) -> None:
    """Move parameters that start at zero (adapters, a posterior's slope), since zeros hide most of their gradients."""
    for name, parameter in parameters:
        if ".lora_B." in name or name == "posterior.weight":
            with whole(parameter, write=True) as value:
                generator = torch.Generator().manual_seed(len(name))
                value.add_(0.3 * torch.randn(value.shape, generator=generator))


def _bottleneck(model: LBRModel) -> Tensor:
    assert model.bottleneck is not None
    return model.bottleneck * getattr(model.backbone.get_input_embeddings(), "embed_scale", 1.0)


def _forward(model: LBRModel, inputs: Tensor, positions: Tensor, seen: Tensor, hidden: int = 0) -> Tensor:
    """Last hidden states ``[tokens, d]`` of one sequence of input embeddings under a mask ``[tokens, tokens]``.

    `hidden` is the length of a text that the last tokens don't see: it does not count in their sliding window.
    """
    backbone = model.backbone
    backbone.set_attn_implementation("eager")
    place = torch.arange(len(inputs))
    back = place[:, None] - place[None, :]
    if hidden:
        back[:, 0] -= hidden * ~seen[:, 1]
    window = getattr(backbone.config, "sliding_window", None) or len(inputs)
    full, sliding = (
        torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None] for mask in (seen, seen & (back < window))
    )
    mixed = getattr(backbone.config, "layer_types", None) and backbone.config.model_type == "gemma3_text"
    mask = {"full_attention": full, "sliding_attention": sliding} if mixed else sliding
    output: Tensor = backbone.model(
        inputs_embeds=inputs[None], position_ids=positions[None], attention_mask=mask, use_cache=False
    )[0]
    return output[0]


def _causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def learn_loss(
    model: LBRModel, sequences: list[TrainingSequence], sink: int, learn: LearnConfig, noise_key: str = ""
) -> Tensor:
    """L_learn of a batch, as defined in the docstring of lbr_dist/learn.py."""
    form = learn.bottleneck
    embed, head = model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()
    text: list[Tensor] = []
    target: list[Tensor] = []
    divergences: list[Tensor] = []
    squares: list[Tensor] = []

    def score(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden)
        squares.append(logits.logsumexp(1).square())
        return F.cross_entropy(logits, labels, reduction="none")

    for i, s in enumerate(sequences):
        x, y = torch.tensor([sink, *s.context]), torch.tensor(s.target, dtype=torch.int64)
        fed = torch.tensor(s.target if s.target_inputs is None else s.target_inputs, dtype=torch.int64)[:-1]
        n, k, m = len(x), s.bottleneck, len(fed)
        if form == "none":
            hidden = _forward(model, embed(x), torch.arange(n), _causal(n))
        elif form == "mask":
            inputs = torch.cat([embed(x), _bottleneck(model), embed(fed)])
            seen = _causal(n + k + m)
            seen[n + k :, 1:n] = False
            hidden = _forward(model, inputs, torch.arange(n + k + m), seen, hidden=n - 1)
            target.append(score(hidden[n + k - 1 :], y))
        else:
            hidden = _forward(model, torch.cat([embed(x), _bottleneck(model)]), torch.arange(n + k), _causal(n + k))
            z = F.normalize(hidden[n:], dim=1)
            if model.posterior is not None:
                width = z.shape[1] ** 0.5
                noise = unit_noise(pack_row([s], sink, [i]), z.shape[1], noise_key)
                mean, log_variance = F.linear(z * width, model.posterior.weight, model.posterior.bias).chunk(2, dim=1)
                divergences.append(0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1))
                z = (mean + (log_variance / 2).exp() * noise) / width
            z = z * model.embedding_norm
            inputs = torch.cat([embed(x[:1]), z, embed(fed)])
            positions = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(n, n + k + m)])
            second = _forward(model, inputs, positions, _causal(1 + k + m))
            target.append(score(second[k:], y))
        text.append(score(hidden[1 : n - 1], x[2:]))
    loss = learn.z_loss * torch.cat(squares).mean()
    if divergences:
        loss = loss + learn.kl_weight * torch.cat(divergences).mean()
    if form == "none":
        return loss + torch.cat(text).mean()
    return loss + torch.cat(target).mean() + learn.text_weight * torch.cat(text).mean()


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


def represent_loss(model: LBRModel, batch: PairBatch, sink: int, settings: RepresentConfig) -> Tensor:
    """L_represent of a batch: the mean over its queries."""
    queries = torch.stack([embed(model, tokens, sink, settings.pooling) for tokens in batch.queries])
    documents = torch.stack([embed(model, tokens, sink, settings.pooling) for tokens in batch.documents])
    temperature: float | Tensor = settings.temperature
    if model.log_temperature is not None:
        temperature = model.log_temperature[0].exp()
    return contrastive_loss(queries, documents, batch, settings, temperature)


def contrastive_loss(
    queries: Tensor, documents: Tensor, batch: PairBatch, settings: RepresentConfig, temperature: float | Tensor
) -> Tensor:
    """The loss from its definition: one query at a time, each with a list of its own negatives."""
    losses = []
    for width in settings.prefixes or (queries.shape[1],):
        cosines = F.normalize(queries[:, :width], dim=1) @ F.normalize(documents[:, :width], dim=1).T
        for row, known in enumerate(batch.positives):
            best = cosines[row, known[0]]

            def negative(other_row: int, column: int, best: Tensor = best) -> bool:
                similar = settings.margin is not None and bool(cosines[other_row, column] > best + settings.margin)  # noqa: B023
                return column not in batch.positives[other_row] and not similar

            others = [cosines[row, c] for c in range(len(documents)) if negative(row, c)]
            loss = torch.stack([best, *others]).div(temperature).logsumexp(0) - best / temperature
            if settings.symmetric:
                others = [cosines[r, known[0]] for r in range(len(queries)) if negative(r, known[0])]
                back = torch.stack([best, *others]).div(temperature).logsumexp(0) - best / temperature
                loss = (loss + back) / 2
            losses.append(loss)
    return torch.stack(losses).mean()


def gradients(model: LBRModel, loss: Tensor) -> Gradients:
    """The gradient of each parameter by its name."""
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
