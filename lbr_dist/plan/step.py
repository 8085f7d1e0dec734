"""What the planner works with and what comes out: a batch by its means, bytes on the links, and a step's plan."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lbr_dist.plan.machine import Cluster, Machine


@dataclass(frozen=True, slots=True)
class Batch:
    """A global batch, by its means. Lengths have sink and bottleneck in them."""

    pairs: int
    documents: int
    """At most: pairs and their hard negatives; a document that stands in a batch twice is embedded once."""

    query_tokens: float
    document_tokens: float

    @property
    def tokens(self) -> int:
        return math.ceil(self.pairs * self.query_tokens + self.documents * self.document_tokens)

    @property
    def squares(self) -> float:
        """The sum of the squared lengths, which attention costs; at least, since lengths vary."""
        return self.pairs * self.query_tokens**2 + self.documents * self.document_tokens**2

    def of(self, pairs: int) -> Batch:
        """As many texts a pair and tokens a text, but so many pairs."""
        return dataclasses.replace(self, pairs=pairs, documents=math.ceil(self.documents / self.pairs * pairs))


@dataclass(frozen=True, slots=True)
class Bytes:
    """What one rank receives."""

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
        """Both links carry their bytes at the same time."""
        return max(self.within / machine.within, self.between / machine.between)


def spread(nbytes: float, cluster: Cluster) -> Bytes:
    """What one rank receives of `nbytes` that are gathered or scattered over all ranks."""
    share, local = nbytes / cluster.ranks, cluster.ranks_per_node
    return Bytes(share * (local - 1), share * (cluster.ranks - local))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step of one rank; chunks and tokens are those of each of its `grad_accum` batches."""

    chunk_tokens: int
    chunks: int

    kept: int
    """Chunks whose graphs are kept."""

    tokens: int
    resident: bool
    """Whether gathered parameters stay whole until the step's end."""

    memory: dict[str, int]
    """Bytes on the device by kind, at the peak."""

    host: int
    """Bytes that are offloaded to the host or its disk."""

    flops: float
    """Of a rank."""

    gathers: float
    """How often the model's parameters are gathered."""

    traffic: dict[str, Bytes]
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def limit(self) -> str:
        """What the step spends most of its time on."""
        return max(self.seconds, key=lambda name: self.seconds[name])
