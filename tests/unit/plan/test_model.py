"""Sizes and graphs of models, compared with values that are worked out manually."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lbr_dist.errors import ModelError
from lbr_dist.plan.model import graph_bytes, header_shapes, model_sizes
from tests import tiny
from tests.unit.plan.cases import INNER, KV, LAYER, LAYERS, VOCABULARY, D, model_config


def test_sizes_of_a_7b_model(base: Path) -> None:
    sizes = model_sizes(model_config(base, bottleneck_tokens=8), base)
    assert sizes.layer == LAYER
    assert sizes.elements("head") == sizes.elements("embedding") == VOCABULARY * D
    assert sizes.elements() == LAYERS * LAYER + 2 * VOCABULARY * D + D + 8 * D
    assert sizes.products == LAYERS * (2 * D * D + 2 * D * KV + 3 * D * INNER)


def test_graph_of_a_7b_model(base: Path) -> None:
    graph = graph_bytes(model_config(base), base, "cuda")
    norm = 4 * D + 4 + 2 * D + 2 * D  # the float32 copy, its scale, and the values before and after the weight
    attention = 2 * (2 * D + 2 * KV) + 4 * 28  # q, k, v, output and the log-sum-exp
    mlp = 2 * 4 * INNER  # gate, up, silu(gate), their product
    assert graph.layer == pytest.approx(2 * norm + attention + mlp, rel=1e-3)
    checkpointed = dataclasses.replace(graph, checkpointed=True)
    assert checkpointed.graph(1000) == pytest.approx(1000 * (graph.other + LAYERS * 2 * D))


def test_probabilities_of_short_texts_count_on_a_cpu(base: Path) -> None:
    model = model_config(base)
    none = graph_bytes(model, base, "cpu")
    short = graph_bytes(model, base, "cpu", [128] * 8)
    long = graph_bytes(model, base, "cpu", [2048] * 2)
    assert short.layer - none.layer == 2 * 28 * 128
    assert long.layer == none.layer


def test_headers_are_read_without_weights(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", tied=False)
    shapes = header_shapes(folder)
    assert shapes is not None
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"]
    read = model_sizes(model_config(folder, bottleneck_tokens=4), folder)
    (folder / "model.safetensors").unlink()
    built = model_sizes(model_config(folder, bottleneck_tokens=4), folder)
    assert sorted(map(repr, read.parameters)) == sorted(map(repr, built.parameters))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 40) + b"{")
    with pytest.raises(ModelError, match=r"model\.safetensors: its safetensors header"):
        header_shapes(folder)


def test_a_tied_head_is_not_counted_even_if_the_files_have_it(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", tied=True)
    without = model_sizes(model_config(folder), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert model_sizes(model_config(folder), folder) == without
    assert without.elements("head") == 0
