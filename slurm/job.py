"""What a stage's job runs on its first node: `python -m lbr_dist.slurm.job STAGE SUBMISSION`.

Checks the nodes, starts the ranks with srun, and decides what to do when they have exited: succeed, which lets the next
stage start; fail, which cancels the rest of the chain; or make another attempt under the same id. A job that was asked
to stop, and saved, is not done, and the next stage must not start: the job requeues itself.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO

from lbr_dist.config import RunConfig
from lbr_dist.config.cluster import JOB_STAGES, JobStage
from lbr_dist.config.file import read_config, settle_dtype, write_config
from lbr_dist.data.record_files import record_files
from lbr_dist.errors import CheckpointError, LbrError
from lbr_dist.export.checksums import verify_export
from lbr_dist.ranks.hardware import allocator
from lbr_dist.ranks.interrupt import END_TIME
from lbr_dist.ranks.rendezvous import node_name
from lbr_dist.slurm import journal, nodes, scheduler
from lbr_dist.slurm.journal import Outcome, Submission
from lbr_dist.slurm.scheduler import Job, patiently
from lbr_dist.slurm.verdict import Verdict, verdict_of
from lbr_dist.status.stages import is_finished, saved_step
from lbr_dist.storage.files import make_private

MUCH_TEXT = 64 * 2**20
"""With at least this many bytes of text, tokenising gets its own srun step."""

_OF_THE_JOB = (
    *("SLURM_CONF", "SLURM_CLUSTER_NAME", "SLURM_WORKING_CLUSTER", "SLURM_SUBMIT_DIR", "SLURM_RESTART_COUNT"),
    *("SLURM_NODELIST", "SLURM_NNODES", "SLURM_TASKS_PER_NODE", "SLURM_GPUS_ON_NODE"),
)
"""Slurm's variables that srun needs, besides those that start with SLURM_JOB or SLURM_ARRAY. The rest may be left over
from the job that this one was submitted from: bindings, memory sizes, task counts."""


def say(message: str) -> None:
    """A line in the job's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}", flush=True)


class StageJob:
    """One attempt of one stage of one run."""

    def __init__(self, submission: Submission, stage: JobStage, index: int = 0) -> None:
        self.submission, self.stage = submission, stage
        self.config_file = submission.config_file(index)
        # the ranks choose a dtype for `auto` when they know their device; a later attempt keeps it
        self.config: RunConfig = settle_dtype(read_config(self.config_file), gpus=None)
        self.run_path = self.config.run_path
        self.slurm = self.config.slurm
        # the last task of an array has the array's own id: a requeue under that id would requeue all tasks
        self.job = (
            os.environ["SLURM_JOB_ID"] if not submission.is_sweep else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{index}"
        )
        self.nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        self.logs = journal.rank_logs(self.run_path, stage)
        self._sizes: dict[Path, int] = {}

    @property
    def step(self) -> int:
        return saved_step(self.config, self.stage)

    def run(self) -> int:
        """Run the stage. Returns the job's exit code: 0 if the stage is finished."""
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._take)
        if is_finished(self.config, self.stage):
            say(f"{self.stage}: already finished, nothing to do")
            return 0
        self._end_what_was_lost()
        self._note_where_it_could_not_begin()
        why = self._why_no_further_try()
        if why is not None:
            say(f"{self.stage}: {why}")
            return 1
        say(f"{self.stage}: job {self.job} on {self.nodes}, from step {self.step}")
        journal.begin(self.run_path, self.stage, self.job, self.nodes, self.step)
        try:
            write_config(self.config, self.run_path / "config.yaml")
            self._check_before()
            faults = self._faults_of_nodes() if self.slurm.node_check else {}
        except LbrError as error:
            return self._over("failed", str(error))
        if faults:
            reason = "; ".join(f"node {node}: {what}" for node, what in faults.items())
            return self._again("refused", reason, tuple(faults))
        verdict = self._tokenise()
        if verdict.outcome == "finished":
            verdict = self._ranks()
        if is_finished(self.config, self.stage):  # even if a rank failed afterwards
            return self._over("finished", "")
        if verdict.outcome == "finished":
            verdict = Verdict("failed", "the ranks exited without an error, but the stage is not finished")
        if verdict.outcome == "mistaken":
            return self._over("failed", self._words_of(verdict.rank))
        if verdict.outcome == "interrupted":
            return self._again("interrupted", verdict.reason)
        words = self._words_of(verdict.rank)
        return self._again("failed", f"{verdict.reason}{f': {words}' if words else ''}", verdict.blamed)

    @staticmethod
    def _take(number: int, frame: FrameType | None) -> None:
        """The ranks get the signal too, directly or from srun: what to do is decided when they have exited."""
        say(f"asked to stop by {signal.Signals(number).name}")

    # ---- before the ranks --------------------------------------------------------------------------------------

    def _end_what_was_lost(self) -> None:
        before = journal.tries(self.run_path, self.stage)
        if before and not before[-1].outcome:
            reason = (
                f"job {before[-1].job} on {before[-1].nodes} ended without a record: a node failed, or it was killed"
            )
            journal.end(self.run_path, self.stage, "lost", reason, self.step)
            say(f"{self.stage}: {reason}")

    def _note_where_it_could_not_begin(self) -> None:
        """Record the attempts that the script requeued since this program could not start, or write its log."""
        before = journal.tries(self.run_path, self.stage)
        starts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if starts <= sum(each.job == self.job for each in before):
            return
        known = {node for each in before for node in each.blamed}
        try:
            known |= set(scheduler.hosts(self.slurm.exclude or ""))
            found = [node for node in scheduler.excluded(self.job) if node not in known]
        except LbrError as error:
            say(f"note: {error}")
            return
        for node in found:
            reason = f"node {node}: an attempt on it could not use the run folder, the working folder or Python"
            journal.begin(self.run_path, self.stage, self.job, node, self.step)
            journal.end(self.run_path, self.stage, "refused", reason, self.step, [node])
            say(f"{self.stage}: {reason}")

    def _why_no_further_try(self) -> str | None:
        """Why this job must not try again: its attempts made no progress, or failed too often."""
        before = [t for t in journal.tries(self.run_path, self.stage) if t.job == self.job]
        idle = 0
        for each in reversed(before):
            if each.progressed:
                break
            idle += 1
        most = self.slurm.max_retries
        if idle > most:
            last = before[-1].reason
            return f"{idle} attempts in a row ended without progress (slurm.max_retries {most}); the last one: {last}"
        failures = [each for each in before if each.outcome in ("failed", "refused")]
        if len(failures) > most:
            return f"failed {len(failures)} times (slurm.max_retries {most}); the last time: {failures[-1].reason}"
        return None

    def _check_before(self) -> None:
        """Check that the stage before this one is finished, and that its model is unchanged.

        Raises:
            CheckpointError: it is not.
        """
        if self.stage == "learn" or (self.stage == "represent" and not self.config.learn.steps):
            return
        before: JobStage = "learn" if self.stage == "represent" else "represent"
        if before == "represent" and not self.config.represent.steps:
            return
        folder = self.config.learn_export if before == "learn" else self.config.model_path
        if not is_finished(self.config, before):
            raise CheckpointError(
                f"{folder}: {self.stage} starts from it, but {before} is not finished. `lbr submit` queues both."
            )
        verify_export(folder)

    def _faults_of_nodes(self) -> dict[str, str]:
        """Nodes that cannot be used, and why."""
        number = 1 if self.stage == "evaluate" else self.slurm.nodes
        gpus = self.slurm.gpus_per_node if self.slurm.gpus_per_node and self.slurm.check_gpus else 0
        python = [*self.slurm.container, self._python]
        return nodes.faults(scheduler.hosts(self.nodes)[:number], python, self.run_path, gpus, self._environment(), say)

    # ---- the ranks ---------------------------------------------------------------------------------------------

    @property
    def _python(self) -> str:
        return self.slurm.python or self.submission.python

    def _environment(self) -> dict[str, str]:
        kept = ("SLURM_JOB", "SLURM_ARRAY")
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SRUN")) or name.startswith(kept) or name in _OF_THE_JOB
        }
        threads = {"OMP_NUM_THREADS": str(self.slurm.cpus_per_task)}
        preload = {} if self.slurm.gpus_per_node and self.slurm.check_gpus else allocator()
        return environment | threads | preload | self.slurm.environment

    def _tokenise(self) -> Verdict:
        """Tokenise stage 1's text on all ranks if there is a lot: one rank would take hours while the others wait."""
        data = self.config.data
        corpus = Path(data.learn_corpus or data.corpus)
        if self.stage != "learn" or sum(file.stat().st_size for file in record_files(corpus)) < MUCH_TEXT:
            return Verdict("finished")
        given = {
            "--base": self.config.model.base,
            "--corpus": corpus,
            "--cache-dir": data.cache_dir,
            "--longest-document": data.longest_document,
        }
        words = [str(word) for option in given.items() for word in option]
        words += [word for column in (data.columns or {}).items() for word in ("--columns", "=".join(column))]
        return self._srun(["lbr_dist.launch.cli", "data", "tokens", *words])

    def _ranks(self) -> Verdict:
        """Run the stage's ranks until they exit."""
        return self._srun(["lbr_dist.launch.worker", self.stage, str(self.config_file)])

    def _srun(self, module: Sequence[str]) -> Verdict:
        """Run a Python module on all ranks; the evaluation has one."""
        alone = self.stage == "evaluate"
        number, each = (1, 1) if alone else (self.slurm.nodes, self.slurm.ranks_per_node)
        logs = self.logs
        make_private(logs.parent)
        make_private(logs)
        self._sizes = {path: path.stat().st_size for path in logs.glob("rank-*.log")}
        # a port that is free now on this node, where rank 0 will run; other jobs and later attempts get other ports
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        host = node_name()
        command = [
            *("srun", "--export=ALL", "--unbuffered", "--mpi=none", "--open-mode=append"),
            *(f"--nodes={number}", f"--ntasks={number * each}", f"--ntasks-per-node={each}"),
            f"--cpus-per-task={self.slurm.cpus_per_task}",
            # a rank that was asked to stop exits with code 75: the others must not be killed for it while they save too
            *("--kill-on-bad-exit=0", f"--wait={self.slurm.wait_seconds}"),
            f"--output={str(logs).replace('%', '%%')}/rank-%t.log",
            *self.slurm.srun_arguments,
            *self.slurm.container,
            *(self._python, "-u", "-m", *module),
        ]
        environment = self._environment() | self._end_time()
        if not alone:
            environment["LBR_RENDEZVOUS"] = f"tcp://{host}:{port}"
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        lines: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr, lines), daemon=True)
        reader.start()
        code = process.wait()
        reader.join(10.0)
        hosts = scheduler.hosts(self.nodes)
        return verdict_of(code, lines, lambda rank: hosts[rank // each])

    def _end_time(self) -> dict[str, str]:
        """When the time limit is reached: the ranks stop before the signal if a step and a save need longer."""
        try:
            ends = datetime.fromisoformat(self._now().ends)
        except (LbrError, ValueError):  # the controller is down, or there is no limit: the signal is enough
            return {}
        return {END_TIME: f"{ends.timestamp():.0f}"}

    def _words_of(self, rank: int | None) -> str:
        """A rank's last error in this attempt, or another rank's if it has none, or the rank's last line."""
        paths = sorted(self.logs.glob("rank-*.log"))
        own = self.logs / f"rank-{rank}.log"
        for path in (own, *(path for path in paths if path != own)):
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(self._sizes.get(path, 0))
                lines = file.read()[-20000:].decode("utf-8", "replace").splitlines()
                errors = [line for line in lines if line.startswith("error: ") and "another rank is gone" not in line]
                if errors:
                    return errors[-1].removeprefix("error: ")
        with contextlib.suppress(OSError, IndexError):
            return [line for line in own.read_text(errors="replace").splitlines() if line.strip()][-1].strip()
        return ""

    # ---- after the ranks ---------------------------------------------------------------------------------------

    def _over(self, outcome: Outcome, reason: str, blamed: Sequence[str] = ()) -> int:
        journal.end(self.run_path, self.stage, outcome, reason, self.step, blamed)
        say(f"{self.stage}: {outcome}{f': {reason}' if reason else ''}")
        return 0 if outcome == "finished" else 1

    def _again(self, outcome: Outcome, reason: str, blamed: Sequence[str] = ()) -> int:
        """Put this job back into the queue, if another attempt makes sense and nobody cancelled it."""
        before = [t for t in journal.tries(self.run_path, self.stage) if t.job == self.job]
        state = patiently(self._now, say).state
        if state == "PENDING":  # Slurm has requeued it already
            self._over(outcome, reason)
            return self._await_end()
        if state != "RUNNING":
            return self._over(outcome, f"{reason}; the job is {state}: it was cancelled, or reached its time limit")
        failed = outcome != "interrupted"
        without = nodes.to_leave_out(blamed, before, self.slurm.nodes, say) if failed and blamed else ()
        earlier = before[-2] if len(before) > 1 else None
        again_here = earlier is not None and earlier.outcome == "failed" and earlier.last_step == self.step
        if failed and again_here and not without and not before[-1].first_step < self.step:
            return self._over(outcome, f"{reason}; it has failed at this step before")
        journal.end(self.run_path, self.stage, outcome, reason, self.step, blamed)
        why = self._why_no_further_try()
        if why is not None:
            say(f"{self.stage}: {outcome}: {reason}; {why}")
            return 1
        avoiding = f", without {', '.join(without)}" if without else ""
        say(f"{self.stage}: {outcome} at step {self.step}: {reason}; requeued{avoiding}")
        try:
            patiently(lambda: scheduler.requeue(self.job), say)
            if without:
                excluded = ",".join((*without, *([self.slurm.exclude] if self.slurm.exclude else [])))
                patiently(lambda: scheduler.exclude(self.job, excluded), say)
        except LbrError as error:
            say(f"{self.stage}: cannot requeue the job, or exclude nodes: {error}")
            return 1
        return self._await_end()

    def _now(self) -> Job:
        """This job as Slurm sees it.

        Raises:
            SlurmError: the controller does not answer.
        """
        return scheduler.jobs([self.job], accounting=False).get(self.job, Job(self.job, "UNKNOWN"))

    def _await_end(self) -> int:
        """Wait until Slurm ends this requeued job; if it exited by itself first, it would count as done or failed."""
        time.sleep(120.0)
        return 1


def _pass_on(stream: IO[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))
        print(line, end="", file=sys.stderr, flush=True)


def _print_to(path: Path) -> None:
    """From now on, this process and its children print into the run's own log."""
    make_private(path.parent)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def main() -> int:
    stage, folder = sys.argv[1:]
    assert stage in JOB_STAGES
    try:
        submission = Submission.read(Path(folder))
        # without a sweep the variable can only be left over from an outer job
        index = int(os.environ["SLURM_ARRAY_TASK_ID"]) if submission.is_sweep else 0
        job = StageJob(submission, stage, index)
        if submission.is_sweep:
            _print_to(journal.log_file(job.run_path, stage))
        return job.run()
    except LbrError as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
