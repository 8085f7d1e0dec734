"""Operations, traffic and the largest batch of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbr_dist.errors import ConfigError
from lbr_dist.plan.cost import StepCost
from lbr_dist.plan.model import model_sizes
from tests.unit.plan.cases import model_config, planner


def test_operations_with_all_graphs_kept_and_with_one(base: Path) -> None:
    def flops(**represent: Any) -> float:
        here = planner(base, gib=2000, represent={"chunk_tokens": 8192} | represent)
        plan = StepCost(here).plan()
        return plan.flops / (here.sizes.products * plan.tokens)

    assert flops() == pytest.approx(6, rel=0.02)
    chunks = StepCost(planner(base, gib=2000)).plan().chunks
    assert flops(keep_graphs=1) == pytest.approx(8 - 2 / chunks, rel=0.02)


def test_resident_parameters_are_gathered_once(base: Path) -> None:
    used = model_sizes(model_config(base), base).elements("layer", "embedding", "other")
    for live, gathers in ((used + 64 * 1000, 1), (0, None)):
        here = planner(base, gib=2000, engine={"live_elements": live}, represent={"keep_graphs": 2})
        plan = StepCost(here).plan()
        expected = gathers or 3 * plan.chunks - 2
        assert plan.gathers == expected
        received = plan.traffic["parameters"]
        assert received.total == pytest.approx(expected * 2 * used * 63 / 64, rel=1e-3)
        assert received.within == pytest.approx(received.total * 7 / 63, rel=1e-6)


def test_the_largest_batch_fits_and_a_larger_one_does_not(base: Path) -> None:
    here = planner(base, ranks=8, represent={"chunk_tokens": 2048})
    pairs = StepCost(here).largest_batch(here.batch)
    StepCost(here).plan(here.batch.of(pairs))
    with pytest.raises(ConfigError, match=rf"represent.batch_pairs: .* At most {pairs:,} pairs fit"):
        StepCost(here).plan(here.batch.of(2 * pairs))
