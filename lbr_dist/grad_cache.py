"""The gradient cache: a contrastive batch of any size in the memory of one chunk, exact across ranks.

    pass 1   representations of every chunk, without graphs (the last chunk keeps its graph)
    loss     on the gathered representations of all ranks; its gradient for this rank's is the cache
    pass 2   each chunk again, with a graph, and backward of <representation, cached gradient>
    reduce   the parameters' gradients, once

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv 2101.06983), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lbr_dist.data.packing import PackedRow
from lbr_dist.engine import Engine


@dataclass(frozen=True, slots=True)
class RandomState:
    """The random generators that a chunk's dropout draws from: the CPU's, and the current device's."""

    cpu: Tensor
    device: Tensor | None

    @staticmethod
    def capture() -> RandomState:
        return RandomState(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Run the block with these states, and put the present ones back."""
        present = RandomState.capture()
        self._set()
        try:
            yield
        finally:
            present._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)


def forward_backward(
    engine: Engine,
    chunks: list[PackedRow],
    build_cache: Callable[[list[Tensor]], list[Tensor]],
    **options: object,
) -> None:
    """Accumulate the gradient of a loss over the representations of all chunks of all ranks.

    Args:
        engine: an `LBRModel` under ZeRO-3.
        chunks: this rank's; their number is the same on every rank.
        build_cache: from each chunk's representations (``[sequences, d]`` float32, detached) to the gradients
            of the global loss for them, of the same shapes. It holds the collectives.
        options: what the model's `embed` task takes beside the rows.
    """
    states: list[RandomState] = []
    representations: list[Tensor] = []
    for chunk in chunks[:-1]:
        states.append(RandomState.capture())
        with torch.no_grad():
            representations.append(engine(chunk, task="embed", **options))
    # the last chunk's graph is kept: it need not run twice, and one chunk alone is an ordinary step
    last = engine(chunks[-1], task="embed", **options)
    cache = build_cache([*representations, last.detach()])
    with engine.accumulate():
        engine.backward(surrogate(last, cache[-1]))
        for chunk, state, gradient in zip(chunks[:-1], states, cache[:-1], strict=True):
            with state.replay():
                again = engine(chunk, task="embed", **options)
            engine.backward(surrogate(again, gradient))


def surrogate(representation: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient for the representation is `gradient`: no mean over chunks, no second scale."""
    return (representation.float() * gradient).sum()
