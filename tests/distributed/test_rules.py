"""Each rule that stage 2's exactness depends on, broken on purpose: the gradient no longer equals one process's.

So `test_contrastive.py` detects the loss of any of these rules.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbr_dist import represent
from lbr_dist.contrastive import grad_cache, loss
from lbr_dist.contrastive.exchange import Exchange
from lbr_dist.contrastive.loss import BatchLoss, Contrast
from lbr_dist.data.pairs import PairBatch, load_pairs
from lbr_dist.engine import Engine
from tests.distributed import on_ranks_represent as on_ranks
from tests.distributed import single
from tests.distributed.test_contrastive import crowded, setting
from tests.distributed.test_exactness import TOLERANCE
from tests.ranks import RankPool


def _patched(owner: Any, name: str, broken: Any) -> Callable[[], None]:
    original = getattr(owner, name)
    setattr(owner, name, broken)
    return lambda: setattr(owner, name, original)


def no_remote_terms() -> Callable[[], None]:
    """A document's gradient comes only from its own rank's queries."""

    def reduce(self: Exchange, gradient: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return gradient.split(list(counts))[self.ranks.rank]

    return _patched(Exchange, "reduce", reduce)


def mean_over_chunks() -> Callable[[], None]:
    """The surrogate is averaged over the representations of a chunk."""
    original = grad_cache.surrogate
    return _patched(grad_cache, "surrogate", lambda vectors, gradient: original(vectors, gradient) / len(vectors))


def local_mean() -> Callable[[], None]:
    """A rank's loss is the mean over its own queries, not a share of the mean over all."""
    original = Contrast.loss

    def local(self: Contrast, representations: torch.Tensor, temperature: float | torch.Tensor) -> BatchLoss:
        own = len(self.queries.numbers)
        self.weight *= len(self.batch.queries) / max(1, own) / self.exchange.ranks.world_size
        return original(self, representations, temperature)

    return _patched(Contrast, "loss", local)


def mean_over_ranks() -> Callable[[], None]:
    """DeepSpeed's mean over the ranks is not undone: gradients are 1 / world_size of the true ones."""
    return _patched(Engine, "backward", lambda self, loss: self._engine.backward(loss))


def other_dropout() -> Callable[[], None]:
    """The second pass draws different dropout from the first."""
    return _patched(grad_cache, "seed_chunk", lambda key, number: None)


def the_last_chunk_only() -> Callable[[], None]:
    """A chunk's gradient replaces that of the chunk before it."""
    original = Engine.backward

    def backward(self: Engine, loss: torch.Tensor) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        original(self, loss)

    return _patched(Engine, "backward", backward)


def other_order() -> Callable[[], None]:
    """The gathered rows are not in the order of the columns."""
    original = Exchange.gather
    return _patched(Exchange, "gather", lambda self, rows, counts: original(self, rows, counts).flip(0))


def own_temperature() -> Callable[[], None]:
    """The temperature's gradient comes only from one rank's queries."""
    original = represent.surrogate

    def surrogate(scale: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return original(scale, gradient * torch.distributed.get_rank())

    return _patched(represent, "surrogate", surrogate)


def no_masks() -> Callable[[], None]:
    """A query's other known positives are among its negatives."""
    original = loss.padded
    return _patched(loss, "padded", lambda columns: original([row[:1] for row in columns]))


RULES = [
    no_remote_terms,
    mean_over_chunks,
    local_mean,
    mean_over_ranks,
    the_last_chunk_only,
    other_order,
    own_temperature,
    no_masks,
]


def expected_and_found(
    pool: RankPool, base: Path, data: Path, folder: Path, broken: on_ranks.Break | None
) -> tuple[single.Gradients, single.Gradients]:
    config = setting(base, data, folder, {}, learn_temperature=True)
    model, tokenizer = single.model_of(config)
    batch: PairBatch = crowded(load_pairs(config, tokenizer).batch(config.represent, 0, seed=5))
    expected = single.gradients(model, single.represent_loss(model, batch, tokenizer.sink_id, config.represent))
    result = pool.run(on_ranks.represent_gradients, config=config, batches=[batch], broken=broken)[0]
    return expected, result["gradients"]


def largest_error(expected: single.Gradients, found: single.Gradients) -> float:
    return max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in expected.items())


@pytest.mark.parametrize("broken", RULES, ids=lambda rule: rule.__name__)
def test_a_broken_rule_gives_a_wrong_gradient(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, broken: on_ranks.Break
) -> None:
    expected, found = expected_and_found(two_ranks, tiny_model, tiny_data, tmp_path, broken)
    assert largest_error(expected, found) > 100 * TOLERANCE


def test_without_a_broken_rule_the_gradient_is_exact(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The same comparison with nothing broken: without it the other tests would prove nothing."""
    assert largest_error(*expected_and_found(two_ranks, tiny_model, tiny_data, tmp_path, None)) < TOLERANCE


def test_other_dropout_in_the_second_pass_gives_a_wrong_gradient(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Dropout is the same with and without kept graphs, unless the second pass draws its own."""
    from lbr_dist.config import LoraConfig

    found = []
    for kept, broken in ((99, None), (1, None), (1, other_dropout)):
        lora = LoraConfig(rank=3, dropout=0.3)
        config = setting(tiny_model, tiny_data, tmp_path, {"lora": lora}, keep_graphs=kept)
        _, tokenizer = single.model_of(config)
        batch = load_pairs(config, tokenizer).batch(config.represent, 0, seed=5)
        result = two_ranks.run(on_ranks.represent_gradients, config=config, batches=[batch], broken=broken)[0]
        found.append(result["gradients"])
    whole, cached, wrong = found
    assert largest_error(whole, cached) < TOLERANCE
    assert largest_error(whole, wrong) > 100 * TOLERANCE
