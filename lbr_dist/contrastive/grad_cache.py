"""The gradient cache: a contrastive batch of any size in the memory of one chunk, exact across ranks.

    pass 1   representations of every chunk; chunks whose graphs fit into memory keep them, the others run without
    loss     on the gathered representations of all ranks; its gradient for this rank's representations is the cache
    pass 2   backward of <representation, cached gradient>: through the kept graphs, then chunk by chunk, run again

Keeping every graph makes this one ordinary pass. The parameters' gradients add up over the chunks and are reduced
once, when the caller's `Engine.accumulate` block ends.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv 2101.06983), section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lbr_dist.data.packing import PackedRow
from lbr_dist.data.sampler import seed_of
from lbr_dist.engine import Engine

ChunkOf = Callable[[int], PackedRow]
BuildCache = Callable[[Tensor], Tensor]
"""From the representations of all of this rank's chunks, ``[sequences, d]`` float32 and detached, to the gradient of
the global loss for them. The collectives happen in here."""


def forward_backward(
    engine: Engine, chunk: ChunkOf, count: int, kept: int, build_cache: BuildCache, key: str, **options: object
) -> None:
    """Accumulate the gradient of a loss over the representations of all chunks of all ranks.

    Args:
        engine: an `LBRModel` under ZeRO-3.
        chunk: packs this rank's chunk of a number, anew in each pass: all of them at once would take memory.
        count: number of chunks; the same on every rank.
        kept: how many chunks, from the first on, keep their graphs; the same on every rank.
        build_cache: the loss.
        key: seeds dropout; different for each step and rank.
        options: further arguments of the model's `embed` task.
    """

    def embed(number: int) -> Tensor:
        # both passes of a chunk draw the same dropout, whatever ran between them
        seed_chunk(key, number)
        representations: Tensor = engine(chunk(number), task="embed", **options)
        return representations

    replayed = range(kept, count)
    with torch.no_grad():
        without_graph = [embed(number) for number in replayed]
    with_graph: list[Tensor | None] = [embed(number) for number in range(kept)]
    every = [r.detach() for r in (*with_graph, *without_graph) if r is not None]
    sizes = [len(representations) for representations in every]
    whole = torch.cat(every)
    del every, without_graph
    cache = build_cache(whole).split(sizes)
    # in chunk order, so that the sums have the same bits however many graphs are kept
    for number in range(kept):
        representations, with_graph[number] = with_graph[number], None
        assert representations is not None
        engine.backward(surrogate(representations, cache[number]))
        del representations  # and its graph
    for number in replayed:
        engine.backward(surrogate(embed(number), cache[number]))


def seed_chunk(key: str, number: int) -> None:
    """Seed the generators of the CPU and of every device for one chunk."""
    torch.manual_seed(seed_of(f"{key}/{number}"))


def surrogate(representations: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient for the representations is `gradient`: no mean over chunks, no second scale."""
    return (representations.float() * gradient).sum()
