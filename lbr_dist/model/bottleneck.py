"""The model of both stages: a causal LM, and k bottleneck tokens with embeddings of their own.

The bottleneck's embeddings are a parameter beside the vocabulary, so that they have their own learning rate and
nothing has to be resized while the vocabulary is sharded. The export writes them into the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbr_dist.config import ModelConfig, Pooling
from lbr_dist.data.packing import NO_LABEL, TARGET_LOSS, PackedRows, without
from lbr_dist.errors import ModelError
from lbr_dist.kernels.attention import BOTTLENECK, CONTEXT, TARGET
from lbr_dist.kernels.cross_entropy import linear_cross_entropy
from lbr_dist.model.backbone import RowLayout, embedding_table, load_backbone
from lbr_dist.model.tokens import EmbeddingSettings, TextTokenizer


class LanguageModelLoss(nn.Module):
    """The LM head and its loss as one module, so that ZeRO-3 gathers the head once for all of its chunks."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `linear_cross_entropy`."""
        return linear_cross_entropy(hidden, self.weight, labels, weights)


class LBRModel(nn.Module):
    """Runs packed rows through the LM, for the language-model loss or for the embeddings.

    Args:
        backbone: the causal LM, built by `load_backbone`.
        bottleneck: ``[k, d]`` initial embeddings of the bottleneck tokens.
        embedding_norm: the mean norm of the LM's input embeddings; `reinject` scales its vectors to it.
    """

    def __init__(self, backbone: PreTrainedModel, bottleneck: Tensor, embedding_norm: float) -> None:
        super().__init__()
        self.backbone = backbone
        # a parameter without elements is trouble under ZeRO-3
        self.bottleneck = nn.Parameter(bottleneck) if len(bottleneck) else None
        self.embedding_norm = embedding_norm
        self.language_loss = LanguageModelLoss(backbone.get_output_embeddings())

    @property
    def fast_parameters(self) -> list[nn.Parameter]:
        """What learns at its own, higher rate."""
        return [] if self.bottleneck is None else [self.bottleneck]

    def forward(self, rows: PackedRows, *, task: Literal["learn", "embed"], **options: Any) -> Any:
        """One entry for both stages, since under ZeRO-3 everything must run through the engine's hooks."""
        return self._learn(rows, **options) if task == "learn" else self._embed(rows, **options)

    def hidden(self, rows: PackedRows, injected: Tensor | None = None) -> Tensor:
        """Last hidden states after the final norm, ``[rows, tokens, d]``.

        Args:
            rows: packed rows.
            injected: ``[bottleneck tokens of the rows, d]``, input embeddings in the place of the trained ones.
        """
        embed = self.backbone.get_input_embeddings()
        at_bottleneck = rows.roles == BOTTLENECK
        # a bottleneck token's id is its number, which any vocabulary has
        inputs = embed(rows.input_ids)
        if self.bottleneck is not None:
            values = injected
            if values is None:
                values = self.bottleneck[rows.input_ids[at_bottleneck]] * getattr(embed, "embed_scale", 1.0)
            inputs = inputs.masked_scatter(at_bottleneck[..., None], values.to(inputs.dtype))
        output: Tensor = self.backbone.model(
            inputs_embeds=inputs,
            position_ids=rows.position_ids,
            use_cache=False,
            layout=RowLayout(rows.segment_ids, rows.roles),
        )[0]
        return output

    def _score(self, rows: PackedRows, hidden: Tensor, weights: tuple[float, float]) -> tuple[Tensor, Tensor]:
        scored = rows.labels != NO_LABEL
        is_target = rows.loss_kinds[scored] == TARGET_LOSS
        text_weight, target_weight = weights
        each = torch.where(is_target, target_weight, text_weight).to(torch.float32)
        loss, losses = self.language_loss(hidden[scored], rows.labels[scored], each)
        target, text = losses[is_target], losses[~is_target]
        counts = losses.new_tensor([len(target), len(text)])
        return loss, torch.cat([torch.stack([target.sum(), text.sum()]), counts])

    def _learn(self, rows: PackedRows, form: str, weights: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Stage 1's loss on these rows: the sum over scored tokens, each with the weight of its kind.

        Args:
            rows: packed ``[sink x b y]``.
            form: `mask`, `reinject` or `none`.
            weights: of a text token and of a target token.

        Returns:
            The weighted sum, and (without gradient) ``[4]``: the sums of the target's and of the text's losses,
            and the numbers of their tokens.
        """
        if form != "reinject":
            return self._score(rows, self.hidden(rows), weights)
        first, second = without(rows, TARGET), without(rows, CONTEXT)
        hidden = self.hidden(first)
        z = F.normalize(hidden[first.roles == BOTTLENECK].float(), dim=1) * self.embedding_norm
        text_loss, text_sums = self._score(first.without_labels(TARGET_LOSS), hidden, weights)
        target_loss, target_sums = self._score(second, self.hidden(second, injected=z), weights)
        return text_loss + target_loss, text_sums + target_sums

    def _embed(self, rows: PackedRows, pooling: Pooling) -> Tensor:
        """Embeddings of the rows' sequences, not normalised: ``[sequences, d]`` float32, in the order of the spans."""
        hidden = self.hidden(rows)
        row, text, bottleneck, end = rows.spans.unbind(1)
        if pooling in ("bottleneck_last", "last"):
            column = (end if pooling == "bottleneck_last" else bottleneck) - 1
            return hidden[row, column].float()
        start, stop = (bottleneck, end) if pooling == "bottleneck_mean" else (text, bottleneck)
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        inside = (columns >= start[:, None]) & (columns < stop[:, None])  # [sequences, tokens]
        sequence, column = inside.nonzero(as_tuple=True)
        sums = hidden.new_zeros(len(row), hidden.shape[2], dtype=torch.float32)
        sums = sums.index_add(0, sequence, hidden[row[sequence], column].float())
        return sums / (stop - start).clamp(min=1)[:, None]


def initial_bottleneck(table: Tensor, count: int, settings: EmbeddingSettings | None, seed: int) -> Tensor:
    """``[count, d]`` float32: the rows of a model that has them, or the mean embedding and noise of its spread."""
    if settings is not None and len(settings.bottleneck_ids) == count:
        return table[list(settings.bottleneck_ids)].float()
    generator = torch.Generator().manual_seed(seed)
    rows = table.float()
    return rows.mean(0) + rows.std(0) * torch.randn(count, rows.shape[1], generator=generator)


def load_model(
    config: ModelConfig, folder: Path, tokenizer: TextTokenizer, seed: int, sharding: Any = None
) -> LBRModel:
    """The model of a stage: the folder's causal LM, and its bottleneck or a new one.

    Args:
        config: k and dtype.
        folder: the base model's folder, or the export of stage 1.
        tokenizer: the folder's tokenizer.
        seed: of a new bottleneck.
        sharding: see `load_backbone`.

    Raises:
        ModelError: the folder's model, tokenizer or bottleneck don't fit.
    """
    settings = EmbeddingSettings.read(folder)
    if settings is not None and len(settings.bottleneck_ids) not in (0, config.bottleneck_tokens):
        raise ModelError(
            f"{folder}: has {len(settings.bottleneck_ids)} bottleneck tokens, model.bottleneck_tokens is "
            f"{config.bottleneck_tokens}."
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    backbone = load_backbone(folder, dtype, sharding)
    table = embedding_table(folder, backbone)
    tokenizer.check_fits(len(table), folder)
    head = backbone.get_output_embeddings()
    if head is None or head.bias is not None or getattr(backbone.config, "final_logit_softcapping", None):
        raise ModelError(f"{folder}: its LM head has a bias or a soft cap, which stage 1's loss does not know.")
    if config.activation_checkpointing:
        backbone.gradient_checkpointing_enable()
    backbone.train()
    bottleneck = initial_bottleneck(table, config.bottleneck_tokens, settings, seed).to(dtype)
    scale = float(getattr(backbone.get_input_embeddings(), "embed_scale", 1.0))
    return LBRModel(backbone, bottleneck, float(table.float().norm(dim=1).mean()) * scale)
