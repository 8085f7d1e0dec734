"""Many things that happen to runs on a cluster, all at once: each scenario is a function that queues a run of its own.

They mostly wait, for steps, for deadlines, for Slurm: one after another they would take several times as long, and a
cluster has other runs on its nodes too.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_dist.config import RepresentConfig, RunConfig, SlurmConfig
from lbr_dist.ranks.interrupt import END_TIME
from lbr_dist.slurm import journal
from lbr_dist.slurm.journal import Try
from lbr_dist.slurm.testbed.bed import Bed
from tests.configs import tiny_run
from tests.faults.runs import assert_same_end, checkpoints
from tests.slurm import chains
from tests.slurm.chains import (
    lbr,
    long_run,
    outcomes,
    ranks,
    send,
    status,
    submit,
    tries,
    wait,
    wait_over,
    wait_step,
)

SECRET = "do-not-write-me-anywhere"
DIRTY = {
    "SLURM_JOB_ID": "999999",
    "SLURM_NTASKS": "64",
    "SLURM_PROCID": "7",
    "SLURM_NODEID": "3",
    "SLURM_MEM_PER_CPU": "999999",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0xFF",
    "SLURM_CPUS_PER_TASK": "48",
    "SLURM_EXPORT_ENV": "NONE",
    "SBATCH_PARTITION": "nonsense",
    "SRUN_CPUS_PER_TASK": "48",
    "RANK": "5",
    "WORLD_SIZE": "9",
    "LOCAL_RANK": "5",
    "MASTER_ADDR": "nowhere",
    "OMP_NUM_THREADS": "77",
    "HF_TOKEN": SECRET,
}
"""What a shell inside another job has."""

NASTY_VALUE = "a; $(touch executed) `touch executed` \"b\" 'c' | & > executed\n%j %t \\ $HOME ä"

NASTY_NAME = "a; $(touch executed) 'q' \"d\" %j\nü"


@dataclass(frozen=True)
class Place:
    """Where a scenario plays."""

    bed: Bed
    whole: RunConfig
    """What an uninterrupted `long_run` gave."""

    model: Path
    data: Path
    small_disk: Path
    folder: Path
    """The scenario's own."""

    def long(self, **slurm: Any) -> RunConfig:
        return long_run(self.folder / "run", self.model, self.data, **slurm)


Scenario = Callable[[Place], Any]
SCENARIOS: dict[str, Scenario] = {}
ALONE = {"nodes_die", "preemption", "the_controller_starts_again", "a_broken_node", "a_broken_first_node"}
"""These meet every run on the cluster, or want the nodes that Slurm takes first: they are played when all others are
over, one after another."""


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def time_limits(place: Place) -> None:
    """Two minutes a try: USR2 ahead of the limit, a save, a requeue, until it is done; as if nothing had been."""
    # Slurm looks at limits twice a minute, and may warn so much earlier
    pause = place.folder / "pause"
    pause.write_text("2.5")
    environment = {"LBR_TRIAL_PAUSE": str(pause)}
    config = place.long(time_minutes=2, lead_seconds=60, max_retries=10, environment=environment)
    jobs = submit(config, place.folder)
    wait_step(config, 1)
    left = float(chains.variables(chains.ranks(config)[1])[END_TIME]) - time.time()
    assert 0 < left < 120, "the ranks know the time limit"
    wait("two limits have come", lambda: outcomes(config).count("interrupted") >= 2, config.run_path, 900)
    pause.write_text("0")
    found = wait_over(config.run_path, 400)
    assert found["learn"]["state"] == "finished", chains.told(config.run_path)
    assert {each.job for each in tries(config)} == {jobs["learn"]}, "a requeued job keeps its id"
    assert any(each.progressed for each in tries(config)[:-1])
    assert "told to stop, and saved" in tries(config)[0].reason
    assert_same_end(config, place.whole)


@scenario
def killed_and_hung(place: Place) -> None:
    """A rank is killed, then one hangs: each try ends within its deadline, and the next one is without its node."""
    config = place.long(max_retries=5)
    submit(config, place.folder)
    wait_step(config, 7)
    node = chains.node_of(config, 1)
    send(config, 1, signal.SIGKILL)
    wait("the first try is over", lambda: outcomes(config)[0], config.run_path)
    first = tries(config)[0]
    assert first.outcome == "failed" and f"rank 1 on {node} was killed: Killed" in first.reason, first
    assert first.blamed == [node], "there is a third node"

    wait_step(config, 14)
    assert node not in chains.hosts(tries(config)[1].nodes)
    began = time.monotonic()
    hung, node = ranks(config)[1], chains.node_of(config, 1)
    send(config, 1, signal.SIGSTOP)
    wait("the second try is over", lambda: len(outcomes(config)) > 1 and outcomes(config)[1], config.run_path, 240)
    # cluster.timeout_minutes, slurm.wait_seconds for the one that cannot end itself, and what the machine needs
    assert time.monotonic() - began < 90 + 15 + 60
    second = tries(config)[1]
    assert second.outcome == "failed" and f"rank 1 on {node} hung" in second.reason, second
    wait("the hung rank is gone", lambda: not Path(f"/proc/{hung}").exists(), config.run_path, 20)
    assert (config.run_path / "learn" / "logs" / "rank-0.stacks").exists()
    found = wait_over(config.run_path, 300)
    assert found["learn"]["state"] == "finished", chains.told(config.run_path)
    assert_same_end(config, place.whole)
    assert not ranks(config)


@scenario
def cancelled(place: Place) -> None:
    """`lbr cancel` in mid-step: the whole chain ends, and the ranks' polite end brings none of it back."""
    config = _chain(place, nodes=1)
    submit(config, place.folder)
    wait_step(config, 3)
    done = lbr("cancel", str(config.run_path))
    assert done.returncode == 0 and done.stdout.count("is cancelled") == 2, done
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["cancelled", "cancelled"], found
    assert "by `lbr cancel`" in found["learn"]["reason"]
    wait("no rank is left", lambda: not ranks(config), config.run_path, 30)
    time.sleep(6)
    assert status(config.run_path)["learn"]["state"] == "cancelled", "nobody requeues what was cancelled"
    assert lbr("cancel", str(config.run_path)).stdout.strip().endswith("no job of it is queued or runs")


@scenario
def scancelled(place: Place) -> None:
    """`scancel` of the first job: what waits for it goes too, and `lbr submit` then goes on from the checkpoint."""
    config = _chain(place, nodes=1)
    jobs = submit(config, place.folder)
    wait_step(config, 12)
    again = lbr("submit", str(place.folder / "submitted.yaml"))
    assert again.returncode == 1 and "queued or running" in again.stderr, again
    chains.slurm("scancel", jobs["learn"])
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["cancelled", "cancelled"], found
    assert found["represent"]["reason"] == "learn cancelled"
    later = status(config.run_path, **chains.forgotten(place.folder / "with", accounting=True))
    assert later["learn"]["state"] == "cancelled" and later["learn"]["reason"] == "by scancel", later
    later = status(config.run_path, **chains.forgotten(place.folder / "without", accounting=False))
    assert "it was cancelled" in later["learn"]["reason"], later
    saved = journal.saved_step(config, "learn")
    assert saved >= 10
    wait("no rank is left", lambda: not ranks(config), config.run_path, 30)
    submit(config, place.folder)
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["finished"] * 2, chains.told(config.run_path)
    assert tries(config)[1].first_step == saved


@scenario
def the_first_stage_fails(place: Place) -> None:
    """Its error reaches the user; the second stage never begins, and says why."""
    config = _chain(place, nodes=1)
    base = place.folder / "base"
    shutil.copytree(place.model, base)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, base=str(base)))
    # on the test bed too, the model may go away between the login node and the job
    jobs = submit(config, place.folder, LBR_TRIAL="1")
    (base / "model.safetensors").write_bytes(b"not a model")
    found = wait_over(config.run_path)
    assert found["learn"]["state"] == "failed" and "model.safetensors" in found["learn"]["reason"], found
    assert found["represent"]["state"] == "cancelled" and found["represent"]["reason"] == "learn failed", found
    assert len(tries(config)) == 1, "a mistake is not tried again"
    assert not (config.run_path / "represent").exists() and jobs.keys() == {"learn", "represent"}


@scenario
def a_full_disk(place: Place) -> None:
    """No room for a checkpoint: the stage fails with the words for it, and nothing that was saved is lost."""
    config = dataclasses.replace(place.long(nodes=1), run_dir=str(place.small_disk / "run"))
    submit(config, place.folder)
    wait_step(config, 7)
    ballast = place.small_disk / "ballast"
    with ballast.open("wb") as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            pass
    found = wait_over(config.run_path)
    assert found["learn"]["state"] == "failed" and "Make room" in found["learn"]["reason"], found
    ballast.unlink()
    saved = journal.saved_step(config, "learn")
    assert saved >= 5 and checkpoints(config).verify(saved).step == saved


@scenario
def a_sweep(place: Place) -> None:
    """A run for each value, as an array whose tasks wait for their own, are requeued alone and cancelled alone."""
    config = _chain(place, nodes=1)
    config = dataclasses.replace(
        config,
        learn=dataclasses.replace(config.learn, steps=12),
        represent=RepresentConfig(steps=2, batch_pairs=4, chunk_tokens=192),
    )
    jobs = submit(config, place.folder, "--sweep", "seed=0,1,2")
    runs = [config.run_path / "runs" / f"seed={seed}" for seed in range(3)]
    alone = [dataclasses.replace(config, run_dir=str(run)) for run in runs]
    # the last task has the number of the array
    wait_step(alone[2], 2)
    os.kill(chains.ranks(config, "config-2.yaml")[0], signal.SIGTERM)
    wait("it has left", lambda: outcomes(alone[2])[:1] == ["interrupted"], config.run_path)
    wait_step(alone[1], 1)
    done = lbr("cancel", str(runs[1]))
    assert done.returncode == 0 and f"job {jobs['learn']}_1 is cancelled" in done.stdout, done
    wait_over(config.run_path)

    whole = {(row["run"], row["stage"]): row for row in chains.rows(config.run_path)}
    states = {run: [whole[str(run), stage]["state"] for stage in ("learn", "represent")] for run in runs}
    assert states == {runs[0]: ["finished"] * 2, runs[1]: ["cancelled"] * 2, runs[2]: ["finished"] * 2}, whole
    assert outcomes(alone[0]) == ["finished"] and outcomes(alone[2]) == ["interrupted", "finished"]
    assert {each.job for each in tries(alone[2])} == {f"{jobs['learn']}_2"}
    assert chains.rows(runs[2]) == [whole[str(runs[2]), stage] for stage in ("learn", "represent")]
    weights = [(runs[seed] / "model" / "model.safetensors").read_bytes() for seed in (0, 2)]
    assert weights[0] != weights[1]


@scenario
def a_broken_node(place: Place) -> None:
    """A node that cannot write the run folder is found before the ranks start, and left out of the next try."""
    _on_a_broken_node(place, "n2")


@scenario
def a_broken_first_node(place: Place) -> None:
    """The same, where not even the job's own log can be opened."""
    tried = _on_a_broken_node(place, "n1")
    assert tried.nodes == "n1" and "a try began there" in tried.reason


def _on_a_broken_node(place: Place, node: str) -> Try:
    """The try that met it."""
    config = place.long(node_check=True)
    (place.folder / "run").mkdir(mode=0o700)
    mend = place.bed.read_only(node, place.folder / "run")
    try:
        jobs = submit(config, place.folder)
        assert wait_over(config.run_path, 240)["learn"]["state"] == "finished", chains.told(config.run_path)
        first, last = tries(config)
        assert first.outcome == "refused" and first.reason.startswith(f"node {node}: "), first
        assert first.blamed == [node]
        assert node not in chains.hosts(last.nodes) and last.job == jobs["learn"]
        assert_same_end(config, place.whole)
        return first
    finally:
        mend()


@scenario
def a_collection(place: Place) -> None:
    """Encoded and tokenised on two nodes, by the ranks of srun and of mpirun: the bytes that one process makes."""
    corpus = place.data / "corpus.jsonl"
    small_parts = (sys.executable, "-m", "tests.end_to_end.with_fault", "none")
    nodes = ("-N2", "--ntasks-per-node=1")
    launchers = {
        "alone": (),
        "srun": ("srun", *nodes, "--mpi=none", "--kill-on-bad-exit=1"),
        # the nodes of the test bed share one memory, through which Open MPI would not find its ranks
        "mpirun": ("salloc", *nodes, "mpirun", "--allow-run-as-root", "--mca", "btl", "self,tcp"),
    }
    encode = ("encode", str(place.model), str(corpus), "--part-texts", "10", "--threads", "1", "--out")
    tokens = ("data", "tokens", "--base", str(place.model), "--corpus", str(corpus), "--processes", "1", "--cache-dir")
    for name, launcher in launchers.items():
        out = place.folder / name
        for command in ((*encode, str(out / "vectors.npy")), (*tokens, str(out / "cache"))):
            out.mkdir(exist_ok=True)
            done = subprocess.run(
                [*launcher, *small_parts, *command],
                cwd=chains.ROOT,
                env=chains.SHELL,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, (name, done)
            assert ("2 ranks" in done.stdout) == bool(launcher), (name, done)
    made = [_files(place.folder / name) for name in launchers]
    assert made[0] == made[1] == made[2]
    assert {"vectors.npy", "vectors.ids"} < made[0].keys() and len(made[0]) > 4


def _files(folder: Path) -> dict[str, bytes]:
    """Contents by path, but for what a cache remembers of the files that it has read."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "hashes"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@scenario
def sbatch_refuses(place: Place) -> None:
    """The second job is refused: its message reaches the user, and the first one isn't left behind."""
    config = _chain(place, partition="short", time_minutes=5, evaluate_minutes=60)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=str(place.data / "test.jsonl")))
    path = chains.write(config, place.folder / "submitted.yaml")
    done = lbr("submit", str(path))
    assert done.returncode == 1 and "time limit is invalid" in done.stderr.lower(), done
    assert "Nothing of this run is queued" in done.stderr
    queue = chains.slurm("squeue", "-h", "-o", "%j", "-p", "short")
    assert not [name for name in queue.split() if name.startswith("run-")]
    assert not journal.submissions(config.run_path)


@scenario
def the_controller_starts_again(place: Place) -> None:
    """While all the others run: no job is lost, and a job that wants its requeue meanwhile asks again."""
    pause = place.folder / "pause"
    pause.write_text("5")  # or it is over before a command has given up waiting for the controller
    config = place.long(nodes=1, environment={"LBR_TRIAL_PAUSE": str(pause)})
    submit(config, place.folder)
    wait_step(config, 3)
    place.bed.stop_controller()
    try:
        said = lbr("status", str(config.run_path))
        assert said.returncode == 1 and said.stderr.startswith("error: squeue: "), said
        send(config, 0, signal.SIGTERM)
        wait("it asks for its requeue", lambda: "asking again" in _log(config), config.run_path, 60)
    finally:
        place.bed.start_controller()
    pause.write_text("0")
    found = wait_over(config.run_path, 240)
    assert found["learn"]["state"] == "finished" and outcomes(config)[0] == "interrupted", found


def _log(config: RunConfig) -> str:
    return journal.log_file(config.run_path, "learn").read_text()


def _chain(place: Place, **slurm: Any) -> RunConfig:
    """`long`, with a second stage behind it."""
    return dataclasses.replace(place.long(**slurm), represent=RepresentConfig(steps=3, batch_pairs=8, chunk_tokens=192))


@scenario
def chain(place: Place) -> tuple[Path, RunConfig, dict[str, str]]:
    """All stages on two nodes, four ranks, with names and values that a shell would execute; see `test_chain.py`."""
    folder = place.folder / NASTY_NAME
    folder.mkdir()
    config = tiny_run(
        folder / "run; $(touch executed)",
        place.model,
        place.data,
        slurm=SlurmConfig(
            nodes=2,
            gpus_per_node=2,
            cpus_per_task=1,
            time_minutes=30,
            lead_seconds=60,
            evaluate_minutes=10,
            job_name="job; $(touch executed) 'q' \"d\" %j",
            environment={"LBR_TRIAL": NASTY_VALUE, "CUDA_VISIBLE_DEVICES": ""},
            setup=("LBR_SETUP='from the config'", "export LBR_SETUP"),
            pass_environment=("LBR_PASSED",),
            extra={"comment": "$(touch executed); 'c'"},
            check_gpus=False,
        ),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, query_prompt=NASTY_VALUE))
    jobs = submit(config, folder, LBR_PASSED=NASTY_VALUE, **DIRTY)
    names = chains.slurm("squeue", "-h", "-o", "%j")
    assert config.slurm.job_name is not None and names.count(config.slurm.job_name) == 3
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["finished"] * 3, chains.told(config.run_path)
    return folder, config, jobs


@scenario
def nodes_die(place: Place) -> None:
    """The first node, and with it the job's own part; then another one. Each time the run goes on without it."""
    config, bed = place.long(), place.bed
    submit(config, place.folder)
    wait_step(config, 7)
    bed.crash_node(first := chains.node_of(config, 0))
    wait("Slurm has noticed", lambda: len(tries(config)) > 1, config.run_path)
    assert outcomes(config)[0] == "lost" and "ended without a word" in tries(config)[0].reason
    assert first not in chains.hosts(tries(config)[1].nodes)
    bed.start_node(first)

    wait_step(config, 14)
    bed.crash_node(second := chains.node_of(config, 1))
    wait("the try is over", lambda: outcomes(config)[1], config.run_path)
    assert outcomes(config)[1] == "failed" and f"{second} gave no answer" in tries(config)[1].reason, tries(config)
    found = wait_over(config.run_path)
    assert found["learn"]["state"] == "finished", chains.told(config.run_path)
    assert second not in chains.hosts(tries(config)[2].nodes)
    assert_same_end(config, place.whole)
    bed.start_node(second)
    bed.wait_up()


@scenario
def preemption(place: Place) -> None:
    """A run leaves politely for a job of a higher partition, which does not count as done, and comes back."""
    config = _chain(place)
    jobs = submit(config, place.folder)
    wait_step(config, 7)
    urgent = [
        "sbatch",
        "-p",
        "urgent",
        "-N3",
        "--exclusive",
        "-o",
        str(place.folder / "urgent.out"),
        "--wrap",
        "sleep 2",
    ]
    chains.slurm(*urgent)
    wait("it has left", lambda: outcomes(config)[0], config.run_path)
    assert outcomes(config) == ["interrupted"]
    found = status(config.run_path)
    assert found["learn"]["state"] in ("requeued", "running") and found["represent"]["state"] == "waiting", found
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["finished"] * 2, chains.told(config.run_path)
    assert {each.job for each in tries(config)} == {jobs["learn"]}
    assert_same_end(config, place.whole)
