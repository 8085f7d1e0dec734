"""A model's memory, computed without its weights: parameter sizes, and the bytes that a graph keeps per token.

Sizes come from the headers of the safetensors files, or, if a folder has only a config, from the model on the meta
device. The bytes of a graph are counted, not estimated: the same model with one and with two layers runs forward on the
meta device, and every tensor that is saved for backward is counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.masking_utils import AttentionMaskInterface

from lbr_dist.config import ModelConfig
from lbr_dist.errors import ModelError
from lbr_dist.kernels.causal_tiles import kept_probabilities
from lbr_dist.kernels.layout import BottleneckLayout
from lbr_dist.model.adapters import add_adapters
from lbr_dist.model.backbone import WEIGHTS, WEIGHTS_INDEX, read_json
from lbr_dist.storage.headers import full_name, tensor_shapes

PROBE_TOKENS = 256
"""Tokens in the row that is measured. A graph is linear in them, except for attention probabilities on a CPU."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of stage 2's model."""

    elements: int
    part: Literal["layer", "embedding", "head", "other"]
    """`layer`: in a decoder layer. `head`: an untied LM head, which stage 2 never runs."""

    trained: bool = True
    matrix: bool = True
    ends_layer: bool = False
    """In the last module of a layer. A recomputation stops there, so this one is still whole for the backward pass."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model's parameters, and the sizes computed from them."""

    parameters: tuple[Parameter, ...]
    hidden: int
    """d, the width of a representation."""

    layers: int
    attention_width: int
    """Query heads times their width."""

    source: str
    """Where the sizes come from, for people."""

    def elements(self, *parts: str, trained: bool | None = None) -> int:
        """Elements of the parameters in these parts (all parts if none is named)."""
        return sum(
            p.elements
            for p in self.parameters
            if (not parts or p.part in parts) and (trained is None or p.trained == trained)
        )

    @property
    def used(self) -> tuple[Parameter, ...]:
        """What stage 2 runs: all but an untied LM head."""
        return tuple(p for p in self.parameters if p.part != "head")

    @property
    def products(self) -> int:
        """Elements of the layers' weight matrices. In a forward pass a token costs two operations for each."""
        return sum(p.elements for p in self.parameters if p.part == "layer" and p.matrix)

    @property
    def layer(self) -> int:
        """Elements of one decoder layer."""
        return self.elements("layer") // self.layers


@dataclass(frozen=True, slots=True)
class GraphBytes:
    """Bytes per token that the graph of a chunk keeps."""

    layer: float
    """In one decoder layer."""

    other: float
    """Outside the layers, or shared by them."""

    layers: int
    entry: float
    """A layer's input: with activation checkpointing, all that is kept of a layer."""

    checkpointed: bool

    def graph(self, tokens: int) -> int:
        """Bytes of the graph of a chunk with this many tokens."""
        return math.ceil(tokens * (self.other + self.layers * (self.entry if self.checkpointed else self.layer)))

    def running(self, tokens: int) -> int:
        """Bytes beside the graphs while a chunk runs: one layer's tensors, in forward or as gradients in backward."""
        return math.ceil(tokens * self.layer)


# ---- parameters -------------------------------------------------------------------------------------------------


def header_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a folder's tensors, from the headers of its safetensors files; None if it has none.

    Raises:
        ModelError: a file that the index names is missing, or a header cannot be read.
    """
    if (folder / WEIGHTS_INDEX).exists():
        files = sorted(set(read_json(folder / WEIGHTS_INDEX)["weight_map"].values()))
    elif (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    else:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        shapes |= tensor_shapes(folder / name)
    return {full_name(name, shapes): shape for name, shape in shapes.items()}


def _hf_config(folder: Path) -> Any:
    read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(f"{folder}: not a causal LM that transformers can build ({error}).") from None


def _meta_model(config: Any, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    return model


def _part(name: str, head: str) -> Literal["layer", "embedding", "head", "other"]:
    if name == head:
        return "head"
    if ".layers." in name:
        return "layer"
    return "embedding" if "embed_tokens" in name or ".wte." in name else "other"


def model_sizes(model: ModelConfig, folder: Path) -> ModelSizes:
    """All parameters of a folder's model in stage 2: its own, the adapters' and the bottleneck's.

    Raises:
        ModelError: the folder is not a causal LM.
    """
    config = _hf_config(folder)
    shapes, source = header_shapes(folder), "headers of the safetensors files"
    if shapes is None:
        built = _meta_model(config, torch.bfloat16, PLAN_ATTENTION)
        shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
        source = "config.json, built on the meta device"
    if config.tie_word_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    rank = model.lora.rank
    # with adapters, or in families with a second norm, the last projection is not the last module of a layer
    projection_ends = not rank and not any("post_feedforward" in name for name in shapes)
    parameters = []
    for name, shape in shapes.items():
        part = _part(name, "lm_head.weight")
        ends = projection_ends and ".down_proj." in name
        parameters.append(Parameter(math.prod(shape), part, not rank, len(shape) > 1, ends))
        if rank and part == "layer" and len(shape) == 2 and name.split(".")[-2] in model.lora.targets:
            parameters += [Parameter(rank * size, "layer") for size in shape]
    if model.bottleneck_tokens:
        parameters.append(Parameter(model.bottleneck_tokens * config.hidden_size, "other"))
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSizes(tuple(parameters), config.hidden_size, config.num_hidden_layers, heads * head_dim, source)


# ---- graphs -----------------------------------------------------------------------------------------------------

PLAN_ATTENTION = "lbr_plan"


class _Keeps(torch.autograd.Function):
    """Saves for backward what an attention kernel saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, device: Device, probabilities: int) -> Tensor:
        output = torch.empty_like(query)
        kept = [output, query.new_empty(query.shape[:2], dtype=torch.float32)]  # flash: and the log-sum-exp
        if device == "cpu":
            kept = [query.new_empty(query.shape[1], probabilities)]
        ctx.save_for_backward(query, key, value, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    device: Device,
    probabilities: int,
    **_: Any,
) -> tuple[Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if device == "cuda":  # keys and values are copied into the order of the sequences
        index = torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
        k, v = k.index_select(0, index), v.index_select(0, index)
    output: Tensor = _Keeps.apply(q, k, v, device, probabilities)  # type: ignore[no-untyped-call]
    return output[None], None


AttentionInterface.register(PLAN_ATTENTION, _attend)
AttentionMaskInterface.register(PLAN_ATTENTION, lambda *args, **kwargs: None)


def _kept_bytes(config: Any, model: ModelConfig, layers: int, device: Device, probabilities: int) -> int:
    """Bytes saved for backward by `PROBE_TOKENS` tokens in a model with this many layers, without parameters."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    dtype: torch.dtype = getattr(torch, model.dtype)
    backbone = _meta_model(config, dtype, PLAN_ATTENTION)
    if model.lora.rank:
        with torch.device("meta"):
            add_adapters(backbone, model.lora, 0)
    backbone.train()
    own = {parameter.untyped_storage()._cdata for parameter in backbone.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # hold the tensor, so that its storage's address is not reused
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"):
        inputs = torch.empty(1, PROBE_TOKENS, config.hidden_size, dtype=dtype)
        positions = torch.empty(1, PROBE_TOKENS, dtype=torch.int64)
        mask = torch.empty(1, PROBE_TOKENS, dtype=torch.bool)
    inputs.requires_grad_(model.lora.rank == 0 or model.bottleneck_tokens > 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = backbone.model(
            inputs_embeds=inputs * 1.0,
            position_ids=positions,
            attention_mask=mask,  # without one, transformers would read the positions, which have no values on meta
            use_cache=False,
            device=device,
            probabilities=probabilities,
        )[0]
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def graph_bytes(model: ModelConfig, folder: Path, device: Device, lengths: Sequence[int] = ()) -> GraphBytes:
    """The bytes that the graph of a chunk keeps per token.

    Args:
        model: gives dtype, adapters and checkpointing.
        folder: the base model's folder.
        device: on `cuda`, attention saves what flash attention saves; on `cpu`, what `causal_tiles` saves.
        lengths: tokens of each text in a typical chunk; on a CPU the probabilities of short texts are saved.

    Raises:
        ModelError: the folder is not a causal LM.
    """
    config = _hf_config(folder)
    layers = config.num_hidden_layers
    probabilities = 0
    if device == "cpu" and lengths:
        layout = BottleneckLayout.from_lengths(context=lengths, bottleneck=0, target=[0] * len(lengths))
        probabilities = round(kept_probabilities(layout) / sum(lengths) * PROBE_TOKENS)
    with torch.enable_grad():
        one, two = (_kept_bytes(config, model, n, device, probabilities) for n in (1, 2))
    width = config.hidden_size * getattr(torch, model.dtype).itemsize
    layer = (two - one) / PROBE_TOKENS
    return GraphBytes(layer, one / PROBE_TOKENS - layer, layers, width, model.activation_checkpointing)
