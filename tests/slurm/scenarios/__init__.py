"""Things that happen to runs on a cluster, at the same time: each scenario is a function that queues its own run.

The scenarios mostly wait, for steps, deadlines or Slurm: one after another they would take several times as long, and a
real cluster has other runs on its nodes too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.slurm.scenarios.failures import (
    a_broken_first_node,
    a_broken_node,
    a_full_disk,
    killed_and_hung,
    nodes_die,
    sbatch_refuses,
    the_first_stage_fails,
)
from tests.slurm.scenarios.interruptions import (
    cancelled,
    preemption,
    scancelled,
    the_controller_starts_again,
    time_limits,
)
from tests.slurm.scenarios.place import Place
from tests.slurm.scenarios.whole_runs import (
    a_collection,
    a_sweep,
    chain,
)

Scenario = Callable[[Place], Any]

SCENARIOS: dict[str, Scenario] = {
    play.__name__: play
    for play in (
        time_limits,
        killed_and_hung,
        cancelled,
        scancelled,
        the_first_stage_fails,
        a_full_disk,
        a_sweep,
        a_broken_node,
        a_broken_first_node,
        a_collection,
        sbatch_refuses,
        the_controller_starts_again,
        chain,
        nodes_die,
        preemption,
    )
}

ALONE = {"nodes_die", "preemption", "the_controller_starts_again", "a_broken_node", "a_broken_first_node"}
"""These affect every run on the cluster, or need the nodes that Slurm takes first: they run last, one after another."""
