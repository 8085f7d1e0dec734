"""The planner's pure parts: sizes by hand, monotone choices, and messages."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lbr_dist.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, RepresentConfig, RunConfig
from lbr_dist.errors import ConfigError, ModelError
from lbr_dist.launch.cli import main
from lbr_dist.plan.cost import StepCost
from lbr_dist.plan.machine import MACHINES, Cluster
from lbr_dist.plan.model import graph_bytes, header_shapes, model_sizes
from lbr_dist.plan.planner import StepPlanner
from tests import tiny

GIB = 2**30
D, INNER, LAYERS, VOCABULARY, KV = 3584, 18944, 28, 152064, 512
LAYER = 2 * D * D + 2 * D * KV + 3 * D * INNER + 2 * D + D + 2 * KV
"""Elements of a layer of Qwen2.5-7B: its projections, two norms, three biases."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of Qwen2.5-7B alone."""
    folder = tmp_path_factory.mktemp("qwen")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": D,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planner(base: Path, ranks: int = 64, gib: float = 72.0, **sections: Any) -> StepPlanner:
    model = sections.pop("model", ModelConfig(base=str(base)))
    represent = RepresentConfig(**({"batch_pairs": 4096, "chunk_tokens": 8192} | sections.pop("represent", {})))
    engine = EngineConfig(**sections.pop("engine", {}))
    data = DataConfig(corpus="none", train="none", max_query_tokens=64, max_document_tokens=512)
    config = RunConfig(
        run_dir="none", domain="none", model=model, data=data, represent=represent, engine=engine, **sections
    )
    cluster = Cluster(MACHINES["h100"], ranks, min(8, ranks))
    return StepPlanner(config, model_sizes(model, base), graph_bytes(model, base, "cuda"), cluster, gib * GIB)


def test_sizes_of_a_7b_by_hand(base: Path) -> None:
    sizes = model_sizes(ModelConfig(base=str(base), bottleneck_tokens=8), base)
    assert sizes.layer == LAYER
    assert sizes.elements("head") == sizes.elements("embedding") == VOCABULARY * D
    assert sizes.elements() == LAYERS * LAYER + 2 * VOCABULARY * D + D + 8 * D
    assert sizes.products == LAYERS * (2 * D * D + 2 * D * KV + 3 * D * INNER)


def test_graph_of_a_7b_by_hand(base: Path) -> None:
    graph = graph_bytes(ModelConfig(base=str(base)), base, "cuda")
    norm = 4 * D + 4 + 2 * D + 2 * D  # the float32 copy, its scale, before and after the weight
    attention = 2 * (2 * D + 2 * KV) + 4 * 28  # q, k, v, output and the log-sum-exp
    mlp = 2 * 4 * INNER  # gate, up, silu(gate), their product
    assert graph.layer == pytest.approx(2 * norm + attention + mlp, rel=1e-3)
    checkpointed = dataclasses.replace(graph, checkpointed=True)
    assert checkpointed.graph(1000) == pytest.approx(1000 * (graph.other + LAYERS * 2 * D))


def test_probabilities_of_short_texts_count_on_a_cpu(base: Path) -> None:
    model = ModelConfig(base=str(base))
    none = graph_bytes(model, base, "cpu")
    short = graph_bytes(model, base, "cpu", [128] * 8)
    long = graph_bytes(model, base, "cpu", [2048] * 2)
    assert short.layer - none.layer == 2 * 28 * 128
    assert long.layer == none.layer


def test_what_stands_in_memory(base: Path) -> None:
    held, host = planner(base).standing(planner(base).config, model_sizes(ModelConfig(base=str(base)), base), 64)
    elements = model_sizes(ModelConfig(base=str(base)), base).elements()
    assert held["parameters: shards"] == pytest.approx(2 * elements / 64, rel=1e-4)
    assert held["optimizer: master weights and two moments"] == pytest.approx(12 * elements / 64, rel=1e-4)
    assert host == 0
    plan = StepCost(planner(base, engine={"offload_optimizer": "cpu", "offload_parameters": "cpu"})).plan()
    assert plan.memory["parameters: shards"] == plan.memory["optimizer: master weights and two moments"] == 0
    assert plan.host == pytest.approx(16 * elements / 64, rel=1e-4)


def test_adapters_alone_have_gradients_and_states(base: Path) -> None:
    model = ModelConfig(base=str(base), bottleneck_tokens=8, lora=LoraConfig(rank=16, targets=("q_proj", "down_proj")))
    sizes = model_sizes(model, base)
    assert sizes.elements(trained=True) == LAYERS * 16 * (2 * D + D + INNER) + 8 * D
    plan = StepCost(planner(base, model=model)).plan()
    assert plan.memory["gradients: whole, of all chunks"] == 2 * sizes.elements(trained=True)


def test_more_memory_never_keeps_fewer_graphs(base: Path) -> None:
    tokens = [8192, 8000, 7900, 7800, 7000, 7000, 6000]
    kept = [planner(base, represent={"chunk_tokens": 8192}, gib=gib).kept(tokens) for gib in range(80, 600, 20)]
    assert kept == sorted(kept)
    assert kept[0] == 1
    assert kept[-1] == len(tokens)


def test_the_kept_graphs_fit_and_one_more_does_not(base: Path) -> None:
    here = planner(base, gib=200)
    tokens = [8192] * 9
    kept = here.kept(tokens)
    assert 1 < kept < 9
    assert sum(here.memory(tokens, kept, here.batch).values()) <= here.budget
    assert sum(here.memory(tokens, kept + 1, here.batch).values()) > here.budget


def test_graphs_that_are_asked_for_are_kept(base: Path) -> None:
    here = planner(base, represent={"keep_graphs": 3})
    assert here.kept([8192] * 9) == 3
    assert here.kept([8192] * 2) == 2


def test_planned_chunks_hide_a_gather_or_fit(base: Path) -> None:
    checkpointed = ModelConfig(base=str(base), activation_checkpointing=True)
    # 2 bytes of each parameter over 50 GB/s, beside two operations a token at 45 % of the peak: about 9,000 tokens
    assert 8192 < planner(base, model=checkpointed, represent={"chunk_tokens": None}).chunk_tokens <= 10240
    resident = planner(base, model=checkpointed, represent={"chunk_tokens": None}, engine={"live_elements": 10**10})
    assert resident.chunk_tokens == 4096
    assert planner(base, represent={"chunk_tokens": None}, gib=50).chunk_tokens < 5000


def test_operations_of_one_pass_and_of_a_replay(base: Path) -> None:
    def flops(**represent: Any) -> float:
        here = planner(base, gib=2000, represent={"chunk_tokens": 8192} | represent)
        plan = StepCost(here).plan()
        return plan.flops / (here.sizes.products * plan.tokens)

    assert flops() == pytest.approx(6, rel=0.02)
    chunks = StepCost(planner(base, gib=2000)).plan().chunks
    assert flops(keep_graphs=1) == pytest.approx(8 - 2 / chunks, rel=0.02)


def test_parameters_that_stay_are_gathered_once(base: Path) -> None:
    used = model_sizes(ModelConfig(base=str(base)), base).elements("layer", "embedding", "other")
    for live, gathers in ((used + 64 * 1000, 1), (0, None)):
        here = planner(base, gib=2000, engine={"live_elements": live}, represent={"keep_graphs": 2})
        plan = StepCost(here).plan()
        expected = gathers or 3 * plan.chunks - 2
        assert plan.gathers == expected
        received = plan.traffic["parameters"]
        assert received.total == pytest.approx(expected * 2 * used * 63 / 64, rel=1e-3)
        assert received.within == pytest.approx(received.total * 7 / 63, rel=1e-6)


def test_what_cannot_fit_names_what_would(base: Path) -> None:
    with pytest.raises(ConfigError) as error:
        planner(base, represent={"chunk_tokens": 32768}, gib=72)
    message = str(error.value)
    assert "represent.chunk_tokens: a step with one chunk of 32,768 tokens needs" in message
    assert "72.0 GiB may be used" in message
    assert "model.activation_checkpointing true" in message
    chunk = int(message.split("What would fit: represent.chunk_tokens ")[1].split(";")[0])
    planner(base, represent={"chunk_tokens": chunk})
    with pytest.raises(ConfigError, match=r"What would fit: 4 ranks; engine\.offload_optimizer cpu"):
        planner(base, ranks=2, gib=72, model=ModelConfig(base=str(base), activation_checkpointing=True))


def test_the_largest_batch_fits_and_a_larger_one_does_not(base: Path) -> None:
    here = planner(base, ranks=8, represent={"chunk_tokens": 2048})
    pairs = StepCost(here).largest_batch(here.batch)
    StepCost(here).plan(here.batch.of(pairs))
    with pytest.raises(ConfigError, match=rf"represent.batch_pairs: .* At most {pairs:,} pairs fit"):
        StepCost(here).plan(here.batch.of(2 * pairs))


def test_headers_are_read_without_weights(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", tied=False)
    shapes = header_shapes(folder)
    assert shapes is not None
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"]
    read = model_sizes(ModelConfig(base=str(folder), bottleneck_tokens=4), folder)
    (folder / "model.safetensors").unlink()
    built = model_sizes(ModelConfig(base=str(folder), bottleneck_tokens=4), folder)
    assert sorted(map(repr, read.parameters)) == sorted(map(repr, built.parameters))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 40) + b"{")
    with pytest.raises(ModelError, match=r"model\.safetensors: its safetensors header"):
        header_shapes(folder)


def test_a_tied_head_is_no_head_even_where_the_files_have_it(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", tied=True)
    without = model_sizes(ModelConfig(base=str(folder)), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert model_sizes(ModelConfig(base=str(folder)), folder) == without
    assert without.elements("head") == 0


def test_the_command_prints_a_plan(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "launch/configs/medical-7b.yaml", f"--model.base={base}", "--nodes", "8", "--gpu", "h100"]
    arguments += ["--query-tokens", "40", "--document-tokens", "300", "--engine.live_elements=8000000000"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("Memory at the peak", "between nodes", "limit: ", "Weak scaling", "Strong scaling", "Assumed"):
        assert words in printed
    assert "gathered once, whole until the step's end" in printed
    assert "The largest batch that fits" in printed
    assert main([*arguments, "--nodes", "0"]) == 1
    assert "--nodes: found 0" in capsys.readouterr().err
