"""Nodes that must not be used: they fail the check before the ranks start, or are blamed for a failed attempt.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lbr_dist.console import Say
from lbr_dist.errors import LbrError
from lbr_dist.slurm import scheduler
from lbr_dist.slurm.journal import Try
from lbr_dist.slurm.scheduler import patiently

CHECK_SECONDS = 90.0
"""Time limit of the node check. A node that has not answered by then counts as broken."""


def faults(
    nodes: Sequence[str], python: Sequence[str], run_path: Path, gpus: int, environment: Mapping[str, str], say: Say
) -> dict[str, str]:
    """Run `lbr doctor --node` on each node of this job. Returns the nodes that cannot be used, and why.

    Args:
        nodes: the first nodes of the job.
        python: the command that starts Python on a node.
        run_path: the folder that a node must be able to write to.
        gpus: how many each node must have; 0: they are not checked.
        environment: srun's environment.
        say: prints a line.
    """
    words = ["-m", "lbr_dist.launch.cli", "doctor", "--node", "--json", "--run-dir", str(run_path)]
    number = len(nodes)
    command = [
        *("srun", "--export=ALL", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1", "--mpi=none"),
        *("--kill-on-bad-exit=0", "--no-kill", "--quit-on-interrupt"),
        *(*python, *words, *(("--gpus", str(gpus)) if gpus else ())),
    ]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        printed, _ = process.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # srun passes the signal on
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
        process.kill()
        printed, _ = process.communicate()
    answered: dict[str, list[str]] = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            report = json.loads(line)
            found = [f for f in report["findings"] if f["state"] == "fault"]
            answered[report["node"]] = [f"{f['name']}: {f['found']}. {f['advice']}" for f in found]
    if not answered:
        say("the node check printed no result; continuing without it")
        return {}
    silent = [f"no answer to the check within {CHECK_SECONDS:g} s"]
    found_of = {node: answered.get(node, silent) for node in nodes}
    return {node: "; ".join(found) for node, found in found_of.items() if found}


def to_leave_out(blamed: Sequence[str], before: Sequence[Try], needed: int, say: Say) -> tuple[str, ...]:
    """Nodes that the next attempt avoids: those blamed now, then those blamed earlier, as long as enough are left.

    Args:
        blamed: nodes blamed for the end of this attempt.
        before: the job's attempts.
        needed: how many nodes the job needs.
        say: prints a line.
    """
    ask = ("sinfo", "-h", "-N", "-p", os.environ.get("SLURM_JOB_PARTITION", ""), "-o", "%N %T")
    try:
        rows = [line.split() for line in patiently(lambda: scheduler.command(*ask), say).splitlines()]
    except LbrError as error:
        say(f"note: {error}")
        return ()
    usable = {name for name, state in rows if not state.startswith(("down", "drain", "fail", "unknown"))}
    chosen: list[str] = []
    for node in (*blamed, *(node for each in reversed(before) for node in each.blamed)):
        if len(usable - {*chosen, node}) >= needed:
            chosen.append(node)
        elif node in blamed:
            say(f"note: {node} would be left out, but the partition has too few other nodes")
    return tuple(dict.fromkeys(chosen))
