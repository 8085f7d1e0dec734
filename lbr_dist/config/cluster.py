"""Where the ranks run: the sections `cluster` and `slurm` of a config. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lbr_dist.config.stages import require
from lbr_dist.errors import ConfigError

JobStage = Literal["learn", "represent", "evaluate"]
JOB_STAGES: tuple[JobStage, ...] = ("learn", "represent", "evaluate")
"""What `lbr submit` queues: the two stages, and the evaluation."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY)", re.IGNORECASE)
_MEMORY = re.compile(r"\d+[KMGT]?")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the ranks run."""

    ranks: int | None = None
    """Ranks that `lbr` starts on this machine. Default: one a GPU, or 2 on a CPU. Under torchrun, srun or mpirun it is
    theirs."""

    timeout_minutes: float = 30.0
    """A rank that makes no progress for so long, since it or one that it waits for hangs, ends the run: no step, save,
    measurement, load or export may take longer. Every rank writes its stacks to its log first."""

    def __post_init__(self) -> None:
        if self.ranks is not None:
            require(self.ranks > 0, "cluster.ranks", self.ranks, "a positive number")
        require(self.timeout_minutes > 0, "cluster.timeout_minutes", self.timeout_minutes, "a positive number")


@dataclass(frozen=True)
class SlurmConfig:
    """What `lbr submit` asks of Slurm, for each job of a run's chain."""

    nodes: int = 1
    """Nodes of a stage's job. The evaluation takes one task of one node."""

    gpus_per_node: int | None = None
    """GPUs of each node; a rank is started for each. null: none are asked for, and `tasks_per_node` says how many."""

    gpu_kind: Literal["a100-80g", "h100", "h200", "b200"] | None = None
    """What these GPUs are, for the check of memory before anything is queued. Slurm is not asked for it: that is
    `constraint`, or `extra: {gres: ...}`."""

    tasks_per_node: int | None = None
    """Ranks on each node. Default: one a GPU, or 1."""

    cpus_per_task: int = 4
    """Cores of each rank."""

    memory_per_node: str | None = None
    """Memory of each node, as Slurm writes it: 500G. 0 is all of it; null the partition's default."""

    time_minutes: int = 1440
    """Time limit of a stage's job. A stage that needs longer is requeued, and goes on."""

    evaluate_minutes: int = 120
    """Time limit of the evaluation's job."""

    lead_seconds: int = 300
    """So long before the time limit the ranks are told to save and stop. Longer than a step and a save: once both are
    measured, the ranks stop earlier where they need more."""

    partition: str | None = None
    """Partition; null is the cluster's default. So with the following."""

    account: str | None = None
    """Account that is charged."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that nodes must have."""

    exclude: str | None = None
    """Nodes not to use: gpu[03,07]."""

    reservation: str | None = None
    """Reservation to run in."""

    job_name: str | None = None
    """Name of the jobs, before the stage's. Default: the name of the run folder."""

    extra: dict[str, str] = field(default_factory=dict)
    """More options of sbatch, by their long names: {mail-type: FAIL}. An empty value for one that takes none."""

    modules: tuple[str, ...] = ()
    """Environment modules to load, in order, after `module purge`."""

    setup: tuple[str, ...] = ()
    """Shell lines to run before Python starts: `source /path/venv/bin/activate`. They are run as they are."""

    python: str | None = None
    """Python of the jobs, a path. Default: the one that submits. With a container it is the container's."""

    container: tuple[str, ...] = ()
    """A command that runs what follows it inside a container: [apptainer, exec, --nv, image.sif]."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables for the ranks, NCCL's among them: {NCCL_SOCKET_IFNAME: ib0}. They are written into the run folder: no
    secrets."""

    pass_environment: tuple[str, ...] = ()
    """Names of variables to take along from the shell that submits, beside PATH, HOME, USER, LOGNAME, LANG, LC_ALL, TZ
    and SLURM_CONF. Their values go to Slurm alone and into no file."""

    srun_arguments: tuple[str, ...] = ()
    """More arguments for the srun that starts the ranks: [--cpu-bind=cores]."""

    max_retries: int = 3
    """How often a stage that failed, for a reason that may pass, is tried again; only where it made progress since, or
    on other nodes. Time limits and preemptions don't count, as long as there is progress between them."""

    node_check: bool = True
    """Look at each node before the ranks start (`lbr doctor --node`); nodes that fail are left out of the next try."""

    check_gpus: bool = True
    """The check asks each node's driver for the GPUs that Slurm gave. false where there are none to ask."""

    wait_seconds: int = 60
    """When a rank has ended, the others get so long to end as well before Slurm kills them."""

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_task", "time_minutes", "evaluate_minutes", "lead_seconds", "wait_seconds"):
            require(getattr(self, name) > 0, f"slurm.{name}", getattr(self, name), "a positive number")
        require(self.max_retries >= 0, "slurm.max_retries", self.max_retries, "zero or more")
        for name in ("gpus_per_node", "tasks_per_node"):
            value = getattr(self, name)
            require(value is None or value > 0, f"slurm.{name}", value, "a positive number, or null")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                f"slurm.tasks_per_node: found {self.tasks_per_node} with slurm.gpus_per_node {self.gpus_per_node}. "
                "Each rank drives one GPU: leave it out."
            )
        memory = self.memory_per_node
        fits = memory is None or _MEMORY.fullmatch(memory) is not None
        require(fits, "slurm.memory_per_node", memory, "a number with K, M, G or T: 500G")
        limit = 60 * self.time_minutes
        require(
            self.lead_seconds < limit,
            "slurm.lead_seconds",
            self.lead_seconds,
            f"less than the time limit, {limit} s (slurm.time_minutes {self.time_minutes})",
        )
        for name in ("partition", "account", "qos", "constraint", "exclude", "reservation", "job_name", "python"):
            _printable(f"slurm.{name}", getattr(self, name))
        for name, value in self.extra.items():
            where = f"slurm.extra.{name}"
            require(re.fullmatch(r"[a-z][a-z-]*", name) is not None, "slurm.extra", name, "a long option without `--`")
            require(name not in _OURS, where, value, f"another option: this one is set by {_OURS.get(name)}")
            _printable(where, value)
        for name, value in self.environment.items():
            require(_NAME.fullmatch(name) is not None, "slurm.environment", name, "the name of a variable")
            if _SECRET.search(name):
                raise ConfigError(
                    f"slurm.environment: found {name!r}, whose value would be written into the run folder. Set it in "
                    "your shell, and name it in slurm.pass_environment."
                )
            require("\0" not in value, f"slurm.environment.{name}", value, "a text without NUL")
        for name in self.pass_environment:
            require(_NAME.fullmatch(name) is not None, "slurm.pass_environment", name, "the name of a variable")
        for name in ("modules", "container", "srun_arguments"):
            for value in getattr(self, name):
                _printable(f"slurm.{name}", value)

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


_OURS = {
    "array": "--sweep",
    "chdir": "the run",
    "dependency": "the chain",
    "error": "the run",
    "export": "slurm.pass_environment",
    "job-name": "slurm.job_name",
    "nodes": "slurm.nodes",
    "ntasks": "slurm.tasks_per_node",
    "ntasks-per-node": "slurm.tasks_per_node",
    "open-mode": "the run",
    "output": "the run",
    "requeue": "the chain",
    "no-requeue": "the chain",
    "kill-on-invalid-dep": "the chain",
    "signal": "slurm.lead_seconds",
    "time": "slurm.time_minutes",
}


def _printable(name: str, value: str | None) -> None:
    """Slurm reads its options line by line: what would break a line is refused."""
    require(value is None or value.isprintable(), name, value, "printable characters on one line")
