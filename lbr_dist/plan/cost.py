"""What a step of stage 2 costs on a cluster: traffic and time. Only `lbr plan` uses it.

traffic   bytes that one rank receives, as `ranks.traffic.Traffic` counts them, inside a node and between nodes
seconds   matrix products at an assumed share of the peak; gathers overlap with them, other traffic does not
"""

from __future__ import annotations

import math

from lbr_dist.console import gib
from lbr_dist.errors import ConfigError
from lbr_dist.plan.planner import StepPlanner, stays_whole
from lbr_dist.plan.step import Batch, Bytes, StepPlan, spread


class StepCost:
    """The cost of a planner's steps.

    Args:
        planner: decides how a step is cut into chunks and what stays in memory.
    """

    def __init__(self, planner: StepPlanner) -> None:
        self.planner = planner
        self.config, self.sizes, self.cluster = planner.config, planner.sizes, planner.cluster

    def _spread(self, nbytes: float) -> Bytes:
        return spread(nbytes, self.cluster)

    # ---- traffic --------------------------------------------------------------------------------------------------

    def _gather_again(self) -> Bytes:
        """The layers' parameters that a recomputation has released before their backward pass needs them."""
        ending = sum(p.elements for p in self.sizes.used if p.ends_layer and not stays_whole(p, self.config))
        return self._spread(self.planner.item * (self.planner.gathered_elements("layer") - ending))

    def _gathers(self, chunks: int, kept: int) -> tuple[int, int, int]:
        """How often a batch gathers the parameters: for forward passes, for backward passes, and the layers once more
        for backward passes with activation checkpointing. DeepSpeed records the order of the modules. If a step departs
        from that order (a second backward pass in a row), recomputed layers are released and gathered again."""
        if self.planner.resident:
            return 1, 0, 0
        forwards, backwards = chunks + (chunks - kept), chunks
        again = 0
        if self.planner.graph.checkpointed:
            remembers = self.config.engine.live_elements >= self.sizes.layer
            again = chunks if not remembers else 0 if kept == 1 else kept
        return forwards, backwards, again

    def traffic(self, chunks: int, kept: int, batch: Batch, most_rows: int | None = None) -> dict[str, Bytes]:
        """Bytes that a rank receives in a step. What DeepSpeed prefetches at the end of a pass and releases unused is
        not counted: at most `engine.prefetch_elements` and one parameter per pass.

        Args:
            chunks: chunks of a rank.
            kept: how many of these keep their graphs.
            batch: the global batch.
            most_rows: documents of the rank with the most. Default: an even share.
        """
        forwards, backwards, again = self._gathers(chunks, kept)
        planner, ranks, item = self.planner, self.cluster.ranks, self.planner.item
        trained = sum(math.ceil(p.elements / ranks) * ranks for p in self.sizes.used if p.trained)
        after = sum(math.ceil(p.elements / ranks) * ranks for p in self.sizes.parameters if stays_whole(p, self.config))
        symmetric = self.config.represent.symmetric
        shared = batch.documents + (batch.pairs if symmetric else 0)
        rows = ranks * (most_rows or math.ceil(shared / ranks)) * 4 * self.sizes.hidden
        backward_parts = planner.gather() if self._embeds_back() else planner.gather("layer", "other")
        batches = self.config.represent.grad_accum
        gathers = planner.gather() * forwards + backward_parts * backwards + self._gather_again() * again
        return {
            "parameters": gathers * (1 if self.planner.resident else batches) + self._spread(item * after),
            "gradients": self._spread(item * trained),
            "representations": self._exchange(rows) * (2 * batches),  # an all-gather, and the gradients' way back
            # per batch: agreement on it, unusable rows, four sums; per step: a norm of each parameter group, twice
            "counts and norms": self._spread(8 * ((2 + 1 + 4) * batches + 2 * 3)) * 2,
        }

    def _embeds_back(self) -> bool:
        return any(p.trained for p in self.sizes.parameters if p.part == "embedding")

    def _exchange(self, nbytes: float) -> Bytes:
        """The representations sent one way; see `contrastive.exchange.Exchange`."""
        ranks, local, route = self.cluster.ranks, self.cluster.ranks_per_node, self.config.represent.exchange
        even = ranks % local == 0
        if not (even and (route == "two_level" or (route == "auto" and 1 < local < ranks))):
            return self._spread(nbytes)
        nodes = ranks // local
        return Bytes(nbytes / local * (local - 1), nbytes / local / nodes * (nodes - 1))

    # ---- time -----------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch | None = None) -> StepPlan:
        """Plan the step of a batch, with equally full chunks.

        Raises:
            ConfigError: the batch's representations and one graph don't fit into memory.
        """
        batch = batch or self.planner.batch
        planner, represent, machine = self.planner, self.config.represent, self.cluster.machine
        ranks = self.cluster.ranks
        tokens = math.ceil(batch.tokens / ranks)
        chunks = max(1, math.ceil(tokens / self.planner.chunk_tokens))
        each = [math.ceil(tokens / chunks)] * chunks
        kept = self.planner.kept(each, batch)
        memory = self.planner.memory(each, kept, batch)
        if sum(memory.values()) > self.planner.budget:
            raise ConfigError(
                f"represent.batch_pairs: a step of {batch.pairs:,} pairs needs {gib(sum(memory.values()))} on each of "
                f"{ranks} ranks, but {gib(self.planner.budget)} may be used. {self._largest_words(batch)}"
            )
        attention = 2 * self.sizes.layers * self.sizes.attention_width * batch.squares / ranks
        forward = 2 * self.sizes.products * tokens + attention
        trained = sum(p.elements for p in self.sizes.parameters if p.part == "layer" and p.matrix and p.trained)
        back = forward * (1 + trained / self.sizes.products) + (forward if self.planner.graph.checkpointed else 0)
        loss = 8 * (batch.pairs / ranks) * batch.documents * self.sizes.hidden * (2 if represent.symmetric else 1)
        replay = forward * (chunks - kept) / chunks
        traffic = self.traffic(chunks, kept, batch)
        forwards, backwards, again = self._gathers(chunks, kept)
        gather, layers = planner.gather().seconds(machine), self._gather_again().seconds(machine)
        a_forward, a_backward = forward / chunks / machine.rate, back / chunks / machine.rate
        bare = max(0.0, gather - a_forward) * forwards
        bare += max(0.0, gather + layers * again / chunks - a_backward) * backwards
        batches = represent.grad_accum
        bare *= 1 if self.planner.resident else batches
        flops = batches * (forward + back + replay + loss)
        shard = 32 * sum(p.elements for p in self.sizes.parameters if p.trained) / ranks
        offloaded = self.config.engine.offload_optimizer != "none"
        seconds = {
            "matrix products": batches * (forward + back + replay) / machine.rate,
            "loss": batches * loss / machine.rate,
            "gathers that the products don't hide": bare,
            "reduction of the gradients": traffic["gradients"].seconds(machine),
            "exchange of the representations": traffic["representations"].seconds(machine),
            "optimizer": shard / (machine.host_bandwidth if offloaded else machine.bandwidth),
        }
        gathers = forwards + backwards + (again * layers / gather if gather else 0.0)
        return StepPlan(
            chunk_tokens=planner.chunk_tokens,
            chunks=chunks,
            kept=kept,
            tokens=tokens,
            resident=planner.resident,
            memory=memory,
            host=planner.standing(self.config, self.sizes, ranks)[1],
            flops=flops,
            gathers=(1 if planner.resident else batches) * gathers,
            traffic=traffic,
            seconds=seconds,
        )

    def largest_batch(self, batch: Batch) -> int:
        """Pairs in the largest batch that fits with one graph kept; 0 if none fits."""
        planner = self.planner

        def fits(pairs: int) -> bool:
            other = batch.of(pairs)
            tokens = math.ceil(other.tokens / self.cluster.ranks)
            chunks = max(1, math.ceil(tokens / self.planner.chunk_tokens))
            memory = planner.memory([math.ceil(tokens / chunks)] * min(chunks, 2), 1, other)
            return sum(memory.values()) <= planner.budget

        low, high = 0, 1
        while high < 2**40 and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _largest_words(self, batch: Batch) -> str:
        pairs = self.largest_batch(batch)
        return f"At most {pairs:,} pairs fit." if pairs > 1 else "No batch fits: lower represent.chunk_tokens."
