"""A sentence-transformers module: the mean over the bottleneck's states, or over the text's.

Copied into the folders of models that use this pooling. Loading it needs nothing from lbr-dist, but it does need
`SentenceTransformer(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sentence_transformers.models import Module


class SpanMean(Module):  # type: ignore[misc]
    """Mean of the last hidden states over a span of the tokens `[sink, text, bottleneck]` of a right-padded batch.

    Args:
        dimension: width of the hidden states.
        bottleneck_tokens: k, the number of bottleneck tokens at the end.
        span: `bottleneck` (the last k tokens) or `text` (all tokens but the sink and the last k).
    """

    config_keys: ClassVar[list[str]] = ["dimension", "bottleneck_tokens", "span"]

    def __init__(self, dimension: int, bottleneck_tokens: int, span: str) -> None:
        super().__init__()
        self.dimension, self.bottleneck_tokens, self.span = dimension, bottleneck_tokens, span

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        hidden, mask = features["token_embeddings"], features["attention_mask"]
        # right-padded: the number of tokens is the end of the sequence
        end = mask.sum(1, keepdim=True)
        first = end - self.bottleneck_tokens
        columns = torch.arange(hidden.shape[1], device=hidden.device)[None]
        inside = (
            (columns >= first) & (columns < end) if self.span == "bottleneck" else (columns >= 1) & (columns < first)
        )
        weights = inside[..., None].float()
        features["sentence_embedding"] = (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        return features

    def get_embedding_dimension(self) -> int:
        return self.dimension

    def get_sentence_embedding_dimension(self) -> int:
        return self.dimension

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.save_config(output_path)
