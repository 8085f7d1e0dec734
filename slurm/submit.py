"""`lbr submit`: checks what can be checked on this machine, then queues a run's stages as one chain of jobs."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import lbr_dist
from lbr_dist import preflight
from lbr_dist.config import STAGES, RunConfig, SlurmConfig
from lbr_dist.config.cluster import JOB_STAGES, JobStage
from lbr_dist.config.file import read_config, write_config
from lbr_dist.console import Say, gib, silent
from lbr_dist.data.record_files import record_files
from lbr_dist.errors import ConfigError, LaunchError, LbrError
from lbr_dist.plan.machine import MACHINES
from lbr_dist.slurm import scheduler
from lbr_dist.slurm.journal import Point, Submission, new_folder, submissions
from lbr_dist.slurm.scheduler import SlurmError
from lbr_dist.slurm.script import script
from lbr_dist.status.stages import is_finished, wanted
from lbr_dist.storage.headers import num_elements

LITTLE_TEXT = 16 * 2**20
"""Bytes that a login node tokenises in seconds."""


def run(args: argparse.Namespace, say: Say) -> None:
    """Check and queue a run, or with `--dry-run` print the scripts.

    Raises:
        LbrError: something is refused; then nothing is queued, and the run folder is unchanged.
    """
    overrides = [*args.overrides, *([f"--slurm.nodes={args.nodes}"] if args.nodes is not None else [])]
    whole = read_config(args.config, overrides)
    root = whole.run_path.absolute()
    points = list(sweep(args.config, overrides, args.sweep)) or [("", whole)]
    _check_not_queued(root)
    for label, config in points:
        try:
            # the runs of a sweep are alike: the first one's notes are enough
            check(config, args.first, say if label == points[0][0] else silent)
        except LbrError as error:
            raise type(error)(f"{label}: {error}" if label else str(error)) from None
    stages = [s for s in JOB_STAGES if any(s in left(config, args.first) for _, config in points)]
    if not stages:
        say(f"{root}: all stages are finished, nothing to do")
        return
    texts = _Texts(whole, root, len(points) if args.sweep else 0)
    if args.dry_run:
        for stage in stages:
            say(f"---- {stage}.sh\n{texts.of(stage, root / 'slurm' / 'NNN')}")
        say(f"nothing was queued: {len(points)} run(s), {', '.join(stages)}")
        return
    for _, config in points:
        preflight.check_family(Path(config.model.base))
        check_plan(config)
        if "learn" in left(config, args.first):
            check_little_text(config, say)
    submission = _write(points, root, stages, texts)
    try:
        jobs = _queue(submission, stages, bool(args.sweep))
    except BaseException:
        shutil.rmtree(submission.folder, ignore_errors=True)
        raise
    submission = dataclasses.replace(submission, jobs=jobs)
    submission.write()
    for stage, job in jobs.items():
        say(f"{stage:<10} job {job}   {submission.folder / f'{stage}.sh'}")
    say(f"queued; `lbr status {whole.run_dir}` shows its progress")


# ---- what is checked -----------------------------------------------------------------------------------------------


def left(config: RunConfig, first: JobStage) -> list[JobStage]:
    """The stages of a run that still have to run: from `first` on, the first unfinished one and all after it.

    If stage 2 is finished, stage 1's export is no longer needed, and may have been deleted.
    """
    begin = JOB_STAGES.index(first)
    if config.represent.steps and is_finished(config, "represent"):
        begin = max(begin, JOB_STAGES.index("evaluate"))
    todo = [stage for stage in wanted(config) if JOB_STAGES.index(stage) >= begin]
    return list(itertools.dropwhile(lambda stage: is_finished(config, stage), todo))


def check(config: RunConfig, first: JobStage, say: Say) -> None:
    """Refuse what would fail in the job, as far as this can be checked without a GPU.

    Raises:
        LbrError: see the messages.
    """
    if ":" in str(config.run_path.absolute()):
        raise ConfigError(f"run_dir: found {config.run_dir!r}, expected a path without colons, for PYTHONPATH.")
    preflight.check_run_folder(config)
    preflight.check_base(Path(config.model.base))
    preflight.check_positions(config)
    preflight.check_prefixes(config)
    preflight.check_data(config)
    todo = left(config, first)
    before = [stage for stage in STAGES if config.stage(stage).steps and stage not in todo]
    if todo and before and not is_finished(config, before[-1]):
        raise ConfigError(f"--from {first}: {before[-1]} is not finished in {config.run_dir}. Use --from {before[-1]}.")
    preflight.check_disk(config, [s for s in ("learn", "represent") if s in todo], say)
    check_states(config, say)


def check_states(config: RunConfig, say: Say) -> None:
    """Refuse a model whose weights, gradients and optimizer do not fit into the ranks' memory. Needs no torch.

    Raises:
        ConfigError: names the bytes, and how many nodes are enough.
    """
    slurm = config.slurm
    memory = MACHINES[slurm.gpu_kind].memory if slurm.gpu_kind else _node_bytes(slurm)
    if config.model.lora.rank or memory is None:
        say(f"memory     not checked: {'slurm.gpu_kind is not set' if memory is None else 'adapters need little'}")
        return
    elements = sum(num_elements(file) for file in Path(config.model.base).glob("*.safetensors"))
    offloaded = 12 if config.engine.offload_optimizer != "none" else 0
    needed = elements * (preflight.OPTIMIZER_BYTES - offloaded) / slurm.world_size
    where = slurm.gpu_kind or "node memory per rank"
    say(
        f"memory     {elements / 1e9:.2f}e9 parameters on {slurm.world_size} ranks: weights, gradients and "
        f"optimizer take {gib(needed)} of each rank's {gib(memory)} ({where})"
    )
    if needed > 0.9 * memory:
        ranks = int(elements * (preflight.OPTIMIZER_BYTES - offloaded) / (0.9 * memory)) + 1
        raise ConfigError(
            f"slurm.nodes: found {slurm.nodes}: weights, gradients and optimizer take {gib(needed)} of each "
            f"rank's {gib(memory)}. Use at least {-(-ranks // slurm.ranks_per_node)} nodes, or "
            "set engine.offload_optimizer."
        )


def _node_bytes(slurm: SlurmConfig) -> float | None:
    """A rank's share of its node's memory, on nodes without GPUs; None if the config does not say."""
    text = slurm.memory_per_node
    if text is None or text == "0" or slurm.gpus_per_node:
        return None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1], 2**20)
    return int(text.rstrip("KMGT")) * unit / slurm.ranks_per_node


def check_plan(config: RunConfig) -> None:
    """Refuse a step of stage 2 that does not fit. Takes seconds, since it measures the model's graph with torch.

    Raises:
        ConfigError: names the nearest plans that fit.
    """
    slurm = config.slurm
    if slurm.gpu_kind:
        memory = int(MACHINES[slurm.gpu_kind].memory)
        preflight.check_plan(
            config.with_dtype("bfloat16"), slurm.world_size, slurm.ranks_per_node, slurm.ranks_per_node, memory
        )


def check_little_text(config: RunConfig, say: Say) -> None:
    """Tokenise stage 1's text here if it is short, so that a defect in it shows before a job is queued.

    Raises:
        DataError: names file and line.
    """
    corpus = Path(config.data.learn_corpus or config.data.corpus)
    if sum(file.stat().st_size for file in record_files(corpus)) < LITTLE_TEXT:
        preflight.check_text(config, say)


def _check_not_queued(root: Path) -> None:
    """Raises:
    LaunchError: jobs of an earlier submission are queued or running.
    """
    known = [job for submission in submissions(root) for job in submission.jobs.values()]
    living = [job for job in scheduler.jobs(known, accounting=False).values() if not job.is_over]
    if living:
        raise LaunchError(
            f"{root}: jobs of this run are queued or running: {', '.join(job.id for job in living)}. "
            f"`lbr status` shows them; `lbr cancel` ends them."
        )


# ---- sweeps --------------------------------------------------------------------------------------------------------


def sweep(path: Path, overrides: Sequence[str], given: Sequence[str]) -> Iterator[tuple[str, RunConfig]]:
    """The label and config of each run; each has its own folder inside the run folder.

    Raises:
        ConfigError: a field is unknown, or a value doesn't fit.
    """
    fields: list[list[tuple[str, str]]] = []
    for text in given:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"--sweep: found {text!r}, expected FIELD=V1,V2: --sweep seed=0,1,2")
        if name.split(".")[0] in ("run_dir", "slurm"):
            raise ConfigError(
                f"--sweep: found {name}, expected a training field. A sweep's runs share run_dir and slurm."
            )
        fields.append([(name, value) for value in values.split(",")])
    if not fields:
        return
    root = read_config(path, overrides).run_path
    for chosen in itertools.product(*fields):
        label = " ".join(f"{name}={value}" for name, value in chosen)
        folder = root / "runs" / re.sub(r"[^A-Za-z0-9=.,+-]+", "_", label)
        more = [f"--{name}={value}" for name, value in chosen]
        yield label, dataclasses.replace(read_config(path, [*overrides, *more]), run_dir=str(folder))


# ---- what is written, and queued -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Texts:
    """The scripts of a submission."""

    config: RunConfig
    root: Path
    points: int

    def of(self, stage: JobStage, folder: Path) -> str:
        name = self.config.slurm.job_name or re.sub(r"[^\w.-]+", "-", self.root.name).strip("-") or "lbr"
        return script(self.config.slurm, stage, name, folder, self.root, Path.cwd(), sys.executable, self.points)


def _write(points: list[tuple[str, RunConfig]], root: Path, stages: Sequence[JobStage], texts: _Texts) -> Submission:
    folder = new_folder(root)
    try:
        for index, (_, config) in enumerate(points):
            write_config(config, folder / f"config-{index}.yaml")
        package = Path(lbr_dist.__file__).parent
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        # follows links, so that the snapshot is complete
        shutil.copytree(package, folder / "code" / "lbr_dist", ignore=ignored)
        for stage in stages:
            (folder / f"{stage}.sh").write_text(texts.of(stage, folder), encoding="utf-8")
        labelled = tuple(Point(label, str(config.run_path.absolute())) for label, config in points)
        submission = Submission(folder, os.getcwd(), sys.executable, {}, labelled)
        submission.write()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return submission


def _queue(submission: Submission, stages: Sequence[JobStage], is_sweep: bool) -> dict[JobStage, str]:
    """Queue the jobs, each waiting for the one before; all or none. Returns their ids.

    Raises:
        SlurmError: sbatch refuses a job; the jobs before it are cancelled again.
    """
    settings = read_config(submission.config_file(0)).slurm
    environment = scheduler.minimal_environment(settings.pass_environment)
    jobs: dict[JobStage, str] = {}
    try:
        for stage in stages:
            options = ["--kill-on-invalid-dep=yes"]
            if jobs:
                # in an array, each task waits only for its own run
                kind = "aftercorr" if is_sweep else "afterok"
                options.append(f"--dependency={kind}:{list(jobs.values())[-1]}")
            jobs[stage] = scheduler.submit(str(submission.folder / f"{stage}.sh"), options, environment)
            # at once, so that the jobs are known even if this process dies now
            dataclasses.replace(submission, jobs=dict(jobs)).write()
    except SlurmError as error:
        scheduler.cancel(jobs.values())
        raise SlurmError(f"{error}\nNothing of this run is queued.") from None
    except BaseException:
        scheduler.cancel(jobs.values())
        raise
    return jobs
