"""Bases are right or refused: every family that transformers has, each kind of fault, and files that say more."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lbr_dist.config import ModelConfig
from lbr_dist.data.packing import TrainingSequence, pack_row
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.encode.encoder import Encoder
from lbr_dist.errors import ModelError
from lbr_dist.kernels.attention import bottleneck_attention
from lbr_dist.kernels.layout import BottleneckLayout
from lbr_dist.model import backbone, bottleneck, probe
from lbr_dist.model.bottleneck import LossWeights, load_model
from lbr_dist.plan.model import graph_bytes, model_sizes
from tests import tiny
from tests.unit.model.families import RIGHT, SMALL, TABLE, small_config

# ---- families -----------------------------------------------------------------------------------------------------


def outcome(config: Any) -> str:
    try:
        probe.try_family(config)
    except probe.Unsupported as reason:
        return str(reason)
    return RIGHT


def test_the_table_has_every_family() -> None:
    assert set(TABLE) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("family", TABLE)
def test_a_family_is_right_or_refused(family: str, tmp_path: Path) -> None:
    try:
        config = small_config(family)
    except Exception as error:
        assert re.search(TABLE[family], f"can't build it ({error})")
        return
    found = outcome(config)
    assert re.search(TABLE[family], found), found
    if TABLE[family] == RIGHT:  # then the planner reads it, too
        config.save_pretrained(tmp_path)
        settings = ModelConfig(base=str(tmp_path), dtype="bfloat16")
        assert graph_bytes(settings, tmp_path, "cpu", [20, 30]).layer > 0
        assert model_sizes(settings, tmp_path).layer > 0


ROPE = {"rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "its published size": ("llama", {"hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 128256}, RIGHT),
    "narrow heads": ("gemma3_text", {"num_hidden_layers": 12, "head_dim": 256, "sliding_window": 512}, RIGHT),
    "biases": ("llama", SMALL | {"attention_bias": True, "mlp_bias": True}, RIGHT),
    "yarn": ("qwen2", SMALL | {"rope_parameters": ROPE | {"rope_type": "yarn"}}, RIGHT),
    "dynamic": ("llama", SMALL | {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "longest sequence of the row"),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 4096,
            "rope_parameters": ROPE
            | {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
            | {"original_max_position_embeddings": 4096},
        },
        "longest sequence of the row",
    ),
    "experts in later layers alone": (
        "qwen3_moe",
        SMALL | {"mlp_only_layers": [0, 1, 2], "num_experts": 4, "num_experts_per_tok": 2},
        "mixture of experts",
    ),
    "attention in later layers alone": (
        "qwen3_5_text",
        SMALL | {"layer_types": ["full_attention"] * 3 + ["linear_attention"]},
        r"layer 3: linear_attn \(Qwen3_5GatedDeltaNet\)",
    ),
    "a soft cap of the logits": ("gemma3_text", SMALL | {"final_logit_softcapping": 30.0}, "LM head does more"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_right_or_refused(kind: str) -> None:
    family, settings, expected = KINDS[kind]
    assert re.search(expected, outcome(AutoConfig.for_model(family, **settings)))


# ---- the probe sees each kind of fault ----------------------------------------------------------------------------


def _scale(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return bottleneck_attention(q * 1.01, *args, **kwargs)


def _no_window(*args: Any, **kwargs: Any) -> Tensor:
    return bottleneck_attention(*args, **(kwargs | {"window": None}))


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, layout: BottleneckLayout, **kwargs: Any) -> Tensor:
    whole = BottleneckLayout.from_lengths(context=[layout.tokens], bottleneck=0, target=[0])
    return bottleneck_attention(q, k, v, whole, **kwargs)


def _past(q: Tensor, k: Tensor, v: Tensor, layout: BottleneckLayout, **kwargs: Any) -> Tensor:
    lengths = [n + layout.bottleneck + m for n, m in zip(layout.context, layout.target, strict=True)]
    plain = BottleneckLayout.from_lengths(context=lengths, bottleneck=0, target=[0] * len(lengths))
    return bottleneck_attention(q, k, v, plain, **kwargs)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (_scale, "vector is not the one that transformers gives"),
        (_no_window, "vector is not the one that transformers gives"),
        (_one_sequence, "past the bottleneck"),
        (_past, "past the bottleneck"),
    ],
)
def test_a_fault_of_the_attention_is_seen(fault: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("mistral")
    assert outcome(config) == RIGHT
    monkeypatch.setattr(backbone, "bottleneck_attention", fault)
    assert expected in outcome(config)


def test_a_neighbour_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over the row before each layer's attention, of which only the first token gets something."""

    def mixed(q: Tensor, k: Tensor, v: Tensor, layout: BottleneckLayout, **kwargs: Any) -> Tensor:
        output = bottleneck_attention(q, k, v, layout, **kwargs)
        first = layout.context[0] + layout.bottleneck + layout.target[0]
        return torch.cat([output[: layout.context[0]], output[layout.context[0] : first], output[first:] + v[0].mean()])

    monkeypatch.setattr(backbone, "bottleneck_attention", mixed)
    # the sink is the same in all texts, so nothing of a text passes the bottleneck
    assert "depends on its neighbours" in outcome(small_config("llama"))


def test_a_scale_of_the_logits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck, "logit_scale", lambda config: 1.0)
    for family in ("granite", "cohere", "hyperclovax"):
        assert "LM head does more than a product" in outcome(small_config(family))


def test_an_unknown_argument_is_refused() -> None:
    layout = BottleneckLayout.from_lengths(context=[3], bottleneck=0, target=[0])
    q = torch.randn(1, 2, 3, 8)
    backbone.attend(nn.Linear(1, 1), q, q, q, None, layout=layout, softcap=None, position_ids=q, use_cache=False)
    for name, value in (("softcap", 30.0), ("s_aux", q), ("attention_chunk_size", 16)):
        with pytest.raises(ModelError, match=f"Linear asks for {name}, which our attention doesn't have"):
            backbone.attend(nn.Linear(1, 1), q, q, q, None, layout=layout, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="asks for attention_mask"):
        backbone.attend(nn.Linear(1, 1), q, q, q, q, layout=layout)


# ---- a base's own weights -----------------------------------------------------------------------------------------


def _base(folder: Path, family: str, **settings: Any) -> Path:
    folder.mkdir()
    size = tiny.write_tokenizer(folder)
    config = AutoConfig.for_model(family, **(SMALL | settings | {"vocab_size": size}))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.1}),
        ("cohere", {"logit_scale": 0.0625}),
        ("hyperclovax", {"logits_scaling": 8.0}),
    ],
)
def test_the_loss_of_an_untouched_base_is_that_of_transformers(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = _base(tmp_path / family, family, **settings)
    tokenizer = TextTokenizer(folder)
    text = tokenizer.encode([" ".join(list(tiny.texts().values())[:3])])[0]
    model = load_model(ModelConfig(base=str(folder), bottleneck_tokens=0, dtype="float32"), folder, tokenizer, seed=0)
    row = pack_row([TrainingSequence(text, 0)], tokenizer.sink_id)
    loss, sums = model.eval()(row, task="learn", form="none", weights=LossWeights(1.0, 1.0))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[tokenizer.sink_id, *text]])
    expected = F.cross_entropy(plain(ids).logits[0, 1:-1], ids[0, 2:])
    torch.testing.assert_close(loss / sums[2:4].sum(), expected, rtol=1e-4, atol=1e-4)


def _rewrite(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_backbone_that_was_saved_alone_is_read(tmp_path: Path) -> None:
    """Qwen3-Embedding's layout: the tensors of a causal LM without `model.`, and no head of its own."""
    folder = tiny.write_model(tmp_path / "a", "qwen3")
    texts = list(tiny.texts().values())[:5]
    expected = Encoder(folder).encode(texts, "document")
    _rewrite(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    probe.check_weights(folder)
    assert torch.equal(Encoder(folder).encode(texts, "document"), expected)
    assert model_sizes(ModelConfig(base=str(folder)), folder).layer > 0


def test_a_tensor_that_nothing_takes_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "a")
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(400, 32)}
    _rewrite(folder, lambda tensors: tensors | unused)  # the model computes one, and ties the other
    probe.check_weights(folder)
    _rewrite(folder, lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    for check in (probe.check_weights, Encoder):
        with pytest.raises(
            ModelError, match=r"the weights have model.layers.0.self_attn.q_proj.bias, which .* doesn't"
        ):
            check(folder)


def test_weights_that_need_scales_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "a")
    name = "model.layers.0.mlp.up_proj.weight"
    _rewrite(folder, lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(ModelError, match=rf"{name} is F8_E4M3, expected one of F64, F32, F16, BF16"):
        Encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"config.json: found quantization_config \(fp8\), expected weights that are"):
        Encoder(folder)


def test_a_text_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "a")
    encoder = Encoder(folder)
    encoder.encode(["heart " * 100], "document")
    with pytest.raises(ModelError, match=r"has 512 positions .* the longest document takes 513"):
        encoder.encode(["heart " * 2000], "document")


def test_the_encoder_refuses_a_family(tmp_path: Path) -> None:
    folder = _base(tmp_path / "a", "qwen3_5_text", layer_types=["linear_attention", "full_attention"] * 2)
    with pytest.raises(ModelError, match=r"of the family 'qwen3_5_text', which is not supported: .*GatedDeltaNet"):
        Encoder(folder)
