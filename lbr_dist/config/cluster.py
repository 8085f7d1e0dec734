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
    """Ranks that `lbr` starts on this machine. Default: one per GPU, or 2 on a CPU. Ignored under torchrun, deepspeed,
    mpirun and an srun of several tasks, which start the ranks themselves."""

    timeout_minutes: float = 30.0
    """If a rank makes no progress for this long, because it or a rank that it waits for hangs, the run ends: no step,
    save, measurement, load or export may take longer. Every rank writes its stacks to its log first."""

    def __post_init__(self) -> None:
        if self.ranks is not None:
            require(self.ranks > 0, "cluster.ranks", self.ranks, "a positive number")
        require(self.timeout_minutes > 0, "cluster.timeout_minutes", self.timeout_minutes, "a positive number")


@dataclass(frozen=True)
class SlurmConfig:
    """What `lbr submit` requests from Slurm, for each job in a run's chain."""

    nodes: int = 1
    """Nodes for a stage's job. The evaluation takes one task on one node."""

    gpus_per_node: int | None = None
    """GPUs on each node; a rank is started for each. null: no GPUs are requested, and `tasks_per_node` gives the number
    of ranks."""

    gpu_kind: Literal["a100-80g", "h100", "h200", "b200"] | None = None
    """The kind of these GPUs, to check their memory before anything is queued. It is not requested from Slurm: use
    `constraint` or `extra: {gres: ...}` for that."""

    tasks_per_node: int | None = None
    """Ranks on each node. Default: one per GPU, or 1."""

    cpus_per_task: int = 4
    """Cores for each rank."""

    memory_per_node: str | None = None
    """Memory on each node, in Slurm's notation: 500G. 0: all of it; null: the partition's default."""

    time_minutes: int = 1440
    """Time limit of a stage's job. A stage that needs longer is requeued, and resumes."""

    evaluate_minutes: int = 120
    """Time limit of the evaluation's job."""

    lead_seconds: int = 300
    """The ranks are asked to save and stop this long before the time limit. It should be longer than a step and a save;
    once both have been measured, the ranks stop earlier if they need more."""

    partition: str | None = None
    """Partition. null: the cluster's default, for this field and the next five."""

    account: str | None = None
    """Account to charge."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that the nodes must have."""

    exclude: str | None = None
    """Nodes not to use: gpu[03,07]."""

    reservation: str | None = None
    """Reservation to run in."""

    job_name: str | None = None
    """First part of the jobs' names; the stage's name follows. Default: the name of the run folder."""

    extra: dict[str, str] = field(default_factory=dict)
    """More sbatch options, by their long names: {mail-type: FAIL}. Give an option without a value an empty one."""

    modules: tuple[str, ...] = ()
    """Environment modules to load, in order, after `module purge`."""

    setup: tuple[str, ...] = ()
    """Shell lines to run, unchanged, before Python starts: `source /path/venv/bin/activate`."""

    python: str | None = None
    """Path of the jobs' Python. Default: the Python that runs `lbr submit`. With a container, a path inside it."""

    container: tuple[str, ...] = ()
    """A command that runs what follows it inside a container: [apptainer, exec, --nv, image.sif]."""

    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables for the ranks, such as NCCL's: {NCCL_SOCKET_IFNAME: ib0}. They are written into the run
    folder, so put no secrets here."""

    pass_environment: tuple[str, ...] = ()
    """Names of environment variables to pass on from the submitting shell, besides PATH, HOME, USER, LOGNAME, LANG,
    LC_ALL, TZ and SLURM_CONF. Their values go only to Slurm, and are written to no file."""

    srun_arguments: tuple[str, ...] = ()
    """More arguments for the srun that starts the ranks: [--cpu-bind=cores]."""

    max_retries: int = 3
    """How often a stage is retried that failed for a reason that may pass; only if it made progress since the last
    attempt, or on other nodes. Time limits and preemptions don't count, as long as there is progress between them."""

    node_check: bool = True
    """Check each node before the ranks start (`lbr doctor --node`); the next attempt leaves out nodes that fail."""

    check_gpus: bool = True
    """In that check, ask each node's driver for the GPUs that Slurm allocated. Set to false if there is no driver."""

    wait_seconds: int = 60
    """When a rank has exited, the others get this long to exit too before Slurm kills them."""

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
                "Each rank drives one GPU: leave tasks_per_node out."
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
    """Raises ConfigError for a value that would break a line: Slurm reads its options line by line."""
    require(value is None or value.isprintable(), name, value, "printable characters on one line")
