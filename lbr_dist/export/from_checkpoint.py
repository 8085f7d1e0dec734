"""A model whose weights stay in files: exported from a checkpoint without ranks, without a GPU, a tensor at a time.

The model is built on the meta device, where it holds nothing. Each parameter is read when the export asks for it: what
was trained from the checkpoint's shards, what was frozen from the folder that the stage began with. So the only code
that knows what an export is, is `export.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lbr_dist.checkpoint.manifest import Manifest
from lbr_dist.checkpoint.saver import base_identity
from lbr_dist.checkpoint.shards import ShardReader
from lbr_dist.config import RunConfig
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.errors import CheckpointError, ModelError
from lbr_dist.export.folder import export, stage_settings
from lbr_dist.model.adapters import add_adapters
from lbr_dist.model.backbone import WeightFiles, build_backbone
from lbr_dist.model.bottleneck import LBRModel
from lbr_dist.model.sharding import read_from
from lbr_dist.ranks.group import Ranks

_ELEMENTS = 4 << 20  # of the float32 master weights that are read at a time


def export_checkpoint(folder: Path, manifest: Manifest, config: RunConfig, base: Path, out: Path) -> None:
    """Write the model of a checkpoint, as the stage itself would have written it after this step.

    In memory are at most one file of the export (`export.SHARD_BYTES`) and one tensor more.

    Args:
        folder: of the checkpoint, known to be what was written.
        manifest: its manifest.
        config: the run that saved it.
        base: the folder that the stage began with: config, tokenizer, and the weights that were frozen.
        out: the folder to write; replaced at once, when it is complete.

    Raises:
        CheckpointError: `base` is not the folder that the stage began with, or the checkpoint has other parameters.
        ModelError: `base` is no model folder.
    """
    _check_base(base, manifest, config)
    tokenizer = TextTokenizer(base)
    with ShardReader(folder, manifest.parameters, manifest.world_size) as reader:
        model = stored_model(manifest, reader, config, base)
        settings = stage_settings(config, manifest.stage)
        export(model, tokenizer, settings, config, out, Ranks(0, 1, 0, torch.device("cpu")))


def stored_model(manifest: Manifest, reader: ShardReader, config: RunConfig, base: Path) -> LBRModel:
    """The model of a checkpoint, each parameter to be had from `engine.whole`, of the run's dtype.

    Raises:
        CheckpointError, ModelError: see `export_checkpoint`.
    """
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    backbone = build_backbone(base, dtype, torch.device("meta"))
    with torch.device("meta"):
        if config.model.lora.rank:
            add_adapters(backbone, config.model.lora, config.seed)
        bottleneck = torch.empty(config.model.bottleneck_tokens, backbone.config.hidden_size, dtype=dtype)
        variational = "posterior.weight" in manifest.parameters
        temperature = config.represent.temperature if "log_temperature" in manifest.parameters else None
        model = LBRModel(backbone, bottleneck, 1.0, variational, temperature=temperature)
    trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if trained != manifest.parameters:
        names = sorted(n for n in {**trained, **manifest.parameters} if trained.get(n) != manifest.parameters.get(n))
        raise CheckpointError(
            f"{reader.folder}: holds other parameters than the model of {base} has: {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. Name the folder that the stage began with."
        )
    for name, parameter in model.named_parameters():
        if name in trained:
            read_from(parameter, partial(_read_trained, reader, name, parameter.shape, dtype))
    _leave_in_base(model, base, dtype)
    return model


def _read_trained(reader: ShardReader, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A parameter as its master weights give it; those are read in parts, since they are larger than it is."""
    value = torch.empty(shape, dtype=dtype)
    flat = value.view(-1)
    for first in range(0, len(flat), _ELEMENTS):
        for start, piece in reader.pieces("master", name, first, min(first + _ELEMENTS, len(flat))):
            flat[start : start + len(piece)] = piece
    return value


def _leave_in_base(model: LBRModel, base: Path, dtype: torch.dtype) -> None:
    """Let the frozen parameters, where there are any, be read from the folder that the stage began with."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.backbone.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    files = WeightFiles(base) if frozen else None
    for parameter in frozen:
        assert files is not None
        source = next((name for name in names[id(parameter)] if name in files), None)
        if source is None:
            raise ModelError(f"{base}: the weights lack {names[id(parameter)][0]}, which its config.json asks for.")
        read_from(parameter, partial(_read_frozen, files, source, dtype))


def _read_frozen(files: WeightFiles, name: str, dtype: torch.dtype) -> Tensor:
    return files.read(name).to(dtype)


def _check_base(base: Path, manifest: Manifest, config: RunConfig) -> None:
    """Refuse a folder that is not the one that the stage began with.

    Raises:
        CheckpointError: it is not there, or its files differ.
    """
    adapted = config.model.lora.rank > 0
    needed = "config, tokenizer and weights" if adapted else "config and tokenizer"
    advice = "Put back what the stage began with, or name the folder where that is now with --base."
    if not base.is_dir():
        raise CheckpointError(f"{base}: not there; {manifest.stage} began with its {needed}. {advice}")
    found = base_identity(base, weights=adapted)
    changed = [name for name in manifest.base if found.get(name) != manifest.base[name]]
    if changed:
        raise CheckpointError(f"{base}: its {', '.join(changed)} is not what {manifest.stage} began with. {advice}")
