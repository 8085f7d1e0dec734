"""What takes whole nodes: a crash, and jobs that matter more. Played alone, since all runs on the nodes are met."""

from __future__ import annotations

import subprocess
from concurrent.futures import Future, wait
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.slurm.testbed.bed import Bed
from tests.faults.runs import assert_same_end
from tests.slurm import chains
from tests.slurm.chains import long_run, outcomes, status, submit, tries, wait_over, wait_step


@pytest.fixture(scope="module")
def alone(bed: Bed, played: dict[str, Future[None]]) -> Bed:
    """The bed, when nothing else is on it but the run that meets its time limits, and may meet these faults too."""
    wait([each for name, each in played.items() if name != "time_limits"])
    return bed


def test_nodes_die(alone: Bed, whole: RunConfig, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The first node, and with it the job's own part; then another one. Each time the run goes on without it."""
    bed = alone
    config = long_run(tmp_path / "run", tiny_model, tiny_data)
    submit(config, tmp_path)
    wait_step(config, 7)
    bed.crash_node(first := chains.node_of(config, 0))
    chains.wait("Slurm has noticed", lambda: len(tries(config)) > 1, config.run_path, 90)
    assert outcomes(config)[0] == "lost" and "ended without a word" in tries(config)[0].reason
    assert first not in chains.hosts(tries(config)[1].nodes)
    bed.start_node(first)

    wait_step(config, 14)
    bed.crash_node(second := chains.node_of(config, 1))
    chains.wait("the try is over", lambda: outcomes(config)[1], config.run_path, 90)
    assert outcomes(config)[1] == "failed" and f"{second} gave no answer" in tries(config)[1].reason, tries(config)
    found = wait_over(config.run_path)
    assert found["learn"]["state"] == "finished", chains.told(config.run_path)
    assert second not in chains.hosts(tries(config)[2].nodes)
    assert_same_end(config, whole)
    bed.start_node(second)
    bed.wait_up()


def test_preemption(alone: Bed, whole: RunConfig, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Two runs on the same nodes leave politely for a job of a higher partition; neither counts as done."""
    both = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        config = long_run(folder / "run", tiny_model, tiny_data)
        jobs = submit(config, folder)
        both.append((config, jobs["learn"]))
    for config, _ in both:
        wait_step(config, 7)
    urgent = ["sbatch", "--wait", "-p", "urgent", "-N3", "--exclusive", "-o", str(tmp_path / "urgent.out"), "--wrap"]
    done = subprocess.Popen([*urgent, "sleep 2"], stdout=subprocess.DEVNULL, env=chains.SHELL)
    for config, _ in both:
        chains.wait("it has left", lambda config=config: outcomes(config)[0], config.run_path, 60)
        assert outcomes(config) == ["interrupted"]
        assert status(config.run_path)["learn"]["state"] in ("requeued", "running")
    assert done.wait(60) == 0
    for config, job in both:
        found = wait_over(config.run_path)
        assert found["learn"]["state"] == "finished", chains.told(config.run_path)
        assert {each.job for each in tries(config)} == {job}
        assert_same_end(config, whole)
