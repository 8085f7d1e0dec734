"""What a step holds in memory, which graphs and chunks the planner chooses, and its messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.config import LoraConfig
from lbr_dist.errors import ConfigError
from lbr_dist.plan.cost import StepCost
from lbr_dist.plan.model import model_sizes
from tests.unit.plan.cases import INNER, LAYERS, D, model_config, planner


def test_memory_between_steps(base: Path) -> None:
    held, host = planner(base).standing(planner(base).config, model_sizes(model_config(base), base), 64)
    elements = model_sizes(model_config(base), base).elements()
    assert held["parameters: shards"] == pytest.approx(2 * elements / 64, rel=1e-4)
    assert held["optimizer: master weights and two moments"] == pytest.approx(12 * elements / 64, rel=1e-4)
    assert host == 0
    plan = StepCost(planner(base, engine={"offload_optimizer": "cpu", "offload_parameters": "cpu"})).plan()
    assert plan.memory["parameters: shards"] == plan.memory["optimizer: master weights and two moments"] == 0
    assert plan.host == pytest.approx(16 * elements / 64, rel=1e-4)


def test_only_adapters_have_gradients_and_states(base: Path) -> None:
    model = model_config(base, bottleneck_tokens=8, lora=LoraConfig(rank=16, targets=("q_proj", "down_proj")))
    sizes = model_sizes(model, base)
    assert sizes.elements(trained=True) == LAYERS * 16 * (2 * D + D + INNER) + 8 * D
    plan = StepCost(planner(base, model=model)).plan()
    assert plan.memory["gradients: whole, of all chunks"] == 2 * sizes.elements(trained=True)


def test_more_memory_never_keeps_fewer_graphs(base: Path) -> None:
    tokens = [8192, 8000, 7900, 7800, 7000, 7000, 6000]
    kept = [planner(base, represent={"chunk_tokens": 8192}, gib=gib).kept(tokens) for gib in range(80, 600, 20)]
    assert kept == sorted(kept)
    assert kept[0] == 1
    assert kept[-1] == len(tokens)


def test_the_kept_graphs_fit_and_one_more_does_not(base: Path) -> None:
    here = planner(base, gib=200)
    tokens = [8192] * 9
    kept = here.kept(tokens)
    assert 1 < kept < 9
    assert sum(here.memory(tokens, kept, here.batch).values()) <= here.budget
    assert sum(here.memory(tokens, kept + 1, here.batch).values()) > here.budget


def test_a_given_number_of_graphs_is_kept(base: Path) -> None:
    here = planner(base, represent={"keep_graphs": 3})
    assert here.kept([8192] * 9) == 3
    assert here.kept([8192] * 2) == 2


def test_planned_chunks_hide_a_gather_or_fit(base: Path) -> None:
    checkpointed = model_config(base, activation_checkpointing=True)
    # gathering 2 bytes per parameter at 50 GB/s takes as long as two operations per parameter for about 9,000 tokens at
    # 45 % of the peak
    assert 8192 < planner(base, model=checkpointed, represent={"chunk_tokens": None}).chunk_tokens <= 10240
    resident = planner(base, model=checkpointed, represent={"chunk_tokens": None}, engine={"live_elements": 10**10})
    assert resident.chunk_tokens == 4096
    assert planner(base, represent={"chunk_tokens": None}, gib=50).chunk_tokens < 5000


def test_a_step_that_cannot_fit_names_settings_that_would(base: Path) -> None:
    with pytest.raises(ConfigError) as error:
        planner(base, represent={"chunk_tokens": 32768}, gib=72)
    message = str(error.value)
    assert "represent.chunk_tokens: a step with one chunk of 32,768 tokens needs" in message
    assert "72.0 GiB may be used" in message
    assert "model.activation_checkpointing true" in message
    chunk = int(message.split("What would fit: represent.chunk_tokens ")[1].split(";")[0])
    planner(base, represent={"chunk_tokens": chunk})
    with pytest.raises(ConfigError, match=r"What would fit: 4 ranks; engine\.offload_optimizer cpu"):
        planner(base, ranks=2, gib=72, model=model_config(base, activation_checkpointing=True))
