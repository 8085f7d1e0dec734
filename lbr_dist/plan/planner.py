"""The planner of stage 2: how a step is cut into chunks, and how many graphs it keeps in the memory available.

Memory is one rank's at the step's peak: shards, gathered parameters, gradients, optimizer, graphs, cache, loss. The
trainer calls `StepPlanner.kept` at every step. `cost.py` has a step's traffic and time.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from lbr_dist.checkpoint.manifest import STATE_BYTES
from lbr_dist.config import RunConfig
from lbr_dist.console import gib
from lbr_dist.errors import ConfigError
from lbr_dist.plan.machine import Cluster, Machine, available_memory
from lbr_dist.plan.model import GraphBytes, ModelSizes, Parameter, graph_bytes, model_sizes
from lbr_dist.plan.step import Batch, Bytes, spread
from lbr_dist.ranks.group import Ranks, largest

HEADROOM = 0.9
"""Share of the device's memory to plan with; the rest is for the allocator, the kernels and NCCL."""

SUB_GROUP = 10**9
"""Elements that DeepSpeed's optimizer updates at a time; their gradients are float32 during the update."""

LOSS_TILE, LOSS_TILES = 1024, 3
"""The loss holds `LOSS_TILES` tiles of `LOSS_TILE` queries by `LOSS_TILE` documents; see kernels/infonce_tiles.py."""

FEWEST_CHUNK_TOKENS = 4096
"""A planned chunk has at least this many tokens, enough to keep a device's matrix units busy."""


class StepPlanner:
    """Plans the steps of stage 2. With the same arguments, all ranks get the same plans.

    Args:
        config: the run.
        sizes: the model's parameters.
        graph: bytes that a graph keeps per token.
        cluster: the ranks and their devices.
        budget: bytes of a device's memory that may be used.

    Raises:
        ConfigError: not even one chunk fits; the message names settings that would.
    """

    def __init__(
        self, config: RunConfig, sizes: ModelSizes, graph: GraphBytes, cluster: Cluster, budget: float
    ) -> None:
        self.config, self.sizes, self.graph, self.cluster, self.budget = config, sizes, graph, cluster, budget
        self.item = int(getattr(torch, config.model.dtype).itemsize)
        self.longest = max(config.sequence_lengths)
        represent = config.represent
        pairs = represent.batch_pairs
        self.batch = Batch(pairs, pairs * (1 + represent.hard_negatives), *config.sequence_lengths)
        self.chunk_tokens = represent.chunk_tokens or self._planned_chunk()
        self.check()

    @staticmethod
    def for_stage(config: RunConfig, ranks: Ranks) -> StepPlanner:
        """The trainer's planner: memory is measured, and every rank plans with the smallest of all ranks.

        Raises:
            ConfigError: see the class.
        """
        folder = Path(config.model.base)  # of all shapes, stage 1 changes only the vocabulary's, by a few rows
        sizes = model_sizes(config.model, folder)
        on_gpu = ranks.device.type == "cuda"
        graph = graph_bytes(config.model, folder, "cuda" if on_gpu else "cpu", config.sequence_lengths)
        memory = available_memory(ranks.device, ranks.local_world_size)
        if not on_gpu:  # free memory does not include what the engine has already allocated
            memory += sum(StepPlanner.standing(config, sizes, ranks.world_size)[0].values())
            if config.checkpoint.background:  # the copy of the state for saving is allocated later
                trained = (p.elements for p in sizes.parameters if p.trained)
                memory -= STATE_BYTES * sum(math.ceil(elements / ranks.world_size) for elements in trained)
        least = -largest([-memory], ranks)[0]
        cluster = Cluster(Machine.of(ranks.device), ranks.world_size, ranks.local_world_size)
        return StepPlanner(config, sizes, graph, cluster, HEADROOM * least)

    # ---- memory ---------------------------------------------------------------------------------------------------

    @staticmethod
    def standing(config: RunConfig, sizes: ModelSizes, ranks: int) -> tuple[dict[str, int], int]:
        """Bytes that a rank holds between steps: on the device, by kind; and offloaded."""
        engine, item = config.engine, int(getattr(torch, config.model.dtype).itemsize)
        shards = item * sum(math.ceil(p.elements / ranks) for p in sizes.parameters)
        trained = sum(math.ceil(p.elements / ranks) for p in sizes.parameters if p.trained)
        optimizer, gradients = STATE_BYTES * trained, item * trained
        whole = item * sum(p.elements for p in sizes.parameters if stays_whole(p, config))
        host = shards if engine.offload_parameters != "none" else 0
        on_device = {
            "parameters: shards": shards - host,
            "parameters: always whole": whole,
            "optimizer: master weights and two moments": optimizer,
            "gradients: shards": gradients,
            "gradients: reduction buffer": item * engine.reduce_elements,
        }
        if engine.offload_optimizer != "none":
            host += optimizer + gradients
            on_device |= {"optimizer: master weights and two moments": 0, "gradients: shards": 0}
        return on_device, host

    @property
    def resident(self) -> bool:
        """Whether gathered parameters stay whole until the step's end: if `engine.live_elements` allows it."""
        return self.gathered_elements() <= self.config.engine.live_elements

    def gathered_elements(self, *parts: str) -> int:
        ranks = self.cluster.ranks
        return sum(
            math.ceil(p.elements / ranks) * ranks
            for p in self.sizes.used
            if not stays_whole(p, self.config) and (not parts or p.part in parts)
        )

    def _whole(self) -> int:
        """Bytes of the parameters that are gathered at the same time."""
        everything = self.gathered_elements()
        biggest = max(self.sizes.layer, self.sizes.elements("embedding"))
        return self.item * min(everything, max(self.config.engine.live_elements, biggest) + biggest)

    def memory(self, tokens: Sequence[int], kept: int, batch: Batch) -> dict[str, int]:
        """Bytes of a rank by kind, at the step's peak: when the last kept graph is built, or the largest chunk reruns.

        Args:
            tokens: tokens of each chunk.
            kept: the first this many chunks keep their graphs.
            batch: the global batch, for the representations.
        """
        held, _ = self.standing(self.config, self.sizes, self.cluster.ranks)
        local = self.item * sum(p.elements for p in self.sizes.used if p.trained)
        replayed = max((self.graph.graph(t) for t in tokens[kept:]), default=0)
        graphs = sum(self.graph.graph(t) for t in tokens[:kept])
        running = self.graph.running(max(tokens))
        rows = math.ceil((batch.pairs + batch.documents) / self.cluster.ranks)
        width = 4 * self.sizes.hidden
        step = {
            "parameters: gathered": self._whole(),
            "gradients: whole, of all chunks": local,
            "activations: kept graphs, or the largest rerun one": max(graphs, replayed),
            "activations: the running layer": running,
            "gradient cache": rows * width,
            "representations": rows * width,
            "loss: all documents, their gradients, tiles": 2 * batch.documents * width
            + 4 * LOSS_TILES * min(LOSS_TILE, batch.documents) * min(LOSS_TILE, batch.pairs),
        }
        # after the last chunk, gradients are copied for their reduction, a bucket or a large parameter at a time; then
        # the optimizer has float32 gradients of one sub-group
        trained = [p.elements for p in self.sizes.parameters if p.trained]
        bucket = self.item * max(self.config.engine.reduce_elements, *trained)
        group = 4 * min(SUB_GROUP, math.ceil(sum(trained) / self.cluster.ranks))
        end = max(local + self._whole() + bucket, 0 if self.config.engine.offload_optimizer != "none" else group)
        step["reduction and optimizer, beyond that"] = max(0, end - sum(step.values()))
        return {**held, **step}

    def kept(self, tokens: Sequence[int], batch: Batch | None = None) -> int:
        """How many of a rank's first chunks keep their graphs: as many as fit, at least one.

        Args:
            tokens: tokens of each chunk, the largest over all ranks: so every rank gets the same result.
            batch: the global batch. Default: the config's.
        """
        wanted = self.config.represent.keep_graphs
        if wanted != "auto":
            return min(wanted, len(tokens))
        room = self.budget - sum(self.memory(tokens, 0, batch or self.batch).values())
        used = max((self.graph.graph(t) for t in tokens), default=0)  # already part of that memory
        room, kept = room + used, 0
        for count in tokens:
            room -= self.graph.graph(count)
            if room < 0:
                break
            kept += 1
        return max(1, kept)

    def _fits(self, chunk: int) -> bool:
        return sum(self.memory([chunk], 1, self.batch).values()) <= self.budget

    def _planned_chunk(self) -> int:
        """Tokens whose matrix products take as long as gathering the parameters; fewer if that doesn't fit."""
        hidden = self.gather().seconds(self.cluster.machine) / self.forward_seconds_a_token
        # resident parameters are gathered once, so there is no gather to hide behind each chunk
        target = FEWEST_CHUNK_TOKENS if self.resident else max(FEWEST_CHUNK_TOKENS, hidden)
        most = math.ceil(self.batch.tokens / self.cluster.ranks)
        chunk = max(self.longest, min(math.ceil(target / 1024) * 1024, max(most, self.longest)))
        while chunk > self.longest and not self._fits(chunk):
            chunk = max(self.longest, chunk // 2)
        return chunk

    def check(self) -> None:
        """Raises ConfigError, naming settings that would fit, if one chunk does not fit."""
        if self._fits(self.chunk_tokens):
            return
        needed = sum(self.memory([self.chunk_tokens], 1, self.batch).values())
        found = [text for text in self._ways_out() if text]
        ways = "; ".join(found) or (
            "no single change is enough; use a smaller model, or several of a smaller chunk, activation checkpointing, "
            "more ranks and an offloaded optimizer"
        )
        raise ConfigError(
            f"represent.chunk_tokens: a step with one chunk of {self.chunk_tokens:,} tokens needs {gib(needed)} on "
            f"each of {self.cluster.ranks} ranks, but {gib(self.budget)} may be used. What would fit: {ways}."
        )

    def _ways_out(self) -> list[str]:
        def fits(
            chunk: int | None = None, ranks: int | None = None, graph: GraphBytes | None = None, **engine: str
        ) -> bool:
            other = copy.copy(self)
            if engine:
                other.config = dataclasses.replace(
                    self.config,
                    engine=dataclasses.replace(self.config.engine, **engine),  # type: ignore[arg-type]
                )
            other.graph = graph or self.graph
            other.cluster = dataclasses.replace(self.cluster, ranks=ranks or self.cluster.ranks)
            return other._fits(chunk or self.chunk_tokens)

        smaller = next(
            (c for c in _halves(self.chunk_tokens, self.longest) if fits(chunk=c)),
            None,
        )
        more = next((self.cluster.ranks * 2**i for i in range(1, 11) if fits(ranks=self.cluster.ranks * 2**i)), None)
        checkpointed = dataclasses.replace(self.graph, checkpointed=True)
        recompute = not self.graph.checkpointed and fits(graph=checkpointed)
        offload = self.config.engine.offload_optimizer == "none" and fits(offload_optimizer="cpu")
        return [
            f"represent.chunk_tokens {smaller}" if smaller else "",
            "model.activation_checkpointing true" if recompute else "",
            f"{more} ranks" if more else "",
            "engine.offload_optimizer cpu" if offload else "",
        ]

    # ---- gathers --------------------------------------------------------------------------------------------------

    def gather(self, *parts: str) -> Bytes:
        """Bytes that a rank receives when the parameters in these parts (all if none is named) are gathered once."""
        return spread(self.item * self.gathered_elements(*parts), self.cluster)

    @property
    def forward_seconds_a_token(self) -> float:
        """Seconds per token of the layers' matrix products, in a forward pass."""
        return 2 * self.sizes.products / self.cluster.machine.rate


def stays_whole(parameter: Parameter, config: RunConfig) -> bool:
    """Whether a parameter is always whole on every rank."""
    return parameter.elements <= config.engine.persistence_threshold


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value > least:
        value = max(least, value // 2)
        found.append(value)
    return found
