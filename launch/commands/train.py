"""`lbr run`, `learn` and `represent`: check everything, then run the stages on ranks of our own or as one rank."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lbr_dist.console import Say
from lbr_dist.ranks.rendezvous import started_as

if TYPE_CHECKING:
    from lbr_dist.config import RunConfig, StageName


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
    _train(_read(args), ["learn"], say)


def represent(args: argparse.Namespace, say: Say) -> None:
    """`lbr represent`."""
    _train(_read(args), ["represent"], say)


def run(args: argparse.Namespace, say: Say) -> None:
    """`lbr run`."""
    config = _read(args)
    if not _train(config, ["learn", "represent"], say):
        return
    if started_as(config.cluster.ranks) is not None:
        from lbr_dist.launch.worker import evaluate as evaluate_here

        evaluate_here(config)
        return
    from lbr_dist.launch.local_ranks import run_stage

    logs = config.report_path if config.data.test is not None else config.run_path
    run_stage("evaluate", config.run_path / "config.yaml", 1, logs)


def _train(config: RunConfig, wanted: Sequence[StageName], say: Say) -> bool:
    """Run the wanted stages that have steps and are not finished. Returns whether this process evaluates next."""
    from lbr_dist import preflight
    from lbr_dist.config.file import write_config
    from lbr_dist.export.checksums import is_finished
    from lbr_dist.ranks.hardware import count_gpus

    preflight.check_run_folder(config)
    preflight.check_base(Path(config.model.base))
    preflight.check_prefixes(config)
    preflight.check_offload(config)
    preflight.check_attention(config, count_gpus())
    preflight.check_data(config)
    stages = [stage for stage in wanted if config.stage(stage).steps]
    if stages == ["represent"] and config.learn.steps and not (config.learn_export / "lbr.json").exists():
        from lbr_dist.errors import CheckpointError

        raise CheckpointError(
            f"{config.learn_export}: not found. Run `lbr learn` first, or set learn.steps to 0 to start from the base."
        )
    place = started_as(config.cluster.ranks)
    gpus = count_gpus()
    ranks = place.world_size if place else preflight.check_ranks(config, gpus)
    first_here = place is None or place.local_rank == 0
    todo: tuple[StageName, ...] = tuple(stage for stage in stages if not is_finished(config, stage))
    if "represent" in todo and first_here:
        preflight.check_plan(config, ranks, place.local_world_size if place else ranks, gpus)
    if todo and first_here:
        preflight.check_disk(config, todo, say)
    resolved = config.run_path / "config.yaml"
    if place is not None:
        from lbr_dist.launch.worker import run_stages

        if "learn" in todo and first_here:
            preflight.check_text(config, say)
        if place.rank == 0:
            write_config(config, resolved)
        return run_stages(config, todo)
    from lbr_dist.launch.local_ranks import run_stage
    from lbr_dist.storage.lock import run_lock

    with run_lock(config.run_path) as lock:
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
    return True
