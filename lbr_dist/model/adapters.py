"""Low-rank adapters by peft: put into the backbone before training, folded into its weights on export."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbr_dist.config import LoraConfig
from lbr_dist.errors import ModelError
from lbr_dist.model.sharding import whole

ADAPTER = "default"


def add_adapters(backbone: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Freeze the backbone and put an adapter beside every linear layer that `lora.targets` names.

    Raises:
        ModelError: the model has no linear layer named like a target.
    """
    import peft

    head = backbone.get_output_embeddings()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    missing = sorted(set(lora.targets) - names)
    if missing:
        raise ModelError(
            f"model.lora.targets: the model has no linear layers named {', '.join(missing)}. "
            f"It has {', '.join(sorted(names))}."
        )
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # every rank starts with the same adapters
        peft.inject_adapter_in_model(settings, backbone, adapter_name=ADAPTER)


def _owners(backbone: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """The model's own parameters, named as in its files, each with the module that holds it."""
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            continue
        path = name.rsplit(".", 1)[0]
        owner = path.removesuffix(".base_layer")
        yield name.replace(".base_layer.", "."), parameter, backbone.get_submodule(owner)


def file_parameters(backbone: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the model without its adapters, by their names in a Hugging Face folder."""
    return [(name, parameter) for name, parameter, _ in _owners(backbone)]


def merged_weights(backbone: nn.Module, keep: bool) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
    """Each parameter of `file_parameters`, gathered, on the CPU, with its adapter folded in.

    Args:
        backbone: the model, sharded or not; every rank must iterate.
        keep: whether this rank wants the values; the others get None.
    """
    for name, parameter, owner in _owners(backbone):
        parts, scale = [parameter], 0.0
        if ADAPTER in getattr(owner, "lora_A", {}) and name.endswith(".weight"):
            parts += [owner.lora_A[ADAPTER].weight, owner.lora_B[ADAPTER].weight]  # type: ignore[index,union-attr]
            scale = owner.scaling[ADAPTER]  # type: ignore[index,assignment]
        # the value gets no name here: it would stay in memory until the next one replaces it
        yield name, parameter, _merged(parts, scale, keep)


def _merged(parts: list[nn.Parameter], scale: float, keep: bool) -> Tensor | None:
    """A copy of the weight, with the product of its adapter's two matrices added, if any; all ranks gather it."""
    with ExitStack() as gathered:
        values = [gathered.enter_context(whole(part)).detach() for part in parts]
        if not keep:
            return None
        tensor = values[0].to("cpu", copy=True)
        if len(values) > 1:
            low, high = (value.cpu().float() for value in values[1:])
            tensor = (tensor.float() + scale * (high @ low)).to(tensor.dtype)
        return tensor
