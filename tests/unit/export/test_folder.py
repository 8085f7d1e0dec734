"""Export round trip: training, `lbr encode` and sentence-transformers give the same vectors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from lbr_dist.config import LoraConfig, ModelConfig
from lbr_dist.data.packing import TrainingSequence, pack_row
from lbr_dist.data.tokenizer import EmbeddingSettings, TextTokenizer
from lbr_dist.encode.encoder import Encoder, open_encoder
from lbr_dist.errors import ModelError
from lbr_dist.export import folder as export_folder
from lbr_dist.model.bottleneck import load_model
from lbr_dist.ranks import group
from tests import tiny
from tests.configs import tiny_run
from tests.distributed import single
from tests.unit.export.cases import TEXTS, exported

POOLINGS = ("bottleneck_last", "bottleneck_mean", "last", "mean")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_round_trip(tiny_model: Path, tiny_data: Path, tmp_path: Path, pooling: str) -> None:
    folder, vectors, _ = exported(tiny_model, tiny_data, tmp_path, pooling)
    encoder = Encoder(folder, dtype="float32", chunk_tokens=192)
    torch.testing.assert_close(encoder.encode(TEXTS, "query"), vectors, rtol=0, atol=1e-5)
    loaded = SentenceTransformer(str(folder), trust_remote_code=False, model_kwargs={"dtype": torch.float32})
    found = torch.tensor(loaded.encode(TEXTS, prompt_name="query"))
    torch.testing.assert_close(found, vectors, rtol=0, atol=1e-5)
    found = torch.tensor(loaded.encode_query(TEXTS))
    torch.testing.assert_close(found, vectors, rtol=0, atol=1e-5)
    documents = encoder.encode(TEXTS, "document")
    assert (documents - vectors).abs().max() > 1e-3, "the query prompt changes nothing"
    torch.testing.assert_close(torch.tensor(loaded.encode_document(TEXTS)), documents, rtol=0, atol=1e-5)
    assert not list(folder.rglob("*.py")) and "trust_remote_code" not in (folder / "README.md").read_text()


def test_adapters_are_folded_in(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The exported folder is an ordinary model without adapters, and gives the vectors of the model with them."""
    lora = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj"))
    model_config = ModelConfig(base=str(tiny_model), bottleneck_tokens=4, dtype="float32", lora=lora)
    config = tiny_run(tmp_path, tiny_model, tiny_data, model=model_config)
    tokenizer = TextTokenizer(tiny_model)
    model = load_model(model_config, tiny_model, tokenizer, seed=1)
    row = pack_row([TrainingSequence(t, 4) for t in tokenizer.encode(TEXTS)], tokenizer.sink_id)

    def vectors() -> torch.Tensor:
        return F.normalize(model(row, task="embed", pooling="bottleneck_last"), dim=1).detach()

    before = vectors()
    single.stir(model.named_parameters())
    after = vectors()
    assert (after - before).abs().max() > 0.05, "the adapters do nothing"
    settings = EmbeddingSettings.of(config.data, "bottleneck_last")
    export_folder.export(model, tokenizer, settings, config, tmp_path / "model", group.start())
    base, weights = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "model"))
    assert set(weights) == set(base)
    changed = {n.split(".")[-2] for n in base if not torch.equal(weights[n][: len(base[n])], base[n])}
    assert changed == {"q_proj", "down_proj"}
    found = Encoder(tmp_path / "model", dtype="float32").encode(TEXTS, "document")
    torch.testing.assert_close(found, after, rtol=0, atol=1e-5)


def test_adapters_for_layers_that_do_not_exist(tiny_model: Path) -> None:
    config = ModelConfig(base=str(tiny_model), dtype="float32", lora=LoraConfig(rank=2, targets=("q_proj", "lm_head")))
    with pytest.raises(ModelError, match=r"no linear layers named lm_head\. It has down_proj, .*, v_proj"):
        load_model(config, tiny_model, TextTokenizer(tiny_model), seed=1)


def test_long_texts_keep_the_bottleneck(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    folder, _, _ = exported(tiny_model, tiny_data, tmp_path, "bottleneck_last")
    long = [" ".join(TEXTS), TEXTS[0]]
    loaded = SentenceTransformer(str(folder), model_kwargs={"dtype": torch.float32})
    encoder = Encoder(folder, dtype="float32", chunk_tokens=96)
    found = torch.tensor(loaded.encode_document(long))
    torch.testing.assert_close(found, encoder.encode(long, "document"), rtol=0, atol=1e-5)
    ids = loaded.tokenizer(long, truncation=True, max_length=loaded.max_seq_length)["input_ids"][0]
    assert tuple(ids[-4:]) == encoder.settings.bottleneck_ids and ids[0] == encoder.tokenizer.sink_id


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_vocabulary(tiny_data: Path, tmp_path: Path, tied: bool) -> None:
    base = tiny.write_model(tmp_path / "base", tied=tied)
    folder, _, _ = exported(base, tiny_data, tmp_path, "bottleneck_last")
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(before) == set(after)
    rows = len(before["model.embed_tokens.weight"])
    for name, tensor in before.items():
        assert torch.equal(after[name][:rows] if "embed" in name or "head" in name else after[name], tensor), name
    settings = EmbeddingSettings.read(folder)
    assert settings is not None and settings.bottleneck_ids == tuple(range(rows, rows + 4))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows + 4
    # and the export can be a base model: stage 2 starts with the rows of stage 1
    again = load_model(
        ModelConfig(base=str(folder), bottleneck_tokens=4, dtype="float32"), folder, TextTokenizer(folder), 9
    )
    assert again.bottleneck is not None
    assert torch.equal(again.bottleneck, after["model.embed_tokens.weight"][rows:])


def test_shards(tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_folder, "SHARD_BYTES", 20_000)
    folder, vectors, _ = exported(tiny_model, tiny_data, tmp_path, "bottleneck_last")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert (
        sum(t.nbytes for f in folder.glob("*.safetensors") for t in load_file(f).values())
        == (index["metadata"]["total_size"])
    )
    encoder = Encoder(folder, dtype="float32", chunk_tokens=96)
    torch.testing.assert_close(encoder.encode(TEXTS, "query"), vectors, rtol=0, atol=1e-5)


def test_other_folders(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    bare = open_encoder(tiny_model, None, 96).encode(TEXTS, "document")
    assert bare.shape == (9, 32)
    folder, vectors, _ = exported(tiny_model, tiny_data, tmp_path, "bottleneck_last")
    (folder / "lbr.json").unlink()  # what is left is any sentence-transformers model
    found = open_encoder(folder, None, 96).encode(TEXTS, "query")
    torch.testing.assert_close(found, vectors, rtol=0, atol=1e-5)


def test_weights_are_of_the_run_s_dtype(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Whatever the model holds in memory; and config.json says the same, under its old and its new name."""
    float32 = ModelConfig(base=str(tiny_model), bottleneck_tokens=4, dtype="float32")
    config = tiny_run(tmp_path, tiny_model, tiny_data, model=dataclasses.replace(float32, dtype="bfloat16"))
    tokenizer = TextTokenizer(tiny_model)
    model = load_model(float32, tiny_model, tokenizer, seed=1)
    settings = EmbeddingSettings.of(config.data, "bottleneck_last")
    export_folder.export(model, tokenizer, settings, config, tmp_path / "model", group.start())
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
