"""The checks of Slurm by `lbr doctor`: client, controller, partitions, accounting, requeue and preemption."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lbr_dist.launch.doctor.findings import Finding, ask, fault, ok, warning

_DOWN = ("down", "drain", "fail", "unknown", "no_respond", "not_responding", "error", "power", "maint")
"""Prefixes of the node states in which no job starts."""


def check_slurm() -> list[Finding]:
    """Ask Slurm's own programs. If one does not answer, checks that would only repeat that are skipped."""
    version = ask("scontrol", "--version")
    configured = os.environ.get("SLURM_CONF")
    if version.missing:
        if configured or "SLURM_JOB_ID" in os.environ:
            found = "scontrol is not on PATH, though " + ("SLURM_CONF is set" if configured else "this is a job")
            return [warning("client", found, "Put Slurm's programs on PATH (module load slurm) to see jobs.")]
        return [ok("client", "scontrol is not on PATH: no Slurm here, and none is needed on one machine")]
    if configured and not Path(configured).is_file():
        advice = "Name the cluster's slurm.conf, or unset SLURM_CONF: no Slurm program starts with this one."
        return [fault("client", f"SLURM_CONF={configured} does not exist", advice)]
    which = f"SLURM_CONF={configured}" if configured else "SLURM_CONF is not set"
    # scontrol prints its version only if it finds a cluster's settings
    findings = [ok("client", f"{version.text.strip() or shutil.which('scontrol')}, {which}")]
    ping = ask("scontrol", "ping")
    if ping.failure is not None and not configured and "is DOWN" not in ping.text:
        found = f"no cluster found: {ping.failure}"
        return [*findings, warning("controller", found, "Set SLURM_CONF, or run this where sbatch works.")]
    if ping.failure is not None or "is UP" not in ping.text:
        found = ping.text.partition("\n")[0].strip() or str(ping.failure)
        advice = "Jobs cannot be submitted or seen: tell your administrators, or see `systemctl status slurmctld`."
        return [*findings, fault("controller", found, advice)]
    findings.append(ok("controller", "; ".join(line.strip() for line in ping.text.splitlines() if line.strip())))
    return [*findings, *_partitions(), _accounting(), *_rules(), _job()]


# ---- partitions ----------------------------------------------------------------------------------------------------


def _partitions() -> list[Finding]:
    answer = ask("sinfo", "--noheader", "--format=%P|%a|%l|%D|%T|%G")
    if answer.failure is not None:
        return [warning("partitions", answer.failure, "Run sinfo yourself, and see what it prints.")]
    rows = [row for row in (line.strip().split("|") for line in answer.text.splitlines()) if len(row) == 6]
    if not rows:
        return [fault("partitions", "there is none that you may use", "Ask the cluster's administrators for one.")]
    return [_partition(name, [row for row in rows if row[0] == name]) for name in dict.fromkeys(row[0] for row in rows)]


def _partition(name: str, rows: list[list[str]]) -> Finding:
    _, open_, limit, _, _, _ = rows[0]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[4]] = counts.get(row[4], 0) + int(row[3])
    states = ", ".join(f"{number} {state}" for state, number in counts.items())
    resources = ", ".join(dict.fromkeys(row[5] for row in rows if row[5] != "(null)")) or "no gres"
    until = "no time limit" if limit == "infinite" else f"time limit {limit}"
    title, label = ("default, " if name.endswith("*") else ""), f"partition {name.rstrip('*')}"
    found = f"{title}{open_}, {until}; nodes: {states}; {resources}"
    if open_ != "up":
        return warning(label, found, "Its jobs wait until it is up: use another partition.")
    if all(state.startswith(_DOWN) or state.endswith("*") for state in counts):
        return warning(label, found, "None of its nodes can start a job: see `sinfo --list-reasons`, or use another.")
    return ok(label, found)


# ---- accounting, requeue and preemption ----------------------------------------------------------------------------


def _accounting() -> Finding:
    answer = ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID", "--starttime=now")
    if answer.failure is None:
        return ok("accounting", "sacct answers, so it is known how a job ended")
    advice = "`lbr status` relies on its own records; without one, Slurm forgets a job after MinJobAge."
    return warning("accounting", answer.failure, advice)


def _rules() -> list[Finding]:
    answer = ask("scontrol", "show", "config")
    lines = (line.partition("=") for line in answer.text.splitlines())
    settings = {key.strip(): value.strip() for key, equals, value in lines if equals}
    if answer.failure is not None or "JobRequeue" not in settings:
        found = answer.failure or "scontrol show config does not list JobRequeue"
        return [warning("rules", found, "Whether jobs are requeued is not known: ask the cluster's administrators.")]
    findings = [ok("requeue", "jobs are requeued unless they opt out (JobRequeue=1)")]
    if settings["JobRequeue"] != "1":
        advice = "Submit jobs with --requeue; without it, a job whose node fails does not start again."
        findings = [warning("requeue", f"only for jobs that ask for it (JobRequeue={settings['JobRequeue']})", advice)]
    mode, kind = settings.get("PreemptMode", "not set"), settings.get("PreemptType", "not set")
    found = f"PreemptMode={mode}, PreemptType={kind}"
    if "CANCEL" in mode:
        advice = "A preempted job is cancelled: submit it again, and it resumes from its newest checkpoint."
        findings.append(warning("preemption", found, advice))
    elif "SUSPEND" in mode:
        advice = "A suspended job looks hung: its ranks may exit when it continues, and the job is requeued."
        findings.append(warning("preemption", found, advice))
    else:
        findings.append(ok("preemption", found))
    return [*findings, ok("kill wait", f"{settings.get('KillWait', 'not set')} between a job's SIGTERM and SIGKILL")]


def _job() -> Finding:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return ok("job", "this process is not in a job")
    nodes = f"nodes {os.environ.get('SLURM_JOB_NODELIST', 'unknown')}"
    return ok("job", f"this process is in job {job}, {nodes}, partition {os.environ.get('SLURM_JOB_PARTITION', '')}")
