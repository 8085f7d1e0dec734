"""A rank is killed while it saves: the last checkpoint stays as it was, and the resumed run gives the same result."""

from __future__ import annotations

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.errors import LaunchError
from tests.distributed import on_ranks
from tests.faults.runs import assert_same_end, checkpoints, run, workers
from tests.ranks import RankPool

KILLED = [  # point, rank, steps that are published by then
    ("mid_shard", 1, [2]),
    ("mid_shard", 0, [2]),
    ("before_manifest", 0, [2]),
    ("before_rename", 0, [2]),
    ("before_pointer", 0, [2, 4]),
]


# the soak test kills at random moments; continuous integration only runs one case before and one after the rename
IN_CI = ("before_manifest", "before_pointer")


@pytest.mark.parametrize(
    ("point", "rank", "published"),
    [pytest.param(*case, marks=() if case[0] in IN_CI else pytest.mark.slow) for case in KILLED],
)
def test_killed_in_a_save(
    two_ranks: RankPool, whole: RunConfig, broken: RunConfig, point: str, rank: int, published: list[int]
) -> None:
    with pytest.raises(LaunchError, match=f"rank {rank} was killed by signal SIGKILL"):
        run(broken, rank=rank, point=point, step=4)
    assert not workers(broken.run_path)
    found = checkpoints(broken)
    assert found.steps() == published
    assert found.pointer() == 2
    assert found.verify(published[-1]).step == published[-1]
    assert found.saving(4).exists() == (point != "before_pointer")
    two_ranks.run(on_ranks.stage, config=broken, name="learn")
    assert not found.saving(4).exists()
    assert found.steps() == [2, 4, 6] and found.pointer() == 6
    assert_same_end(broken, whole)
