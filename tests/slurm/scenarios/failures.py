"""Runs with a fault: in a rank, a node, a disk, a stage, or sbatch."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import time
from pathlib import Path

from lbr_dist.slurm import journal
from lbr_dist.slurm.journal import Try
from lbr_dist.status.stages import saved_step
from tests.faults.runs import assert_same_end, checkpoints
from tests.slurm import chains
from tests.slurm.chains import lbr, outcomes, ranks, send, submit, tries, wait, wait_over, wait_step
from tests.slurm.scenarios.place import Place, two_stages


def killed_and_hung(place: Place) -> None:
    """A rank is killed, then one hangs: each attempt ends within its deadline, and the next one leaves out its node."""
    config = place.long(max_retries=5)
    submit(config, place.folder)
    wait_step(config, 7)
    node = chains.node_of(config, 1)
    send(config, 1, signal.SIGKILL)
    wait("the first attempt has ended", lambda: outcomes(config)[0], config.run_path)
    first = tries(config)[0]
    assert first.outcome == "failed" and f"rank 1 on {node} was killed: Killed" in first.reason, first
    assert first.blamed == [node], "there is a third node"

    wait_step(config, 14)
    assert node not in chains.hosts(tries(config)[1].nodes)
    began = time.monotonic()
    hung, node = ranks(config)[1], chains.node_of(config, 1)
    send(config, 1, signal.SIGSTOP)
    wait(
        "the second attempt has ended", lambda: len(outcomes(config)) > 1 and outcomes(config)[1], config.run_path, 240
    )
    # cluster.timeout_minutes, slurm.wait_seconds for the rank that cannot exit by itself, and time for the machine
    assert time.monotonic() - began < 90 + 15 + 60
    second = tries(config)[1]
    assert second.outcome == "failed" and f"rank 1 on {node} hung" in second.reason, second
    wait("the hung rank has exited", lambda: not Path(f"/proc/{hung}").exists(), config.run_path, 20)
    assert (config.run_path / "learn" / "logs" / "rank-0.stacks").exists()
    found = wait_over(config.run_path, 300)
    assert found["learn"]["state"] == "finished", chains.log_tails(config.run_path)
    assert_same_end(config, place.whole)
    assert not ranks(config)


def the_first_stage_fails(place: Place) -> None:
    """The error reaches the user; the second stage never starts, and its status says why."""
    config = two_stages(place, nodes=1)
    base = place.folder / "base"
    shutil.copytree(place.model, base)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, base=str(base)))
    jobs = submit(config, place.folder, LBR_TRIAL="1")
    # damaged after the checks of `lbr submit`, before the job reads it
    (base / "model.safetensors").write_bytes(b"not a model")
    found = wait_over(config.run_path)
    assert found["learn"]["state"] == "failed" and "model.safetensors" in found["learn"]["reason"], found
    assert found["represent"]["state"] == "cancelled" and found["represent"]["reason"] == "learn failed", found
    assert len(tries(config)) == 1, "a user error is not tried again"
    assert not (config.run_path / "represent").exists() and jobs.keys() == {"learn", "represent"}


def a_full_disk(place: Place) -> None:
    """No room for a checkpoint: the stage fails with that message, and nothing that was saved is lost."""
    config = dataclasses.replace(place.long(nodes=1), run_dir=str(place.small_disk / "run"))
    submit(config, place.folder)
    wait_step(config, 7)
    ballast = place.small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:  # a buffer would be flushed, and fail, when the file is closed
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            pass
    found = wait_over(config.run_path)
    assert found["learn"]["state"] == "failed" and "Make room" in found["learn"]["reason"], found
    ballast.unlink()
    saved = saved_step(config, "learn")
    assert saved >= 5 and checkpoints(config).verify(saved).step == saved


def a_broken_node(place: Place) -> None:
    """A node that cannot write the run folder is found before the ranks start, and left out of the next attempt."""
    _on_a_broken_node(place, "n2")


def a_broken_first_node(place: Place) -> None:
    """The same, when not even the job's own log can be opened."""
    tried = _on_a_broken_node(place, "n1")
    assert tried.nodes == "n1" and "an attempt on it could not use" in tried.reason


def _on_a_broken_node(place: Place, node: str) -> Try:
    """Run on a broken node. Returns the attempt that met it."""
    config = place.long(node_check=True)
    (place.folder / "run").mkdir(mode=0o700)
    undo = place.bed.read_only(node, place.folder / "run")
    try:
        jobs = submit(config, place.folder)
        assert wait_over(config.run_path, 240)["learn"]["state"] == "finished", chains.log_tails(config.run_path)
        first, last = tries(config)
        assert first.outcome == "refused" and first.reason.startswith(f"node {node}: "), first
        assert first.blamed == [node]
        assert node not in chains.hosts(last.nodes) and last.job == jobs["learn"]
        assert_same_end(config, place.whole)
        return first
    finally:
        undo()


def sbatch_refuses(place: Place) -> None:
    """sbatch refuses the third job: its message reaches the user, and the jobs before it are cancelled."""
    config = two_stages(place, partition="short", time_minutes=5, evaluate_minutes=60)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=str(place.data / "test.jsonl")))
    path = chains.write(config, place.folder / "submitted.yaml")
    done = lbr("submit", str(path))
    assert done.returncode == 1 and "time limit is invalid" in done.stderr.lower(), done
    assert "Nothing of this run is queued" in done.stderr
    queue = chains.slurm("squeue", "-h", "-o", "%j", "-p", "short")
    assert not [name for name in queue.split() if name.startswith("run-")]
    assert not journal.submissions(config.run_path)


def nodes_die(place: Place) -> None:
    """The first node dies, with the job's own part on it; then another one. Each time the run resumes without it."""
    config, bed = place.long(), place.bed
    submit(config, place.folder)
    wait_step(config, 7)
    bed.crash_node(first := chains.node_of(config, 0))
    wait("Slurm has noticed", lambda: len(tries(config)) > 1, config.run_path)
    assert outcomes(config)[0] == "lost" and "ended without a record" in tries(config)[0].reason
    assert first not in chains.hosts(tries(config)[1].nodes)
    bed.start_node(first)

    wait_step(config, 14)
    bed.crash_node(second := chains.node_of(config, 1))
    wait("the attempt has ended", lambda: outcomes(config)[1], config.run_path)
    assert outcomes(config)[1] == "failed" and f"{second} stopped responding" in tries(config)[1].reason, tries(config)
    found = wait_over(config.run_path)
    assert found["learn"]["state"] == "finished", chains.log_tails(config.run_path)
    assert second not in chains.hosts(tries(config)[2].nodes)
    assert_same_end(config, place.whole)
    bed.start_node(second)
    bed.wait_up()
