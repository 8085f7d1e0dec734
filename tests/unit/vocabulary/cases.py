"""Corpora of three domains, and what the tests of `lbr_dist/vocabulary/` share."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.vocabulary.add import VocabularyReport

STEMS = ("cardio", "nephro", "hepato", "myo", "neuro", "osteo", "dermato", "encephalo")
ENDS = ("pathy", "megaly", "sclerosis", "trophy", "plasia", "genesis")
RINGS = ("c1ccccc1", "C(=O)O", "C1=CC=CC=C1", "[N+](=O)[O-]", "S(=O)(=O)N")


def prose(generator: random.Random) -> str:
    words = (generator.choice(STEMS) + generator.choice(ENDS) for _ in range(6))
    return f"The heart has {' and '.join(words)}."


def smiles(generator: random.Random) -> str:
    return "".join(generator.choice((*RINGS, "C", "N", "CC(C)")) for _ in range(8))


def code(generator: random.Random) -> str:
    name = generator.choice(("value", "items", "length"))
    return f"def get_{name}(self, key=None):\n    return self._{name}.setdefault(key, 0)"


DOMAINS = {"prose": prose, "smiles": smiles, "code": code}


def write_corpus(file: Path, make: Callable[[random.Random], str], records: int = 400) -> Path:
    generator = random.Random(5)
    rows = ({"id": str(i), "text": make(generator)} for i in range(records))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


Grown = tuple[Path, Path, VocabularyReport]


@functools.cache
def tokenizer_of(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


def new_entries(base: Path, out: Path) -> dict[str, int]:
    old = TextTokenizer(base).hf.get_vocab()
    return {name: i for name, i in TextTokenizer(out).hf.get_vocab().items() if name not in old}


def with_tokenizer(base: Path, tokenizer: Tokenizer, **special: str) -> Path:
    """Replaces a base model's tokenizer with one that is not larger."""
    assert tokenizer.get_vocab_size() <= json.loads((base / "config.json").read_text())["vocab_size"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(base)
    return base
