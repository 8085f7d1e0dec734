"""Runs Slurm's own commands: queue, cancel and requeue jobs, and look up their states.

Every command has a time limit: with the controller down, it would wait for ever.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lbr_dist.console import Say
from lbr_dist.errors import LaunchError

SECONDS = 20.0
PATIENCE_SECONDS = 600.0
"""How long a job keeps asking a controller that is down, for its requeue for example."""

T = TypeVar("T")
_FIELDS = ("%i", "%T", "%r", "%N", "%S", "%e", "%M")
_ACCOUNTING = "JobID,State,ExitCode,NodeList,Start,End"
_DEAF = ("sh", "-c", 'trap "" TERM; exec "$@"', "sh")
"""Prefix of a command that ends the job it runs in: it must ignore the SIGTERM that Slurm sends to the whole job."""

OVER = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "UNKNOWN")
)
"""Final states of a job. UNKNOWN is ours: neither the controller nor the accounting knows the job any more."""


class SlurmError(LaunchError):
    """A Slurm command failed, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job, or one task of a job array, as Slurm sees it now."""

    id: str
    state: str
    """As squeue prints it in full: PENDING, RUNNING, COMPLETING, COMPLETED, …"""

    reason: str = ""
    """Why it is waiting; empty if it is not."""

    nodes: str = ""
    began: str = ""
    ends: str = ""
    """When the time limit is reached, or when it ended. Local time, ISO."""

    exit_code: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in OVER


def command(*words: str, seconds: float = SECONDS, environment: Mapping[str, str] | None = None) -> str:
    """The output of a Slurm command.

    Raises:
        SlurmError: it is not installed, failed, or did not answer in time; with its own message.
    """
    name = words[len(_DEAF)] if words[: len(_DEAF)] == _DEAF else words[0]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=_plain(os.environ if environment is None else environment),
        )
    except FileNotFoundError:
        raise SlurmError(f"{name}: not found. Run this on a node that can submit jobs.") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{name}: no answer within {seconds:g} s. Check with `scontrol ping` that the controller is up."
        ) from None
    if done.returncode:
        message = (done.stderr or done.stdout).strip() or f"exited with code {done.returncode}, without a message"
        raise SlurmError(f"{name}: {message}")
    return done.stdout


def patiently(ask: Callable[[], T], say: Say) -> T:
    """The answer of `ask`, even if the controller is down for some minutes; `say` gets a note for each retry.

    Raises:
        SlurmError: Slurm refuses, or the controller is down for too long.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except SlurmError as error:
            down = any(words in str(error) for words in ("Unable to contact", "no answer", "Socket timed out"))
            if not down or time.monotonic() > deadline:
                raise
            say(f"note: asking again: {error}")
            time.sleep(5.0)


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables by which users change these commands' output or defaults: filters, formats, times."""
    own = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_", "SBATCH_", "SLURM_TIME_FORMAT")
    return {name: value for name, value in environment.items() if not name.startswith(own)}


def submit(script: str, options: Sequence[str], environment: Mapping[str, str]) -> str:
    """Queue a script. Returns the job's id.

    Raises:
        SlurmError: sbatch refuses, with its message.
    """
    said = command("sbatch", "--parsable", *options, script, environment=environment)
    return said.strip().splitlines()[-1].split(";")[0]


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; jobs that have ended already stay as they are."""
    known = list(ids)
    if known:
        command("scancel", *known)


def jobs(ids: Iterable[str], accounting: bool = True) -> dict[str, Job]:
    """Jobs by id, those of an array by `ID_INDEX`; jobs that Slurm has forgotten are missing.

    Args:
        ids: of jobs or of whole arrays.
        accounting: ask the accounting for what the controller has forgotten.

    Raises:
        SlurmError: the controller does not answer.
    """
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    found = _from_controller(wanted)
    missing = [name for name in wanted if not any(job.split("_")[0] == name for job in found)]
    if missing and accounting:
        found |= _from_accounting(missing)
    return found


def _from_controller(ids: Sequence[str]) -> dict[str, Job]:
    found: dict[str, Job] = {}
    try:
        # tabs between the fields: no value contains one
        printed = command("squeue", "-h", "-r", "-a", "-t", "all", "-j", ",".join(ids), "-o", "\t".join(_FIELDS))
    except SlurmError as error:
        if "Invalid job id" in str(error):  # squeue fails like this only if a single id was asked for
            return {}
        raise
    for line in printed.splitlines():
        name, state, reason, nodes, began, ends, _ = line.split("\t")
        waits = "" if reason == "None" else reason
        known = {"began": began, "ends": ends}
        times = {key: "" if value == "N/A" else value for key, value in known.items()}
        found[name] = Job(name, state, waits, nodes, **times)
    return found


def _from_accounting(ids: Sequence[str]) -> dict[str, Job]:
    try:
        printed = command("sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", _ACCOUNTING)
    except SlurmError:  # no accounting
        return {}
    found: dict[str, Job] = {}
    for line in printed.splitlines():
        name, state, code, nodes, began, ends = line.split("|")
        # the state may be "CANCELLED by 0"
        found[name] = Job(name, state.split()[0], "", nodes.replace("None assigned", ""), began, ends, code)
    return found


def requeue(job: str) -> None:
    """Put a running job back into the queue, under its id. A job that requeues itself gets SIGTERM from Slurm.

    Raises:
        SlurmError: Slurm refuses.
    """
    command(*_DEAF, "scontrol", "requeue", job)


def hosts(nodes: str) -> list[str]:
    """The node names in `gpu[01,03-04]`, in Slurm's order.

    Raises:
        SlurmError: Slurm cannot read it.
    """
    return command("scontrol", "show", "hostnames", nodes).split() if nodes else []


def excluded(job: str) -> list[str]:
    """The nodes that a job must not use.

    Raises:
        SlurmError: there is no such job, or the controller does not answer.
    """
    found = re.search(r" ExcNodeList=([^ (]+)", command("scontrol", "-o", "show", "job", job))
    return hosts(found[1]) if found else []


def exclude(job: str, nodes: str) -> None:
    """Keep a waiting job off nodes. A job can do so for itself right after its `requeue`: it then counts as waiting,
    and its own processes have until `KillWait` to exit.

    Raises:
        SlurmError: Slurm refuses.
    """
    command(*_DEAF, "scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")


def minimal_environment(passed: Iterable[str]) -> dict[str, str]:
    """The variables of this process that a job gets: none of an outer job, its bindings or its ranks."""
    names = {*KEPT, *passed}
    return {name: value for name, value in os.environ.items() if name in names}


KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "SLURM_CONF")
