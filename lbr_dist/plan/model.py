"""What a model weighs, without its weights: the sizes of its parameters, and the bytes that a graph keeps of a token.

Sizes come from the headers of the safetensors files, or, where a folder has only its config, from the model on the
meta device. Bytes of a graph are counted, not guessed: the same model with one and with two layers runs forward on the
meta device, and every tensor that backward keeps is weighed.
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
from lbr_dist.storage.headers import tensor_shapes

PROBE_TOKENS = 256
"""Tokens of the row that is weighed. What a graph keeps is linear in them, but for probabilities on a CPU."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the model of stage 2."""

    elements: int
    part: Literal["layer", "embedding", "head", "other"]
    """`layer`: of a decoder layer. `head`: an LM head of its own, which stage 2 never runs."""

    trained: bool = True
    matrix: bool = True
    ends_layer: bool = False
    """Of the last module of a layer: a recomputation stops in it, so that it is still whole for its backward pass."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model's parameters, and what follows from them."""

    parameters: tuple[Parameter, ...]
    hidden: int
    """d, the width of a representation."""

    layers: int
    attention_width: int
    """Query heads times their width."""

    source: str
    """Where the sizes come from, in words."""

    def elements(self, *parts: str, trained: bool | None = None) -> int:
        """Elements of the parameters of these parts (all where none is named)."""
        return sum(
            p.elements
            for p in self.parameters
            if (not parts or p.part in parts) and (trained is None or p.trained == trained)
        )

    @property
    def used(self) -> tuple[Parameter, ...]:
        """What stage 2 runs: all but an LM head of its own."""
        return tuple(p for p in self.parameters if p.part != "head")

    @property
    def products(self) -> int:
        """Elements of the layers' weight matrices: a token costs two operations for each in a forward pass."""
        return sum(p.elements for p in self.parameters if p.part == "layer" and p.matrix)

    @property
    def layer(self) -> int:
        """Elements of one decoder layer."""
        return self.elements("layer") // self.layers


@dataclass(frozen=True, slots=True)
class GraphBytes:
    """Bytes that the graph of a chunk keeps, a token."""

    layer: float
    """Of one decoder layer."""

    other: float
    """Outside of the layers, and what these share."""

    layers: int
    entry: float
    """A layer's input: all that is kept of a layer with activation checkpointing."""

    checkpointed: bool

    def graph(self, tokens: int) -> int:
        """Of a whole chunk."""
        return math.ceil(tokens * (self.other + self.layers * (self.entry if self.checkpointed else self.layer)))

    def running(self, tokens: int) -> int:
        """Beside the graphs, while a chunk runs: one layer's tensors, be they its forward's or its gradients'."""
        return math.ceil(tokens * self.layer)


# ---- parameters -------------------------------------------------------------------------------------------------


def header_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a folder's tensors from the headers of its safetensors, or None where it has none.

    Raises:
        ModelError: a file that the index names is missing, or a header that cannot be read.
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
    return shapes


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
    """The parameters that stage 2 trains a folder's model with: its own, adapters and bottleneck.

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
    # adapters, and the second norm of some families, come after the last projection
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
    """Keeps for backward what an attention kernel keeps, and computes nothing."""

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
    if device == "cuda":  # the keys are laid out anew for each sequence
        index = torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
        k, v = k.index_select(0, index), v.index_select(0, index)
    output: Tensor = _Keeps.apply(q, k, v, device, probabilities)  # type: ignore[no-untyped-call]
    return output[None], None


AttentionInterface.register(PLAN_ATTENTION, _attend)
AttentionMaskInterface.register(PLAN_ATTENTION, lambda *args, **kwargs: None)


def _kept_bytes(config: Any, model: ModelConfig, layers: int, device: Device, probabilities: int) -> int:
    """Bytes that backward keeps of `PROBE_TOKENS` tokens of a model of so many layers, parameters left out."""
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
        # the tensor is held, so that no other takes its storage's place
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
            attention_mask=mask,  # given, so that nobody reads the positions' values for one
            use_cache=False,
            device=device,
            probabilities=probabilities,
        )[0]
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def graph_bytes(model: ModelConfig, folder: Path, device: Device, lengths: Sequence[int] = ()) -> GraphBytes:
    """What the graph of a chunk keeps of each token.

    Args:
        model: dtype, adapters and checkpointing.
        folder: the base model's folder.
        device: `cuda` keeps what flash attention keeps; `cpu` what `causal_tiles` does.
        lengths: tokens of the texts of a typical chunk: on a CPU the probabilities of short texts are kept.

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
