"""Text to token ids: the base model's tokenizer, with the sink before a text and the bottleneck after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lbr_dist.config import DataConfig, Pooling, sequence_tokens
from lbr_dist.errors import ModelError

SETTINGS_FILE = "lbr.json"


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """How an LBR model turns a text into a vector; stored as `lbr.json` in its folder."""

    pooling: Pooling
    bottleneck_ids: tuple[int, ...] = ()
    query_prompt: str = ""
    document_prompt: str = ""
    max_query_tokens: int = 64
    max_document_tokens: int = 512

    @staticmethod
    def of(data: DataConfig, pooling: Pooling, bottleneck_ids: tuple[int, ...] = ()) -> EmbeddingSettings:
        return EmbeddingSettings(
            pooling,
            bottleneck_ids,
            data.query_prompt,
            data.document_prompt,
            data.max_query_tokens,
            data.max_document_tokens,
        )

    def write(self, folder: Path) -> None:
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> EmbeddingSettings | None:
        """The settings of a model folder, or None if it has no `lbr.json`.

        Raises:
            ModelError: `lbr.json` exists, but is not in our format.
        """
        path = folder / SETTINGS_FILE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["bottleneck_ids"] = tuple(content["bottleneck_ids"])
            return EmbeddingSettings(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{path}: found no settings that this version can read ({error}). Export the model again."
            ) from None


def bottleneck_token(j: int) -> str:
    """The text of the j-th bottleneck token, counted from 1."""
    return f"<|bottleneck_{j}|>"


class TextTokenizer:
    """A folder's tokenizer. It gives bare ids: packing.py adds sink and bottleneck."""

    def __init__(self, folder: Path) -> None:
        try:
            self.hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (ValueError, OSError) as error:
            raise ModelError(f"{folder}: found no tokenizer that transformers can load ({error}).") from None
        if not self.hf.is_fast:
            raise ModelError(f"{folder}: its tokenizer has no tokenizer.json. Save it again as a fast tokenizer.")
        first = (self.hf.bos_token_id, self.hf.eos_token_id, self.hf.pad_token_id, 0)
        self.sink_id: int = next(i for i in first if i is not None)
        dropped = (self.hf.unk_token_id, self.hf.pad_token_id, self.hf.eos_token_id, 0)
        self.drop_id: int = next(i for i in dropped if i is not None)

    @property
    def highest_id(self) -> int:
        return max(int(i) for i in self.hf.get_vocab().values())

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[tuple[int, ...]]:
        """Token ids of each text, without special tokens, truncated to `max_tokens`."""
        if not texts:
            return []
        stripped = [text.strip() for text in texts]
        ids = self.hf(stripped, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [tuple(i if max_tokens is None else i[:max_tokens]) for i in ids]

    def check_fits(self, vocabulary: int, folder: Path) -> None:
        """Raises ModelError if the tokenizer can give an id for which the model has no embedding."""
        if self.highest_id >= vocabulary:
            raise ModelError(
                f"{folder}: tokenizer and model disagree: the tokenizer's highest id is {self.highest_id}, the "
                f"model's embeddings end at {vocabulary - 1}. They belong to different models."
            )

    def with_bottleneck(self, count: int, max_tokens: int) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
        """A tokenizer that adds the sink before and the bottleneck after every text.

        Args:
            count: k, the number of bottleneck tokens.
            max_tokens: longer texts are truncated; the bottleneck still follows.

        Returns:
            The tokenizer to export, and the ids of the bottleneck tokens.
        """
        names = [bottleneck_token(j) for j in range(1, count + 1)]
        self.hf.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
        ids = tuple(self.hf.convert_tokens_to_ids(names))
        sink = self.hf.convert_ids_to_tokens(self.sink_id)
        self.hf.backend_tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
            single=[sink, "$A", *names],
            pair=[sink, "$A", "$B", *names],
            special_tokens=[(sink, self.sink_id), *zip(names, ids, strict=True)],
        )
        self.hf.model_max_length = sequence_tokens(max_tokens, count)
        if self.hf.pad_token is None:
            self.hf.pad_token = sink
        self.hf.padding_side = "right"
        return self.hf, ids
