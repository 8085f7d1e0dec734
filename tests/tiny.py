"""Tiny models and data that are real in everything but size: a trained tokenizer, random weights, readable texts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")

ORGANS = ("heart", "kidney", "eye", "ear", "skin", "liver", "lung", "bone", "brain", "hand", "foot", "jaw")
FAULTS = ("large", "small", "absent", "double", "curved", "painful", "pale", "stiff")


def texts() -> dict[str, str]:
    """96 documents of different lengths, one for each organ and fault."""
    return {
        f"d{i * len(FAULTS) + j}": f"Abnormally {fault} {organ}. "
        + f"The {organ} is {fault}{' compared with what is expected' * (j % 3)}."
        for i, organ in enumerate(ORGANS)
        for j, fault in enumerate(FAULTS)
    }


def pairs() -> list[dict[str, object]]:
    """A query for each document, with another document on the same organ as its negative."""
    names = list(texts())
    return [
        {
            "id": f"q{i}",
            "query": f"{FAULTS[i % len(FAULTS)]} {ORGANS[i // len(FAULTS)]}",
            "positive_ids": [name],
            "negative_ids": [names[i - 1 if i % len(FAULTS) else i + 1]],
            "source": "made",
        }
        for i, name in enumerate(names)
    ]


def pieces(texts: list[tuple[int, ...]], longest: int) -> list[tuple[int, ...]]:
    """Token ids cut into pieces of at most `longest`; pieces of one token, which teach nothing, are left out."""
    cut = (text[i : i + longest] for text in texts for i in range(0, len(text), longest))
    return [piece for piece in cut if len(piece) > 1]


def write_data(folder: Path) -> None:
    """Write these texts and pairs as `corpus.jsonl`, `train.jsonl` and `test.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [{"id": name, "text": text} for name, text in texts().items()]
    parts = {"corpus": corpus, "train": pairs()[16:], "test": pairs()[:16]}
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer trained on the texts. Returns its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts().values(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def write_model(folder: Path, family: str = "llama", tied: bool = True) -> Path:
    """Write a two-layer causal LM of a model family, in float32, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder)
    settings = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "mistral":
        settings["sliding_window"] = 16
    if family == "gemma3_text":
        settings |= {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():  # larger than usual, so that a bug changes the output by more than rounding
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder
