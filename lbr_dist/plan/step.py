"""The planner's input and output: a batch with mean lengths, bytes on the links, and the plan of a step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lbr_dist.plan.machine import Cluster, Machine


@dataclass(frozen=True, slots=True)
class Batch:
    """A global batch, with mean lengths. Lengths include sink and bottleneck."""

    pairs: int
    documents: int
    """At most: one per pair and its hard negatives. A document that is in a batch twice is embedded once."""

    query_tokens: float
    document_tokens: float

    @property
    def tokens(self) -> int:
        return math.ceil(self.pairs * self.query_tokens + self.documents * self.document_tokens)

    @property
    def squares(self) -> float:
        """The sum of the squared lengths, which attention's cost grows with. A lower bound, since lengths vary."""
        return self.pairs * self.query_tokens**2 + self.documents * self.document_tokens**2

    def of(self, pairs: int) -> Batch:
        """The same texts per pair and tokens per text, with this many pairs."""
        return dataclasses.replace(self, pairs=pairs, documents=math.ceil(self.documents / self.pairs * pairs))


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes that one rank receives: from ranks of its node, and from other nodes."""

    within: float = 0.0
    between: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.within + other.within, self.between + other.between)

    def __mul__(self, times: float) -> Bytes:
        return Bytes(self.within * times, self.between * times)

    @property
    def total(self) -> float:
        return self.within + self.between

    def seconds(self, machine: Machine) -> float:
        """Seconds to receive them; both links work at the same time."""
        return max(self.within / machine.within, self.between / machine.between)


def spread(nbytes: float, cluster: Cluster) -> Bytes:
    """What one rank receives when `nbytes` are gathered or scattered over all ranks."""
    share, local = nbytes / cluster.ranks, cluster.ranks_per_node
    return Bytes(share * (local - 1), share * (cluster.ranks - local))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step of one rank. Chunks and tokens are per batch; a step has `grad_accum` batches."""

    chunk_tokens: int
    chunks: int

    kept: int
    """Chunks that keep their graphs."""

    tokens: int
    resident: bool
    """Whether gathered parameters stay whole until the step's end."""

    memory: dict[str, int]
    """Bytes on the device at the peak, by kind."""

    host: int
    """Bytes offloaded to the host or its disk."""

    flops: float
    """Floating-point operations of a rank."""

    gathers: float
    """How often the model's parameters are gathered."""

    traffic: dict[str, Bytes]
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def limit(self) -> str:
        """What takes most of the step's time."""
        return max(self.seconds, key=lambda name: self.seconds[name])
