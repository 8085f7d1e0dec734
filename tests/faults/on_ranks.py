"""Functions that the fault tests run on every rank of a pool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from lbr_dist.checkpoint import shards
from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.checkpoint.resume import resume
from lbr_dist.checkpoint.saver import base_identity
from lbr_dist.config import RunConfig, StageName
from lbr_dist.data.pairs import TrainingPairs
from lbr_dist.data.targets import LearnData
from lbr_dist.engine import Engine
from lbr_dist.model.sharding import whole
from lbr_dist.ranks.group import Ranks
from tests.distributed import on_ranks

State = dict[str, dict[str, Tensor]]


def gathered_state(engine: Engine) -> State:
    """Master weights and moments of all parameters, gathered by DeepSpeed's own functions, and the weights."""
    found: State = {kind: {} for kind in (*shards.KINDS, "weights")}
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        found["master"][name] = safe_get_full_fp32_param(parameter).clone()
        for kind in shards.KINDS[1:]:
            found[kind][name] = safe_get_full_optimizer_state(parameter, kind).clone()
        with whole(parameter) as value:
            found["weights"][name] = value.detach().clone()
    return found


def load(ranks: Ranks, config: RunConfig, stage: StageName) -> tuple[State, dict[str, Any]]:
    """Resume a stage and return its state."""
    engine, _ = on_ranks.open_engine(ranks, config, stage)
    checkpoints = Checkpoints(config.stage_path(stage) / "checkpoints")
    identity = base_identity(config.stage_base(stage), weights=config.model.lora.rank > 0)
    state = resume(engine, checkpoints, ranks, config, identity)
    assert state is not None
    found = gathered_state(engine)
    engine.close()
    return found, state


def train(ranks: Ranks, config: RunConfig, stage: StageName) -> tuple[State, list[int]]:
    """Run a stage; return its state at the end, and the numbers of the batches that it drew for its steps."""
    kept: list[State] = []
    drawn: list[int] = []
    close = Engine.close

    def closing(engine: Engine) -> None:
        kept.append(gathered_state(engine))
        close(engine)

    owner: Any = LearnData if stage == "learn" else TrainingPairs
    original = owner.batch

    def batch(self: Any, *arguments: Any) -> Any:
        # learn: settings, bottleneck, step, seed; represent: settings, number, seed
        if sys._getframe(2).f_code.co_name == "optimizer_step" or sys._getframe(3).f_code.co_name == "optimizer_step":
            drawn.append(arguments[-2])
        return original(self, *arguments)

    with mock.patch.object(Engine, "close", closing), mock.patch.object(owner, "batch", batch):
        on_ranks.stage(ranks, config, stage)
    return kept[0], drawn


def save_with_deepspeed(ranks: Ranks, config: RunConfig, folder: Path) -> bool:
    """Resume stage 1, let DeepSpeed save the state in its own format, and convert that to its universal format."""
    engine, _ = on_ranks.open_engine(ranks, config, "learn")
    checkpoints = Checkpoints(config.stage_path("learn") / "checkpoints")
    assert resume(engine, checkpoints, ranks, config, base_identity(Path(config.model.base), weights=False))
    universal = {"universal_checkpoint_version": 0.2}
    engine._engine.save_checkpoint(str(folder), tag="shards", client_state={"universal_checkpoint_info": universal})
    engine.close()
    if ranks.is_first:
        arguments = ["", f"--input_folder={folder / 'shards'}", f"--output_folder={folder / 'universal'}"]
        with mock.patch.object(sys, "argv", [*arguments, "--num_extract_workers=1", "--num_merge_workers=1"]):
            ds_to_universal.main(ds_to_universal.parse_arguments())
    torch.distributed.barrier()
    return True
