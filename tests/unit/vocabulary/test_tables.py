"""The embedding tables of a base model with a larger vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.model.backbone import WeightFiles, load_backbone
from lbr_dist.vocabulary.add import add_vocabulary
from tests import tiny
from tests.unit.vocabulary.cases import (
    Grown,
    new_entries,
)


def mean_of(table: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return torch.stack([table[i].double() for i in ids]).sum(0).div(len(ids)).to(table.dtype)


def check_rows(base: Path, out: Path, name: str) -> None:
    old, new = WeightFiles(base).read(name), WeightFiles(out).read(name)
    before = TextTokenizer(base).hf
    assert torch.equal(new[: len(old)], old) and new.dtype == old.dtype
    entries = new_entries(base, out)
    assert len(new) == len(old) + len(entries) and sorted(entries.values()) == list(range(len(old), len(new)))
    after = TextTokenizer(out).hf
    pieces = {after.decode([i]): i for i in entries.values()}
    for entry in json.loads((out / "vocabulary.json").read_text())["top"]:
        ids = before.convert_tokens_to_ids(entry["replaces"])
        token = pieces[entry["piece"]]
        torch.testing.assert_close(new[token], mean_of(old, ids), rtol=1e-6, atol=1e-8)


def test_new_rows_are_means_and_a_tied_model_stays_tied(grown: Grown) -> None:
    base, out, report = grown
    check_rows(base, out, "model.embed_tokens.weight")
    assert "lm_head.weight" not in WeightFiles(out)
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"vocab_size": report.rows_after}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(WeightFiles(base).files)


def test_an_untied_bf16_model_in_several_files(corpora: dict[str, Path], tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", "qwen3", tied=False)
    weights = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    parts = {
        "a.safetensors": [n for n in weights if n == "lm_head.weight" or ".0." in n],
        "b.safetensors": [n for n in weights if ".1." in n],
        "c.safetensors": [n for n in weights if n.startswith(("model.embed", "model.norm"))],
    }
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, base / file, {"format": "pt"})
    size = sum(value.nbytes for value in weights.values())
    places = {name: file for file, names in parts.items() for name in names}
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": places})
    )
    out = tmp_path / "out"
    add_vocabulary(base, [corpora["prose"]], out, 30)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        check_rows(base, out, name)
    for name in set(weights) - {"model.embed_tokens.weight", "lm_head.weight"}:
        assert torch.equal(WeightFiles(out).read(name), weights[name])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": size + 2 * 30 * 32 * 2}, "weight_map": places}
    assert (out / "b.safetensors").read_bytes() == (base / "b.safetensors").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_of_old_tokens_match_the_base_model(corpora: dict[str, Path], tmp_path: Path, tied: bool) -> None:
    base = tiny.write_model(tmp_path / "base", tied=tied)
    out = tmp_path / "out"
    add_vocabulary(base, [corpora["smiles"]], out, 20)
    (text,) = (t for t in list(tiny.texts().values())[:1])
    ids = torch.tensor(TextTokenizer(base).encode([text]))
    assert TextTokenizer(out).encode([text]) == [tuple(ids[0].tolist())]
    with torch.no_grad():
        before: Any = AutoModelForCausalLM.from_pretrained(base)
        after: Any = AutoModelForCausalLM.from_pretrained(out)
        old, new = before(ids).logits, after(ids).logits
    assert new.shape[-1] == old.shape[-1] + 20
    # the rows have the same bytes; a product of another width may sum in another order
    torch.testing.assert_close(new[..., : old.shape[-1]], old, rtol=1e-6, atol=1e-6)
    ours = load_backbone(out, torch.float32)
    assert torch.equal(ours.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied


def test_spare_rows_of_the_base_are_used_before_the_table_grows(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, torch.full((12, 32), 7.0)])
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": len(table) + 12}))
    few = add_vocabulary(base, [corpora["prose"]], tmp_path / "few", 10)
    assert (few.rows_before, few.rows_after) == (len(table) + 12, len(table) + 12)
    rows = WeightFiles(tmp_path / "few").read("model.embed_tokens.weight")[len(table) :]
    assert (rows == 7.0).all(1).tolist() == [False] * 10 + [True] * 2
    assert add_vocabulary(base, [corpora["prose"]], tmp_path / "more", 15).rows_after == len(table) + 15
