"""The base model: any Hugging Face causal LM folder, its weights copied in tensor by tensor.

Works for an ordinary model and for one that is being sharded; a rank never holds more than its shards and one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.masking_utils import AttentionMaskInterface

from lbr_dist.errors import ModelError
from lbr_dist.kernels.attention import Backend, bottleneck_attention
from lbr_dist.kernels.layout import BottleneckLayout
from lbr_dist.model.sharding import exact_buffers, full_shape, is_sharded, whole

ATTENTION = "lbr_bottleneck"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: BottleneckLayout,
    backend: Backend = "auto",
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # the batch is one packed row
    output = bottleneck_attention(q, k, v, layout, scale=scaling, window=sliding_window, backend=backend)
    return output[None], None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file. A model folder has config.json, safetensors and a tokenizer."
        ) from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: found a {type(content).__name__}, expected a JSON object.")
    return content


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ModelError: it is damaged, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged, or not safetensors ({error}). Copy or save the model again.") from None


class WeightFiles:
    """The safetensors of a folder, one or many, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        if (folder / WEIGHTS_INDEX).exists():
            self.files = dict(read_json(folder / WEIGHTS_INDEX)["weight_map"])
        elif (folder / WEIGHTS).exists():
            with open_weights(folder / WEIGHTS) as tensors:
                self.files = dict.fromkeys(tensors.keys(), WEIGHTS)
        else:
            raise ModelError(
                f"{folder}: found neither {WEIGHTS} nor {WEIGHTS_INDEX}. Weights are read from safetensors only. "
                "Save the model again with save_pretrained."
            )
        missing = sorted(name for name in set(self.files.values()) if not (folder / name).exists())
        if missing:
            raise ModelError(f"{folder / WEIGHTS_INDEX}: names {', '.join(missing)}, missing in the folder.")
        alone = "embed_tokens.weight" in self.files  # a backbone that was saved without its head
        self.stored = {f"model.{n}" if alone and not n.startswith("lm_head.") else n: n for n in self.files}

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.stored[name]
        with open_weights(self.folder / self.files[stored]) as tensors:
            return tuple(tensors.get_slice(stored).get_shape())

    def read(self, name: str) -> Tensor:
        stored = self.stored[name]
        with open_weights(self.folder / self.files[stored]) as tensors:
            tensor: Tensor = tensors.get_tensor(stored)
            return tensor


def _tied_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """All names that each parameter has in the model, by its first name."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return names


def _copy_weights(model: PreTrainedModel, files: WeightFiles) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources: dict[str, str] = {}
    missing = []
    for name, aliases in _tied_names(model).items():
        source = next((alias for alias in aliases if alias in files), None)
        if source is None:
            missing.append(name)
        else:
            sources[name] = source
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{files.folder}: the weights lack {', '.join(missing[:3])}{more}, which its config.json requires. "
            "The folder's config and weights belong to different models, or the download is incomplete."
        )
    for name, source in sources.items():  # on every rank, before the first collective
        found, expected = files.shape(source), tuple(full_shape(parameters[name]))
        if found != expected:
            raise ModelError(f"{files.folder}: {source} has shape {found}, its config.json requires {expected}.")
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    for name, source in sources.items():
        with whole(parameters[name], write=True) as value:
            # the first rank writes a sharded parameter for all; every rank has its own copy of any other parameter
            if is_first or not is_sharded(parameters[name]):
                value.copy_(files.read(source))


def build_backbone(folder: Path, dtype: torch.dtype, inside: AbstractContextManager[Any]) -> PreTrainedModel:
    """The model of `folder` with our attention, tied as its config says, without its weights.

    Args:
        folder: a Hugging Face causal LM folder; only its config is read.
        dtype: dtype of the weights.
        inside: the context to build it in: for sharding, or the meta device.

    Raises:
        ModelError: not a causal LM.
    """
    read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with inside, no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
            )
    except ValueError as error:
        raise ModelError(f"{folder}: not a causal LM that transformers can build ({error}).") from None
    model.tie_weights()
    return model


def load_backbone(
    folder: Path, dtype: torch.dtype, sharding: AbstractContextManager[None] | None = None
) -> PreTrainedModel:
    """Build the model of `folder` with our attention, and copy its weights in.

    Args:
        folder: a Hugging Face causal LM folder with safetensors.
        dtype: dtype of the weights in memory.
        sharding: `engine.sharded_init(...)`, or None for an ordinary model in this process.

    Raises:
        ModelError: not a causal LM, or its weights don't match the config.
    """
    model = build_backbone(folder, dtype, exact_buffers(sharding) if sharding else nullcontext())
    _copy_weights(model, WeightFiles(folder))
    return model


def embedding_table(folder: Path, model: PreTrainedModel) -> Tensor:
    """The input embeddings as stored in the files of `folder`: ``[vocabulary, d]``, in the files' dtype."""
    weight = model.get_input_embeddings().weight
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    files = WeightFiles(folder)
    return files.read(next(name for name in names if name in files))
