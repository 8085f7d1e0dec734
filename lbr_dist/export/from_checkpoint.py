"""Export the model of a checkpoint, without ranks and without a GPU, one tensor at a time.

The model is built on the meta device, where it takes no memory. Each parameter is read when the export asks for it:
trained ones from the checkpoint's shards, frozen ones from the folder that the stage started from. So only `folder.py`
needs to know what an export consists of.
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

_ELEMENTS = 4 << 20  # float32 master weights that are read at a time


def export_checkpoint(folder: Path, manifest: Manifest, config: RunConfig, base: Path, out: Path) -> None:
    """Write the model of a checkpoint, as the stage itself would have written it after this step.

    At most one file of the export (`folder.SHARD_BYTES`) and one more tensor are in memory.

    Args:
        folder: of the checkpoint, already verified.
        manifest: its manifest.
        config: of the run that saved it.
        base: the folder that the stage started from: config, tokenizer, and the frozen weights.
        out: the folder to write; an older one is replaced when the new one is complete.

    Raises:
        CheckpointError: if `base` is not the folder that the stage started from, or the checkpoint has other
            parameters.
        ModelError: if `base` is not a model folder.
    """
    _check_base(base, manifest, config)
    tokenizer = TextTokenizer(base)
    with ShardReader(folder, manifest.parameters, manifest.world_size) as reader:
        model = stored_model(manifest, reader, config, base)
        settings = stage_settings(config, manifest.stage)
        export(model, tokenizer, settings, config, out, Ranks.alone())


def stored_model(manifest: Manifest, reader: ShardReader, config: RunConfig, base: Path) -> LBRModel:
    """The model of a checkpoint in the run's dtype; `engine.whole` reads each parameter from its file.

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
            f"{reader.folder}: its parameters differ from those of the model in {base}: {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. Name the folder that the stage started from."
        )
    for name, parameter in model.named_parameters():
        if name in trained:
            read_from(parameter, partial(_read_trained, reader, name, parameter.shape, dtype))
    _leave_in_base(model, base, dtype)
    return model


def _read_trained(reader: ShardReader, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A parameter, from its master weights. They are larger than it if it is not float32, so they are read in parts."""
    value = torch.empty(shape, dtype=dtype)
    flat = value.view(-1)
    for first in range(0, len(flat), _ELEMENTS):
        for start, piece in reader.pieces("master", name, first, min(first + _ELEMENTS, len(flat))):
            flat[start : start + len(piece)] = piece
    return value


def _leave_in_base(model: LBRModel, base: Path, dtype: torch.dtype) -> None:
    """Have the frozen parameters, if any, read from the folder that the stage started from."""
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
    """Check that `base` is the folder that the stage started from.

    Raises:
        CheckpointError: if it does not exist, or its files differ.
    """
    adapted = config.model.lora.rank > 0
    needed = "config, tokenizer and weights" if adapted else "config and tokenizer"
    advice = "Restore what the stage started from, or name the folder where it is now with --base."
    if not base.is_dir():
        raise CheckpointError(f"{base}: does not exist; {manifest.stage} started from its {needed}. {advice}")
    found = base_identity(base, weights=adapted)
    changed = [name for name in manifest.base if found.get(name) != manifest.base[name]]
    if changed:
        raise CheckpointError(f"{base}: its {', '.join(changed)} is not what {manifest.stage} started from. {advice}")
