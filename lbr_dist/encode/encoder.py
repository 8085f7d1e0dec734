"""Encode texts with a model folder, in this process: the exported model's vectors, computed packed, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lbr_dist.config import ModelConfig, sequence_tokens
from lbr_dist.data.packing import TrainingSequence, pack_row
from lbr_dist.data.tokenizer import EmbeddingSettings, TextTokenizer
from lbr_dist.encode.dtype import encoding_dtype
from lbr_dist.errors import ModelError
from lbr_dist.model.bottleneck import load_model
from lbr_dist.model.probe import check_family

Kind = Literal["query", "document"]

Progress = Callable[[int, int], None]


class TextEncoder(Protocol):
    """What the evaluation needs from a model."""

    def encode(self, texts: Sequence[str], kind: Kind, progress: Progress | None = None) -> Tensor: ...


def _chunks(lengths: Sequence[int], chunk_tokens: int) -> Iterator[range]:
    """Ranges of neighbours that fit into a chunk together; `lengths` must be descending."""
    start = used = 0
    for i, length in enumerate(lengths):
        if used + length > chunk_tokens:
            yield range(start, i)
            start, used = i, 0
        used += length
    if start < len(lengths):
        yield range(start, len(lengths))


class Encoder:
    """A model folder, ready to encode.

    Args:
        folder: a model that lbr-dist exported, or any Hugging Face causal LM (mean pooling over the text by default).
        settings: pooling, prompts and lengths to use if the folder has no lbr.json.
        dtype: `auto` is what `encoding_dtype` says.
        chunk_tokens: tokens in a forward pass, packed without padding.

    Raises:
        ModelError: if the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        settings: EmbeddingSettings | None = None,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        chunk_tokens: int = 32768,
    ) -> None:
        own = EmbeddingSettings.read(folder)
        self.settings = own or settings or EmbeddingSettings("mean")
        self._strip = own is None  # an exported tokenizer does it, where transformers lets it
        self.chunk_tokens = chunk_tokens
        check_family(folder, "model")
        self.folder, self.tokenizer = folder, TextTokenizer(folder)
        if dtype == "auto":
            dtype = encoding_dtype(folder)
        k = len(self.settings.bottleneck_ids)
        config = ModelConfig(base=str(folder), bottleneck_tokens=k, dtype=dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(config, folder, self.tokenizer, seed=0).to(self.device).eval()

    def _tokens(self, texts: Sequence[str], kind: Kind) -> list[tuple[int, ...]]:
        prompt = self.settings.query_prompt if kind == "query" else self.settings.document_prompt
        return self.tokenizer.encode([prompt + text for text in texts], self.settings.max_tokens, self._strip)

    def ids(self, texts: Sequence[str], kind: Kind) -> list[tuple[int, ...]]:
        """What the model sees of each text: token ids with sink and bottleneck."""
        sink, bottleneck = (self.tokenizer.sink_id,), self.settings.bottleneck_ids
        return [sink + tokens + bottleneck for tokens in self._tokens(texts, kind)]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], kind: Kind, progress: Progress | None = None) -> Tensor:
        """Unit-norm embeddings, ``[texts, d]`` float32 on the CPU.

        Args:
            texts: without prompts; the prompt of `kind` is prepended.
            kind: `query` or `document`.
            progress: called with the number of texts done and their total.

        Raises:
            ModelError: a text is longer than the model has positions.
        """
        s, k = self.settings, len(self.settings.bottleneck_ids)
        tokens = self._tokens(texts, kind)
        vectors = torch.empty(len(tokens), int(self.model.backbone.config.hidden_size))
        # longest first, so that rows fill well, and running out of memory shows at once
        by_length = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        self._check_positions(max((sequence_tokens(len(t), k) for t in tokens), default=0), kind)
        chunk_tokens = max(self.chunk_tokens, sequence_tokens(s.max_tokens, k))
        done = 0
        for members in _chunks([sequence_tokens(len(tokens[i]), k) for i in by_length], chunk_tokens):
            chosen = [by_length[i] for i in members]
            row = pack_row([TrainingSequence(tokens[i], k) for i in chosen], self.tokenizer.sink_id)
            embedded = self.model(row.to(self.device), task="embed", pooling=s.pooling)
            vectors[torch.tensor(chosen)] = F.normalize(embedded, dim=1).cpu()
            done += len(chosen)
            if progress is not None:
                progress(done, len(tokens))
        return vectors

    def _check_positions(self, longest: int, kind: Kind) -> None:
        positions = getattr(self.model.backbone.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ModelError(
                f"{self.folder}: has {positions} positions (max_position_embeddings in config.json), the longest "
                f"{kind} takes {longest}. Lower max_query_tokens and max_document_tokens in lbr.json, or shorten the "
                "texts."
            )


class SentenceTransformersEncoder:
    """A sentence-transformers folder, encoded by that library, in the dtype and on the device that it would choose."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        from sentence_transformers import SentenceTransformer

        options = {} if dtype is None else {"dtype": dtype}
        where = None if device is None else str(device)
        self.model: Any = SentenceTransformer(str(folder), device=where, trust_remote_code=False, model_kwargs=options)

    def ids(self, text: str, kind: Kind) -> tuple[int, ...]:
        """What the model sees of a text."""
        # its name since version 6
        read = self.model.preprocess if hasattr(self.model, "preprocess") else self.model.tokenize
        features = read([self.model.prompts[kind] + text])
        return tuple(features["input_ids"][0].tolist())

    def encode(self, texts: Sequence[str], kind: Kind, progress: Progress | None = None) -> Tensor:
        """See `Encoder.encode`."""
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        vectors: Tensor = encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors.float().cpu()


def open_encoder(folder: Path, settings: EmbeddingSettings | None = None, chunk_tokens: int = 32768) -> TextEncoder:
    """The encoder for a folder: one that lbr-dist exported, sentence-transformers', or a causal LM with `settings`."""
    if EmbeddingSettings.read(folder) is None and (folder / "modules.json").exists():
        return SentenceTransformersEncoder(folder)
    return Encoder(folder, settings, chunk_tokens=chunk_tokens)
