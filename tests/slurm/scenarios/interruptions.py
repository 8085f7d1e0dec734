"""Runs that are interrupted: by a time limit, a preemption, the controller, or their user."""

from __future__ import annotations

import signal
import time

from lbr_dist.config import RunConfig
from lbr_dist.ranks.interrupt import END_TIME
from lbr_dist.slurm import journal
from lbr_dist.status.stages import saved_step
from tests.faults.runs import assert_same_end
from tests.slurm import chains
from tests.slurm.chains import lbr, outcomes, ranks, send, status, submit, tries, wait, wait_over, wait_step
from tests.slurm.scenarios.place import Place, two_stages


def time_limits(place: Place) -> None:
    """A limit of two minutes: USR2 before it, a save, a requeue, until it is done, with the uninterrupted result."""
    # Slurm checks limits twice a minute, and may warn that much earlier
    pause = place.folder / "pause"
    pause.write_text("2.5")
    environment = {"LBR_TRIAL_PAUSE": str(pause)}
    config = place.long(time_minutes=2, lead_seconds=60, max_retries=10, environment=environment)
    jobs = submit(config, place.folder)
    wait_step(config, 1)
    left = float(chains.variables(chains.ranks(config)[1])[END_TIME]) - time.time()
    assert 0 < left < 120, "the ranks know the time limit"
    wait("two limits are reached", lambda: outcomes(config).count("interrupted") >= 2, config.run_path, 900)
    pause.write_text("0")
    found = wait_over(config.run_path, 400)
    assert found["learn"]["state"] == "finished", chains.log_tails(config.run_path)
    assert {each.job for each in tries(config)} == {jobs["learn"]}, "a requeued job keeps its id"
    assert any(each.progressed for each in tries(config)[:-1])
    assert "asked to stop, and saved" in tries(config)[0].reason
    assert_same_end(config, place.whole)


def cancelled(place: Place) -> None:
    """`lbr cancel` in mid-step: the whole chain ends, and no job is requeued although the ranks save and exit."""
    config = two_stages(place, nodes=1)
    submit(config, place.folder)
    wait_step(config, 3)
    done = lbr("cancel", str(config.run_path))
    assert done.returncode == 0 and done.stdout.count("is cancelled") == 2, done
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["cancelled", "cancelled"], found
    assert "by `lbr cancel`" in found["learn"]["reason"]
    wait("no rank is left", lambda: not ranks(config), config.run_path, 30)
    time.sleep(6)
    assert status(config.run_path)["learn"]["state"] == "cancelled", "a cancelled job is not requeued"
    assert lbr("cancel", str(config.run_path)).stdout.strip().endswith("none of its jobs is queued or running")


def scancelled(place: Place) -> None:
    """`scancel` of the first job: the waiting jobs end too, and `lbr submit` then resumes from the checkpoint."""
    config = two_stages(place, nodes=1)
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
    saved = saved_step(config, "learn")
    assert saved >= 10
    wait("no rank is left", lambda: not ranks(config), config.run_path, 30)
    submit(config, place.folder)
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["finished"] * 2, chains.log_tails(config.run_path)
    assert tries(config)[1].first_step == saved


def the_controller_starts_again(place: Place) -> None:
    """The controller restarts: no job is lost, and a job that needs its requeue in the meantime asks again."""
    pause = place.folder / "pause"
    pause.write_text("5")  # otherwise the run ends before a command gives up waiting for the controller
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


def preemption(place: Place) -> None:
    """A run saves and makes room for a job of a higher partition; it does not count as done, and resumes later."""
    config = two_stages(place)
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
    wait("the run has made room", lambda: outcomes(config)[0], config.run_path)
    assert outcomes(config) == ["interrupted"]
    found = status(config.run_path)
    assert found["learn"]["state"] in ("requeued", "running") and found["represent"]["state"] == "waiting", found
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["finished"] * 2, chains.log_tails(config.run_path)
    assert {each.job for each in tries(config)} == {jobs["learn"]}
    assert_same_end(config, place.whole)
