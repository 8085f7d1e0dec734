"""The batch script of a stage's job: submitit's header and a few lines of ours. sbatch accepts it as it is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from lbr_dist.config import SlurmConfig
from lbr_dist.config.cluster import JobStage
from lbr_dist.slurm.journal import log_file
from lbr_dist.slurm.scheduler import KEPT

# In shell, since `lbr_dist.slurm.job` could neither start nor write its log on such a node.
_ELSEWHERE = r"""
# if the first node cannot use the log, the working folder or Python: requeue the job without that node
elsewhere() {{
    local job={job} bad left
    bad=$(scontrol -o show job "$job" | sed -nE 's/.* ExcNodeList=([^ (]+).*/\1/p')
    bad=$(scontrol show hostnames "$SLURMD_NODENAME${{bad:+,$bad}}" | sort -u)
    left=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o '%N %T' | grep -Ev ' (down|drain|fail|unknown)' | cut -d' ' -f1)
    left=$(sort -u <<<"$left" | grep -cvxF "$bad")
    [ "$left" -ge {nodes} ] && [ "$(wc -l <<<"$bad")" -le $(({most})) ] || exit 1
    scontrol requeue "$job" && scontrol update JobId="$job" ExcNodeList="$(paste -sd, <<<"$bad")"
    sleep 120
    exit 1
}}"""


class _Scripts(SlurmExecutor):  # type: ignore[misc]
    """submitit's script writer, without its pickles: a job runs a command that reads a folder of plain files."""

    @classmethod
    def affinity(cls) -> int:
        return 1  # so that a script can be written on a machine without Slurm

    def text(self, command: str) -> str:
        return str(self._make_submission_file_text(command, ""))


def script(
    settings: SlurmConfig,
    stage: JobStage,
    name: str,
    submission: Path,
    log_root: Path,
    working_folder: Path,
    python: str,
    points: int = 0,
) -> str:
    """The text of a stage's script.

    Args:
        settings: what to ask Slurm for.
        stage: the stage.
        name: the job's name, without the stage.
        submission: the submission's folder.
        log_root: the run folder; the job's own output goes into its `slurm/`.
        working_folder: the folder that relative paths in the config start from.
        python: the Python of the part on the first node.
        points: runs of a sweep: the job is an array of this many tasks; 0: no array.
    """
    evaluates = stage == "evaluate"
    nodes = 1 if evaluates else settings.nodes
    gpus = (1 if evaluates else settings.gpus_per_node) if settings.gpus_per_node else None
    minutes = settings.evaluate_minutes if evaluates else settings.time_minutes
    tasks = 1 if evaluates else settings.ranks_per_node
    options: dict[str, Any] = {
        "job_name": f"{name}-{stage}",
        "time": minutes,
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": gpus,
        "mem": settings.memory_per_node,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "signal_delay_s": min(settings.lead_seconds, 60 * minutes - 1),
        "stderr_to_stdout": True,
        "use_srun": False,
        "wckey": None,
    }
    more: dict[str, Any] = {
        # the script opens the log: in an option, Slurm would interpret `%`, `\\` and line ends in its path
        "output": "/dev/null",
        "requeue": True,
        "export": ",".join((*KEPT, *settings.pass_environment)),
    }
    if settings.reservation:
        more["reservation"] = settings.reservation
    if points:
        more["array"] = f"0-{points - 1}"
    more |= {key: value or True for key, value in settings.extra.items()}
    log = shlex.quote(str(log_file(log_root, stage))) + ('"-$SLURM_ARRAY_TASK_ID"' if points else "")
    excluded = f" + $(scontrol show hostnames {shlex.quote(settings.exclude)} | wc -l)" if settings.exclude else ""
    elsewhere = _ELSEWHERE.format(
        job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if points else "$SLURM_JOB_ID",
        nodes=nodes,
        most=f"{settings.max_retries}{excluded}",
    )
    setup = [
        # until Python sets its handlers; the ranks set their own
        "trap '' TERM USR2 HUP",
        elsewhere.strip(),
        f"exec >>{log} 2>&1 || elsewhere",
        f"cd {shlex.quote(str(working_folder))} || elsewhere",
        f"[ -x {shlex.quote(python)} ] || elsewhere",
        "set -e",
        *(["module purge"] if settings.modules else []),
        *(f"module load {shlex.quote(module)}" for module in settings.modules),
        *settings.setup,
        f"export PYTHONPATH={shlex.quote(str(submission / 'code'))}",
        # otherwise the working folder would come first, and with it the source tree instead of the snapshot
        "export PYTHONSAFEPATH=1",
    ]
    executor = _Scripts(submission)
    executor.update_parameters(**options, setup=setup, additional_parameters=more)
    return executor.text(_joined(["exec", python, "-m", "lbr_dist.slurm.job", stage, str(submission)]))


def _joined(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
