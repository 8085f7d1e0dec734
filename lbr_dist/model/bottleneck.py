"""The model of both stages: a causal LM, and k bottleneck tokens with embeddings of their own.

The bottleneck's embeddings are a parameter separate from the vocabulary, so they can have their own learning rate, and
nothing has to be resized while the vocabulary is sharded. The export writes them into the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbr_dist.config import ModelConfig, Pooling
from lbr_dist.data.packing import NO_LABEL, TARGET_LOSS, PackedRow, without
from lbr_dist.data.tokenizer import EmbeddingSettings, TextTokenizer
from lbr_dist.errors import ModelError
from lbr_dist.kernels.attention import Backend
from lbr_dist.kernels.cross_entropy import linear_cross_entropy
from lbr_dist.kernels.layout import BOTTLENECK, CONTEXT, TARGET
from lbr_dist.model.adapters import add_adapters
from lbr_dist.model.backbone import embedding_table, load_backbone


class LanguageModelLoss(nn.Module):
    """The LM head and its loss as one module, so that ZeRO-3 gathers the head once for all of its chunks."""

    def __init__(self, head: nn.Linear, scale: float = 1.0) -> None:
        super().__init__()
        assert isinstance(head.weight, nn.Parameter)
        self.weight = head.weight
        self.scale = scale

    def forward(
        self, hidden: Tensor, labels: Tensor, groups: Tensor, weights: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor]:
        """See `linear_cross_entropy`."""
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return linear_cross_entropy(hidden, self.weight, labels, groups, weights, z_weight)


def logit_scale(config: Any) -> float:
    """What the family's LM head multiplies its logits with. `probe.py` checks it against transformers' own loss."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides by it
    return scale * (scaling if config.model_type == "hyperclovax" else 1.0 / scaling)


class Posterior(nn.Module):
    """A Gaussian channel for the vectors that `reinject` feeds back: a mean and a log-variance for each element.

    It starts as the identity with little noise. Source: Alemi et al. 2017, "Deep Variational Information Bottleneck"
    (arXiv 1612.00410), section 3.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([torch.eye(dimension), torch.zeros(dimension, dimension)]))
        self.bias = nn.Parameter(torch.cat([torch.zeros(dimension), torch.full((dimension,), -4.0)]))

    def forward(self, hidden: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A sample ``[tokens, d]`` float32, and its divergence from a unit normal in nats, summed over the tokens.

        Args:
            hidden: ``[tokens, d]``, with elements around one in size.
            noise: ``[tokens, d]`` float32, unit normal.
        """
        mean, log_variance = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float().chunk(2, dim=1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()
        return mean + (0.5 * log_variance).exp() * noise, divergence


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weight in the loss of one scored token of each kind, already divided by the counts of the global batch."""

    text: float
    target: float
    z: float = 0.0
    """Weight of a scored token's squared log-normaliser."""

    kl: float = 0.0
    """Weight of a bottleneck token's divergence in nats."""


class LBRModel(nn.Module):
    """Runs packed rows through the LM, for the language-model loss or for the embeddings.

    Args:
        backbone: the causal LM, built by `load_backbone`.
        bottleneck: ``[k, d]`` initial embeddings of the bottleneck tokens.
        embedding_norm: the mean norm of the LM's input embeddings; `reinject` scales its vectors to it.
        variational: whether `reinject` draws its vectors from a learned posterior.
        attention: the attention kernel.
        temperature: initial value of stage 2's learned temperature; None if it is not learned.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        bottleneck: Tensor,
        embedding_norm: float,
        variational: bool = False,
        attention: Backend = "auto",
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        # ZeRO-3 has trouble with a parameter without elements
        self.bottleneck = nn.Parameter(bottleneck) if len(bottleneck) else None
        self.posterior = Posterior(bottleneck.shape[1]).to(bottleneck.dtype) if variational else None
        self.embedding_norm = embedding_norm
        self.attention = attention
        # keeping it in float32 in a bfloat16 model would need a separate engine; its logarithm changes slowly enough
        dtype = bottleneck.dtype
        start = None if temperature is None else torch.tensor([math.log(temperature)], dtype=dtype)
        self.log_temperature = None if start is None else nn.Parameter(start)
        self.language_loss = LanguageModelLoss(backbone.get_output_embeddings(), logit_scale(backbone.config))

    @property
    def fast_parameters(self) -> list[nn.Parameter]:
        """The parameters that have their own, higher learning rate."""
        posterior = [] if self.posterior is None else list(self.posterior.parameters())
        alone = (self.bottleneck, self.log_temperature)
        return [*(parameter for parameter in alone if parameter is not None), *posterior]

    def forward(self, row: PackedRow | None, *, task: Literal["learn", "embed", "temperature"], **options: Any) -> Any:
        """One entry point for both stages, since under ZeRO-3 everything must run through the engine's hooks."""
        if row is None:
            assert task == "temperature" and self.log_temperature is not None
            return self.log_temperature.float()[0]
        return self._learn(row, **options) if task == "learn" else self._embed(row, **options)

    def hidden(self, row: PackedRow, injected: Tensor | None = None) -> Tensor:
        """Last hidden states after the final norm, ``[tokens, d]``.

        Args:
            row: a packed row.
            injected: ``[bottleneck tokens of the row, d]``, input embeddings to use instead of the trained ones.
        """
        embed = self.backbone.get_input_embeddings()
        at_bottleneck = row.roles == BOTTLENECK
        # a bottleneck token's id is its index, which is valid in any vocabulary
        inputs = embed(row.input_ids)
        if self.bottleneck is not None:
            values = injected
            if values is None:
                values = self.bottleneck[row.input_ids[at_bottleneck]] * getattr(embed, "embed_scale", 1.0)
            inputs = inputs.masked_scatter(at_bottleneck[:, None], values.to(inputs.dtype))
        output: Tensor = self.backbone.model(
            inputs_embeds=inputs[None],
            position_ids=row.position_ids[None],
            use_cache=False,
            layout=row.layout,
            backend=self.attention,
        )[0]
        return output[0]

    def _score(self, row: PackedRow, hidden: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
        """The weighted sum, and ``[4]``: the sums of the text's and the target's losses, and their token counts."""
        scored = row.labels != NO_LABEL
        kinds = row.loss_kinds[scored]
        each = hidden.new_tensor([weights.text, weights.target], dtype=torch.float32)
        loss, sums = self.language_loss(hidden[scored], row.labels[scored], kinds, each, weights.z)
        return loss, torch.cat([sums, torch.bincount(kinds, minlength=2).to(sums)])

    def _learn(
        self, row: PackedRow, form: str, weights: LossWeights, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Stage 1's loss on a row: the sum over scored tokens, each with the weight of its kind.

        Args:
            row: packed ``[sink x b y]``.
            form: `mask`, `reinject` or `none`.
            weights: the weight of a token of each kind.
            noise: ``[bottleneck tokens of the row, d]`` float32 unit normal, for a variational bottleneck.

        Returns:
            The weighted sum, and (without gradient) ``[5]``: the sums of the text's and of the target's losses, their
            token counts, and the sum of the divergences.
        """
        if form != "reinject":
            loss, sums = self._score(row, self.hidden(row), weights)
            return loss, F.pad(sums, (0, 1))
        first, second = without(row, TARGET), without(row, CONTEXT)
        hidden = self.hidden(first)
        dimension = hidden.shape[1]
        z = F.normalize(hidden[first.roles == BOTTLENECK].float(), dim=1) * dimension**0.5
        divergence = z.new_zeros(())
        if self.posterior is not None:
            z, divergence = self.posterior(z, torch.zeros_like(z) if noise is None else noise)
        injected = z * (self.embedding_norm / dimension**0.5)
        text_loss, text_sums = self._score(first.without_labels(TARGET_LOSS), hidden, weights)
        target_loss, target_sums = self._score(second, self.hidden(second, injected=injected), weights)
        sums = torch.cat([text_sums + target_sums, divergence.detach()[None]])
        return text_loss + target_loss + weights.kl * divergence, sums

    def _embed(self, row: PackedRow, pooling: Pooling) -> Tensor:
        """Embeddings of the row's sequences, not normalised: ``[sequences, d]`` float32, in the order of the spans."""
        hidden = self.hidden(row)
        text, bottleneck, end = row.spans.unbind(1)
        if pooling in ("bottleneck_last", "last"):
            return hidden[(end if pooling == "bottleneck_last" else bottleneck) - 1].float()
        start, stop = (bottleneck, end) if pooling == "bottleneck_mean" else (text, bottleneck)
        counts = stop - start
        sequence = torch.arange(len(counts), device=hidden.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        place = torch.arange(len(sequence), device=hidden.device) + (start - before)[sequence]
        sums = hidden.new_zeros(len(counts), hidden.shape[1], dtype=torch.float32)
        return sums.index_add(0, sequence, hidden[place].float()) / counts.clamp(min=1)[:, None]


def initial_bottleneck(table: Tensor, count: int, settings: EmbeddingSettings | None, seed: int) -> Tensor:
    """``[count, d]`` float32: the model's own if it has them, else the mean embedding plus noise of its spread."""
    if settings is not None and len(settings.bottleneck_ids) == count:
        return table[list(settings.bottleneck_ids)].float()
    generator = torch.Generator().manual_seed(seed)
    rows = table.float()
    return rows.mean(0) + rows.std(0) * torch.randn(count, rows.shape[1], generator=generator)


def load_model(
    config: ModelConfig,
    folder: Path,
    tokenizer: TextTokenizer,
    seed: int,
    sharding: Any = None,
    variational: bool = False,
    temperature: float | None = None,
) -> LBRModel:
    """The model of a stage: the folder's causal LM, with its own bottleneck or a new one.

    Args:
        config: k, dtype, kernel and adapters.
        folder: the base model's folder, or the export of stage 1.
        tokenizer: the folder's tokenizer.
        seed: seed of a new bottleneck and of the adapters.
        sharding: see `load_backbone`.
        variational: see `LBRModel`.
        temperature: see `LBRModel`.

    Raises:
        ModelError: the folder's model, tokenizer or bottleneck doesn't match.
    """
    settings = EmbeddingSettings.read(folder)
    if settings is not None and len(settings.bottleneck_ids) not in (0, config.bottleneck_tokens):
        raise ModelError(
            f"{folder}: found {len(settings.bottleneck_ids)} bottleneck tokens, expected model.bottleneck_tokens = "
            f"{config.bottleneck_tokens}."
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    backbone = load_backbone(folder, dtype, sharding)
    table = embedding_table(folder, backbone)
    tokenizer.check_fits(len(table), folder)
    head = backbone.get_output_embeddings()
    if head is None or head.bias is not None or getattr(backbone.config, "final_logit_softcapping", None):
        raise ModelError(f"{folder}: its LM head has a bias or a soft cap, which stage 1's loss doesn't support.")
    if config.lora.rank:
        add_adapters(backbone, config.lora, seed)
    if config.activation_checkpointing:
        backbone.gradient_checkpointing_enable()
    backbone.train()
    bottleneck = initial_bottleneck(table, config.bottleneck_tokens, settings, seed).to(dtype)
    scale = float(getattr(backbone.get_input_embeddings(), "embed_scale", 1.0))
    norm = float(table.float().norm(dim=1).mean()) * scale
    return LBRModel(backbone, bottleneck, norm, variational, config.attention, temperature)
