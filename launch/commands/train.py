"""`lbr run`, `learn` and `represent`: check everything, then run the stages on ranks of our own or as one rank."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lbr_dist.console import Say
from lbr_dist.ranks.rendezvous import started_as

if TYPE_CHECKING:
    from lbr_dist.config import RunConfig, StageName
    from lbr_dist.config.cluster import JobStage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all three."""
    parser.add_argument("config", type=Path, help="YAML config; every field can be overridden by --section.field=value")
    parser.add_argument("--ranks", type=int, help="processes to start here (default: one per GPU, or 2 on a CPU)")
    parser.set_defaults(takes_overrides=True)


def _read(args: argparse.Namespace) -> RunConfig:
    from lbr_dist.config.file import read_config

    overrides = list(args.overrides)
    if args.ranks is not None:
        overrides.append(f"--cluster.ranks={args.ranks}")
    return read_config(args.config, overrides)


def learn(args: argparse.Namespace, say: Say) -> None:
    """`lbr learn`."""
    _train(args, _read(args), ["learn"], say)


def represent(args: argparse.Namespace, say: Say) -> None:
    """`lbr represent`."""
    _train(args, _read(args), ["represent"], say)


def run(args: argparse.Namespace, say: Say) -> None:
    """`lbr run`."""
    _train(args, _read(args), ["learn", "represent", "evaluate"], say)


def _train(args: argparse.Namespace, config: RunConfig, wanted: Sequence[JobStage], say: Say) -> None:
    """Run the wanted stages that have steps and are not finished, and the evaluation if it is wanted."""
    from lbr_dist import preflight
    from lbr_dist.config import STAGES
    from lbr_dist.config.file import settle_dtype, write_config
    from lbr_dist.export.checksums import is_finished
    from lbr_dist.ranks.hardware import count_gpus
    from lbr_dist.status.starts import recorded
    from lbr_dist.storage.lock import run_lock

    gpus = count_gpus()
    asked, config = config.model.dtype, settle_dtype(config, gpus)
    preflight.check_run_folder(config)
    preflight.check_base(Path(config.model.base))
    preflight.check_positions(config)
    preflight.check_prefixes(config)
    preflight.check_offload(config)
    preflight.check_attention(config, gpus)
    place = started_as(config.cluster.ranks)
    if place is not None and place.world_size == 1 and gpus > 1 and config.cluster.ranks is None:
        say(f"note: {place.launcher} started this process as the only rank; --ranks {gpus} uses all {gpus} GPUs")
    ranks = place.world_size if place else preflight.check_ranks(config, gpus)
    first_here = place is None or place.local_rank == 0
    if first_here:
        preflight.check_family(Path(config.model.base))
    preflight.check_data(config)
    evaluates = "evaluate" in wanted
    stages = [stage for stage in STAGES if stage in wanted and config.stage(stage).steps]
    if stages == ["represent"] and config.learn.steps and not (config.learn_export / "lbr.json").exists():
        from lbr_dist.errors import CheckpointError

        raise CheckpointError(
            f"{config.learn_export}: not found. Run `lbr learn` first, or set learn.steps to 0 to start from the base."
        )
    todo: tuple[StageName, ...] = tuple(stage for stage in stages if not is_finished(config, stage))
    if "represent" in todo and first_here:
        preflight.check_plan(config, ranks, place.local_world_size if place else ranks, gpus)
    if todo and first_here:
        preflight.check_disk(config, todo, say)
        preflight.check_dtype(config, asked, gpus, say)
    resolved = config.run_path / "config.yaml"
    all_of_it: list[JobStage] = [*stages]
    if evaluates and config.data.test is not None:  # without test data the model is checked, which takes seconds
        all_of_it.append("evaluate")
    record = partial(recorded, config.run_path, all_of_it, args.given, place.launcher if place else "lbr")
    if place is not None:
        from lbr_dist.launch.worker import evaluate, run_stages

        if "learn" in todo and first_here:
            preflight.check_text(config, say)
        if place.rank == 0:
            write_config(config, resolved)
        speaks = run_stages(config, todo, record)
        if speaks and evaluates:
            with run_lock(config.run_path), record():
                evaluate(config)
        return
    from lbr_dist.launch.local_ranks import run_stage

    with run_lock(config.run_path) as lock, record():
        preflight.check_run_folder(config)
        if "learn" in todo:
            preflight.check_text(config, say)
        write_config(config, resolved)
        for stage in stages:
            if is_finished(config, stage):
                say(f"{stage}: finished before, nothing to do")
                continue
            say(f"{stage}: {config.stage(stage).steps} steps on {ranks} rank{'s' if ranks > 1 else ''}")
            run_stage(stage, resolved, ranks, config.run_path / stage / "logs", lock)
        if evaluates:
            run_stage("evaluate", resolved, 1, config.run_path / "evaluate" / "logs", lock)
