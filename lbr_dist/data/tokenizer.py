"""Text to token ids: the base model's tokenizer, with the sink before a text and the bottleneck after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lbr_dist.config import DataConfig, Pooling, sequence_tokens
from lbr_dist.errors import ModelError

SETTINGS_FILE = "lbr.json"

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""What is stripped from both ends of a text: Unicode's White_Space, as the exported tokenizer.json does it."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """How an LBR model turns a text into a vector; stored as `lbr.json` in its folder."""

    pooling: Pooling
    bottleneck_ids: tuple[int, ...] = ()
    query_prompt: str = ""
    document_prompt: str = ""
    max_query_tokens: int = 64
    max_document_tokens: int = 512

    @property
    def is_mean(self) -> bool:
        """Whether the vector is a mean over several tokens."""
        return self.pooling in ("bottleneck_mean", "mean")

    @property
    def max_tokens(self) -> int:
        """Longer texts are cut to this many tokens: queries and documents alike, since most servers know one length."""
        return max(self.max_query_tokens, self.max_document_tokens)

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
        except (ValueError, OSError, TypeError) as error:  # a class whose kind of vocabulary is not the file's
            raise ModelError(f"{folder}: found no tokenizer that transformers can load ({error}).") from None
        if not self.hf.is_fast:
            raise ModelError(f"{folder}: its tokenizer has no tokenizer.json. Save it again as a fast tokenizer.")
        first = (self.hf.bos_token_id, self.hf.eos_token_id, self.hf.pad_token_id, 0)
        self.sink_id: int = next(i for i in first if i is not None)
        dropped = (self.hf.unk_token_id, self.hf.pad_token_id, self.hf.eos_token_id, 0)
        self.drop_id: int = next(i for i in dropped if i is not None)

    @property
    def sink(self) -> tuple[int, str]:
        """The sink's id and text."""
        return self.sink_id, self.hf.convert_ids_to_tokens(self.sink_id)

    @property
    def highest_id(self) -> int:
        return max(int(i) for i in self.hf.get_vocab().values())

    def encode(self, texts: Sequence[str], max_tokens: int | None = None, strip: bool = True) -> list[tuple[int, ...]]:
        """Token ids of each text, without special tokens, truncated to `max_tokens`.

        Args:
            texts: any number of them.
            max_tokens: of each text.
            strip: remove outer white space first. Without it, that is left to the tokenizer, as in other software.
        """
        if not texts:
            return []
        given = [text.strip(WHITE_SPACE) for text in texts] if strip else list(texts)
        ids = self.hf(given, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [tuple(i if max_tokens is None else i[:max_tokens]) for i in ids]

    def check_fits(self, vocabulary: int, folder: Path) -> None:
        """Raises ModelError if the tokenizer can give an id for which the model has no embedding."""
        if self.highest_id >= vocabulary:
            raise ModelError(
                f"{folder}: tokenizer and model disagree: the tokenizer's highest id is {self.highest_id}, the "
                f"model's embeddings end at {vocabulary - 1}. They belong to different models."
            )

    def with_bottleneck(self, count: int) -> tuple[int, ...]:
        """Add k = `count` bottleneck tokens to the vocabulary, as special tokens; returns their ids."""
        names = [bottleneck_token(j) for j in range(1, count + 1)]
        self.hf.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
        return tuple(self.hf.convert_tokens_to_ids(names))

    def write(self, folder: Path, bottleneck_ids: Sequence[int], max_tokens: int) -> None:
        """Write a tokenizer that strips a text, adds the sink before it and the bottleneck after it.

        All of this is in tokenizer.json. Its class is `PreTrainedTokenizerFast`, which every version of transformers
        knows and which takes tokenizer.json as it is. The class of a model family builds parts of it anew, and loses
        the bottleneck.

        Args:
            folder: gets `tokenizer.json` and `tokenizer_config.json`.
            bottleneck_ids: see `with_bottleneck`.
            max_tokens: longer texts are truncated; the bottleneck still follows.
        """
        content = json.loads(self.hf.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        own = content["normalizer"]
        content["normalizer"] = _stripping(own)
        _prepend_always(content["pre_tokenizer"])
        backend = Tokenizer.from_str(json.dumps(content))
        backend.no_padding()
        backend.no_truncation()
        sink, *names = self.hf.convert_ids_to_tokens([self.sink_id, *bottleneck_ids])
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[sink, "$A", *names],
            pair=[sink, "$A", "$B", *names],
            special_tokens=[(sink, self.sink_id), *zip(names, bottleneck_ids, strict=True)],
        )
        backend.save(str(folder / "tokenizer.json"))
        named = {name: str(token) for name in NAMED_TOKENS if (token := getattr(self.hf, name)) is not None}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": sink,
            **named,
            "additional_special_tokens": names,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": sequence_tokens(max_tokens, len(bottleneck_ids)),
            "padding_side": "right",
            "truncation_side": "right",
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": bool(getattr(self.hf, "split_special_tokens", False)),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        # transformers 5 has its own normalizer for a few families (Qwen 2), whatever the folder says: there, no reader
        # of tokenizer.json is to strip, so that all of them still agree
        read = TextTokenizer(folder).hf.backend_tokenizer.normalizer  # type: ignore[attr-defined]
        if read is None or json.loads(read.__getstate__()) != content["normalizer"]:
            content["normalizer"] = own
            backend.normalizer = Tokenizer.from_str(json.dumps(content)).normalizer
            backend.save(str(folder / "tokenizer.json"))


def _stripping(normalizer: dict[str, Any] | None) -> dict[str, Any]:
    """A normalizer of a tokenizer.json that strips first; stage 2 starts from an export, whose normalizer does so."""
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    return {"type": "Sequence", "normalizers": steps if steps[:1] == [strip] else [strip, *steps]}


def _prepend_always(pre_tokenizer: dict[str, Any] | None) -> None:
    """SentencePiece's mark before the first word, if the tokenizer has it, also where white space was stripped."""
    for step in [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "always"
