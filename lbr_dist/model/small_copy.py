"""A small copy of a base's config, with random weights: a few narrow layers that have one of each kind of the whole.

No weights are read, and the whole model is only built on the meta device.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY, HEADS, HEAD_DIM, WIDTH, WINDOW, POSITIONS = 96, 4, 16, 64, 8, 16
"""Sizes of a small copy. Some texts are longer than its window, and than the positions that it scales its rotary table
from."""

DEEPEST = 64
"""Layers of a small copy at most."""

LARGEST = 2**26
"""Elements of a small copy at most, where a config can't be shrunk further."""


class Unsupported(Exception):
    """Why a family isn't supported, in words that follow "this family is not supported: "."""


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers.

    Raises:
        Unsupported: the model has no `model.layers`.
    """
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise Unsupported(f"{type(model).__name__} keeps no decoder layers in `model.layers`")
    if not hasattr(model.config, "num_hidden_layers"):
        raise Unsupported(f"{type(model.config).__name__} describes more than a language model")
    return layers


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """What a layer is, whatever its number: its modules, and their switches."""
    return tuple(
        (name, type(module), name_, value)
        for name, module in layer.named_modules()
        for name_, value in sorted(vars(module).items(), key=lambda item: item[0])
        if isinstance(value, bool | str | int | None) and "layer" not in name_ and "idx" not in name_
    )


def layers_needed(model: PreTrainedModel) -> int:
    """How many leading layers have one of each kind: 2 or more."""
    kinds = [_kind(layer) for layer in layers_of(model)]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return min(max(1, *firsts) + 1, DEEPEST) if len(firsts) > 1 else 2


def _narrow(config: Any, layers: int, parts: str) -> Any:
    """A copy of a config with fewer layers, and with less of what `parts` names: head_dim, width, vocabulary."""
    whole = config.num_hidden_layers
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == whole and whole != layers:
            setattr(config, name, type(value)(value[:layers]))
    config.num_hidden_layers = layers
    if isinstance(getattr(config, "sliding_window", None), int):
        config.sliding_window = WINDOW
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        # past this position they change their tables
        config.max_position_embeddings = POSITIONS
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = POSITIONS
        rope["original_max_position_embeddings"] = POSITIONS
    if "vocabulary" in parts:
        for name, value in list(vars(config).items()):
            if name.endswith("_token_id") and value is not None:
                setattr(config, name, 0)
        config.vocab_size = VOCABULARY
    if "width" in parts:
        heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if "head_dim" in parts:
            for name, value in list(vars(config).items()):
                if name.endswith("head_dim") and isinstance(value, int):
                    setattr(config, name, min(value, HEAD_DIM))
            head_dim = HEAD_DIM
        config.num_attention_heads = HEADS
        if isinstance(groups, int):
            config.num_key_value_heads = HEADS if groups == heads else 1 if groups == 1 else HEADS // 2
        config.hidden_size = HEADS * head_dim
        for name, value in list(vars(config).items()):
            if name.endswith("intermediate_size") and isinstance(value, int) and value > WIDTH:
                setattr(config, name, WIDTH)
    return config


def build(config: Any, attention: str, device: str = "cpu") -> PreTrainedModel:
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
    return model.eval()


def _stir(model: PreTrainedModel) -> None:
    """Random weights of a size that lets every part of the model count, biases and sinks included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def reference(config: Any, layers: int) -> tuple[Any, PreTrainedModel]:
    """The narrowest small copy that transformers itself can run, with its config.

    Raises:
        Unsupported: it runs none.
    """
    reason = "it is too large to be tried"
    for parts in ("vocabulary width head_dim", "vocabulary width", "vocabulary", ""):
        try:
            small = _narrow(config, layers, parts)
        except Exception as error:
            reason = f"no small copy of its config can be made ({first_line(error)})"
            continue
        try:
            if sum(p.numel() for p in build(small, "eager", "meta").parameters()) > LARGEST:
                continue
            model = build(small, "eager")
            _stir(model)
            with torch.no_grad():
                found = model(torch.arange(40)[None] % 7 + 3, use_cache=False).logits
            if bool(found.isfinite().all()):
                return small, model
            reason = "transformers' own logits are not finite for random weights"
        except Exception as error:  # whatever the family's code raises, it is its reason
            reason = f"transformers itself can't run it without a cache and a mask ({first_line(error)})"
    raise Unsupported(reason)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
