"""An export gives one vector everywhere: ours, packed, and plain sentence-transformers', of today and of yesterday."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lbr_dist.encode.encoder import Encoder
from tests import tiny
from tests.unit.export.cases import exported
from tests.unit.export.readers import Reading, read

LLAMA_3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPE: dict[str, Any] = {
    "default": {"rope_type": "default", "rope_theta": 123_456.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 123_456.0, **LLAMA_3},
    "yarn": {"rope_type": "yarn", "rope_theta": 123_456.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "rope_theta": 123_456.0, "factor": 2.5},
    "gemma": {
        "full_attention": {"rope_type": "linear", "rope_theta": 123_456.0, "factor": 2.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2_345.0},
    },
}

LOCAL = ("_name_or_path", "is_local", "local_files_only", "auto_map")

SHORT = list(tiny.texts().values())[:4]
TEXTS = [
    *SHORT,
    " ".join(SHORT),  # longer than the limit of documents
    "Abnormally large heart. " * 40,  # longer than the limits of both, and white space at its end
    "large heart ",
    "\n  small eye",
    "\t\u3000pale  skin\u00a0\n\n",
    "naïve façade — 漢字",
    "x",
]


@dataclass(frozen=True)
class Case:
    """A base, and how it is exported."""

    family: str = "llama"
    rope: str = "default"
    pooling: str = "bottleneck_last"
    tokenizer_class: str | None = None
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        parts = (self.family, self.rope, self.pooling, self.tokenizer_class, self.config and "windowed")
        return "-".join(str(part) for part in parts if part)

    def export(self, data: Path, folder: Path) -> Path:
        base = tiny.write_model(folder / "base", self.family)
        _change(base / "config.json", {"rope_parameters": ROPE[self.rope], **dict(self.config)})
        if self.tokenizer_class is not None:
            _change(base / "tokenizer_config.json", {"tokenizer_class": self.tokenizer_class, "unk_token": "<s>"})
            if self.tokenizer_class == "T5Tokenizer":
                _write_unigram(base)
            _add_rows(base, 200)  # these classes add tokens of their own
        return exported(base, data, folder / "run", self.pooling)[0]


def _change(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _write_unigram(base: Path) -> None:
    """Replace the tokenizer's BPE by a Unigram model over words, as SentencePiece's tokenizers are."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(tiny.texts().values(), trainer)
    tokenizer.save(str(base / "tokenizer.json"))


def _add_rows(base: Path, count: int) -> None:
    weights = load_file(base / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, table[:count].flip(0)])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    _change(base / "config.json", {"vocab_size": len(table) + count})


WINDOWED = (
    ("use_sliding_window", True),
    ("sliding_window", 16),
    ("max_window_layers", 1),
    ("layer_types", ["full_attention", "sliding_attention"]),
)

CASES = [
    *(Case(family, "gemma" if family == "gemma3_text" else "default") for family in tiny.FAMILIES),
    Case("llama", "llama3"),
    Case("qwen3", "yarn"),
    Case("mistral", "linear"),
    Case("qwen2", config=WINDOWED),
    *(Case(pooling=pooling) for pooling in ("bottleneck_mean", "mean", "last")),
    *(Case(tokenizer_class=name) for name in ("GPTNeoXTokenizerFast", "CodeLlamaTokenizer", "T5Tokenizer")),
]


@dataclass(frozen=True)
class Exported:
    """The exported folders of all cases, and what both versions read from them."""

    folders: dict[str, Path]
    readings: dict[str, Reading]


@pytest.fixture(scope="module")
def exports(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folders = {case.name: case.export(tiny_data, tmp_path_factory.mktemp("export")) for case in CASES}
    scratch = tmp_path_factory.mktemp("readings")
    readings = {name: read(name, list(folders.values()), TEXTS, scratch) for name in ("current", "old")}  # type: ignore[arg-type]
    return Exported(folders, readings)


def test_the_old_versions_are_old(exports: Exported) -> None:
    assert exports.readings["old"].transformers == "4.57.3"
    assert exports.readings["current"].transformers.startswith("5.")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_vector_everywhere(exports: Exported, case: Case) -> None:
    folder = exports.folders[case.name]
    encoder = Encoder(folder, dtype="float32", chunk_tokens=192)
    limit = 1 + encoder.settings.max_tokens + len(encoder.settings.bottleneck_ids)
    for which, reading in exports.readings.items():
        # transformers 5 lets no tokenizer of this family strip, and sentence-transformers 5 strips by itself
        alone = case.family == "qwen2" and which == "old"
        for kind in ("query", "document"):
            prompt = encoder.settings.query_prompt if kind == "query" else encoder.settings.document_prompt
            texts = [(prompt + text).strip().removeprefix(prompt) for text in TEXTS] if alone else TEXTS
            expected = encoder.ids(texts, kind)
            assert max(map(len, expected)) == limit, "no text is too long"
            vectors = encoder.encode(texts, kind).numpy()
            assert reading.ids(folder, kind) == expected, which
            np.testing.assert_allclose(reading.vectors(folder, kind), vectors, rtol=0, atol=1e-5, err_msg=which)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_local_and_the_older_names(exports: Exported, case: Case) -> None:
    folder = exports.folders[case.name]
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert not [name for name in LOCAL if name in config or name in tokenizer]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == 123_456.0
    rope = ROPE[case.rope].get("full_attention", ROPE[case.rope])
    if rope["rope_type"] == "default":
        assert config["rope_scaling"] is None
    else:
        assert config["rope_scaling"] == {name: value for name, value in rope.items() if name != "rope_theta"}
    for path in folder.rglob("*.json"):
        assert str(folder.parents[1]) not in path.read_text(), f"{path.name} names a folder of this machine"
