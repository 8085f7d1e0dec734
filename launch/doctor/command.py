"""`lbr doctor`: what this machine and its cluster have for a run, what is missing, and how to fix it.

This process needs only Python: a package, or torch, may be what is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from lbr_dist.console import Say
from lbr_dist.errors import ConfigError
from lbr_dist.launch.doctor.findings import Finding, State, ask, count, fault, within

TORCH_SECONDS = 120.0
"""Time for torch, NCCL and DeepSpeed to start; from a cold network file system they take minutes."""

MARKS: dict[State, str] = {"ok": "ok", "warning": "??", "fault": "!!"}
_COLOURS: dict[State, int] = {"ok": 32, "warning": 33, "fault": 31}
WIDTH = 110

Topics = dict[str, list[Finding]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lbr doctor`."""
    parser.add_argument("--json", action="store_true", help="as JSON; with --node, on one line")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that this machine must have")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder that runs are written to (default: .)")
    parser.add_argument("--min-free-gb", type=float, default=0.0, metavar="X", help="GiB that DIR must have free")
    parser.add_argument("--node", action="store_true", help="only what a job needs from a node, in under a second")


def run(args: argparse.Namespace, say: Say) -> int:
    """Run the checks and print the findings.

    Returns:
        The exit code: 1 if there is a fault.

    Raises:
        ConfigError: an option is out of range.
    """
    for option, value in (("--gpus", args.gpus or 0), ("--min-free-gb", args.min_free_gb)):
        if not 0 <= value < 2**32:  # refuses inf and nan too
            raise ConfigError(f"{option}: found {value}, expected a number from 0 up to, not including, 2^32.")
    free = int(args.min_free_gb * 2**30)
    if args.node:
        from lbr_dist.launch.doctor.node import check_node
        from lbr_dist.ranks.rendezvous import node_name

        findings = check_node(args.run_dir, args.gpus, free)
        topics = {f"node {node_name()}": findings}
        if args.json:
            say(json.dumps({"node": node_name(), "findings": [asdict(finding) for finding in findings]}))
    else:
        topics = look(args.run_dir or Path(), args.gpus, free)
        findings = [finding for several in topics.values() for finding in several]
        if args.json:
            plain = [{"topic": topic} | asdict(finding) for topic, several in topics.items() for finding in several]
            counts = {"faults": count(findings, "fault"), "warnings": count(findings, "warning")}
            say(json.dumps({"findings": plain} | counts, indent=1))
    if not args.json:
        colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        say(table(topics, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns), colours))
    return 1 if count(findings, "fault") else 0


def look(run_dir: Path, gpus: int | None, min_free_bytes: int) -> Topics:
    """All findings, by topic."""
    from lbr_dist.launch.doctor import machine
    from lbr_dist.launch.doctor.slurm import check_slurm

    with ThreadPoolExecutor() as pool:
        # the slowest first
        torch, slurm = pool.submit(check_torch), pool.submit(within, "Slurm", check_slurm, 60.0)
        mpi = pool.submit(within, "MPI", machine.check_mpi, 15.0)
        there = _count_gpus()
        graphics = _graphics(gpus, there)
        return {
            "Python": within("Python", machine.check_python),
            "torch, GPUs and kernels": [*graphics, *torch.result()],
            "This machine": within("limits", lambda: machine.check_limits(there)),
            "Disks": machine.check_disks(run_dir, min_free_bytes),
            "MPI": mpi.result(),
            "Slurm": slurm.result(),
        }


def _count_gpus() -> int:
    try:
        from lbr_dist.ranks.hardware import count_gpus
    except ImportError:  # the check of the packages reports it
        return 0
    return count_gpus()


def _graphics(wanted: int | None, there: int) -> list[Finding]:
    """What the driver reports, if there are GPUs or should be."""
    from lbr_dist.launch.doctor.node import check_driver, check_gpus

    if wanted:
        return [*within("GPUs", lambda: [check_gpus(wanted)]), *check_driver(wanted)]
    return check_driver(0) if there else []


def check_torch() -> list[Finding]:
    """Check torch, GPUs, kernels and DeepSpeed in another process; what it finds before it crashes counts too."""
    answer = ask(sys.executable, "-m", "lbr_dist.launch.doctor.stack", seconds=TORCH_SECONDS)
    findings = [Finding(**json.loads(line)) for line in answer.text.splitlines() if line.endswith("}")]
    if answer.failure is None:
        return findings
    last = f" after it checked {findings[-1].name}" if findings else " when torch was imported"
    advice = "Run `python -m lbr_dist.launch.doctor.stack`: its last lines name the driver or library that fails."
    return [*findings, fault("torch", answer.failure.replace("python", "a process with torch", 1) + last, advice)]


# ---- the table -----------------------------------------------------------------------------------------------------


def table(topics: Topics, width: int, colours: bool = False) -> str:
    """The findings as text, with a last line that counts faults and warnings.

    Args:
        topics: findings by topic.
        width: columns to fill.
        colours: add a terminal's colour codes.
    """
    findings = [finding for several in topics.values() for finding in several]
    column = max((len(finding.name) for finding in findings), default=0)
    room = max(30, width - column - 8)
    lines: list[str] = []
    for topic, several in topics.items():
        if not several:
            continue
        lines += ["", _bold(topic, colours)] if lines else [_bold(topic, colours)]
        for finding in several:
            mark = MARKS[finding.state]
            if colours:
                mark = f"\033[{_COLOURS[finding.state]}m{mark}\033[0m"
            advice = zip(["->", *["  "] * 99], _wrap(finding.advice, room - 3), strict=False)
            first, *more = [*_wrap(finding.found, room), *(f"{arrow} {line}" for arrow, line in advice)]
            lines.append(f"  {mark}  {finding.name:<{column}}  {first}")
            lines += [f"{'':{column + 8}}{line}" for line in more]
    faults, warnings = count(findings, "fault"), count(findings, "warning")
    return "\n".join([*lines, "", f"{_number(faults, 'fault', '!!')}, {_number(warnings, 'warning', '??')}"])


def _bold(text: str, colours: bool) -> str:
    return f"\033[1m{text}\033[0m" if colours else text


def _number(number: int, what: str, mark: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'} ({mark})" if number else f"no {what}s"


def _wrap(text: str, width: int) -> list[str]:
    # paths and commands stay whole, so that people can copy them
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
