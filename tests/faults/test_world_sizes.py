"""A run resumes on another number of ranks: with the same state to the bit, the same next batch, the same losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lbr_dist.checkpoint.shards import KINDS, ShardReader
from lbr_dist.config import CheckpointConfig, LoraConfig, RunConfig, StageName
from lbr_dist.model.sharding import extent
from tests.configs import tiny_run
from tests.faults import on_ranks
from tests.faults.runs import checkpoints, losses
from tests.ranks import RankPool

SIZES = (4, 2, 8, 1)


def assert_same_state(found: on_ranks.State, expected: on_ranks.State) -> None:
    for kind, tensors in expected.items():
        assert found[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[kind][name], tensor), (kind, name)


@pytest.fixture(scope="module")
def pools(two_ranks: RankPool) -> Iterator[dict[int, RankPool]]:
    found = {size: two_ranks if size == 2 else RankPool(size) for size in SIZES}
    yield found
    for pool in found.values():
        if pool is not two_ranks:
            pool.close()


CASES: dict[str, tuple[StageName, str, int]] = {
    "learn, bfloat16": ("learn", "bfloat16", 0),
    "learn, adapters": ("learn", "float32", 2),
    "represent, float32": ("represent", "float32", 0),
}


@pytest.mark.parametrize("case", CASES)
def test_other_world_sizes(
    pools: dict[int, RankPool], tiny_model: Path, tiny_data: Path, tmp_path: Path, case: str
) -> None:
    """Two steps on each of 4, 2, 8 and 1 ranks; each starts with exactly the state that the previous one ended with."""
    stage, dtype, rank = CASES[case]
    config = tiny_run(tmp_path / "changing", tiny_model, tiny_data)
    model = dataclasses.replace(config.model, dtype=dtype, lora=LoraConfig(rank=rank))  # type: ignore[arg-type]
    steps = {"learn": 8 if stage == "learn" else 0, "represent": 8}
    config = dataclasses.replace(
        config,
        model=model,
        learn=dataclasses.replace(config.learn, steps=steps["learn"], diagnose_every=0),
        represent=dataclasses.replace(config.represent, steps=steps["represent"]),
        checkpoint=CheckpointConfig(every_steps=2, keep=9),
    )
    steady = dataclasses.replace(config, run_dir=str(tmp_path / "steady"))
    _, numbers = pools[2].run(on_ranks.train, config=steady, stage=stage)[0]
    assert numbers == list(range(8))
    drawn: list[int] = []
    for place, size in enumerate(SIZES):
        done = 2 * place
        if done:
            folder = checkpoints(config, stage)
            for later in [step for step in folder.steps() if step > done]:
                folder.remove(later)
            manifest = folder.read(done)
            with ShardReader(folder.folder(done), manifest.parameters, manifest.world_size) as reader:
                saved = {kind: {n: reader.whole(kind, n) for n in manifest.parameters} for kind in KINDS}
            for found, state in pools[size].run(on_ranks.load, config=config, stage=stage):
                for kind in KINDS:
                    for name, tensor in saved[kind].items():
                        assert torch.equal(found[kind][name].flatten(), tensor), (kind, name)
                for name, weight in found["weights"].items():
                    assert torch.equal(weight, found["master"][name].to(weight.dtype)), name
                assert state["step"] == done
        results = pools[size].run(on_ranks.train, config=config, stage=stage)
        drawn += results[0][1][:2]
        assert all(of_rank[1] == results[0][1] for of_rank in results)
        if size == 1:
            final = results[0][0]
    assert drawn == list(range(8)), "a batch was drawn twice, or never"
    assert final["master"]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for ours, theirs in zip(losses(config, stage), losses(steady, stage), strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=tolerance)


def test_saved_is_what_deepspeed_saves(two_ranks: RankPool, whole: RunConfig, tmp_path: Path) -> None:
    """DeepSpeed's own checkpoint, converted to its universal format, contains the same numbers."""
    two_ranks.run(on_ranks.save_with_deepspeed, config=whole, folder=tmp_path)
    manifest = checkpoints(whole).read(6)
    names = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    with ShardReader(checkpoints(whole).folder(6), manifest.parameters, manifest.world_size) as reader:
        for name, shape in manifest.parameters.items():
            for ours, theirs in names.items():
                content = torch.load(tmp_path / "universal" / "zero" / name / f"{theirs}.pt", weights_only=True)
                assert torch.equal(reader.whole(ours, name), content.flatten()), (ours, name)
                assert list(content.shape) == shape or content.ndim == 1


def test_extents_cover_every_element_once() -> None:
    for elements in (1, 2, 7, 8, 9, 1000):
        for world_size in (1, 2, 3, 4, 7, 8):
            parts = [extent(elements, rank, world_size) for rank in range(world_size)]
            assert [i for start, stop in parts for i in range(start, stop)] == list(range(elements))
