"""The settings of the two stages and of their optimizers; a part of the tree in `config.py`. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

from lbr_dist.errors import ConfigError

Pooling = Literal["bottleneck_last", "bottleneck_mean", "last", "mean"]
MIN_TEMPERATURE = 0.01
"""A learned temperature stays above this: below, one pair decides each query's loss (CLIP, arXiv 2103.00020)."""


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raises ConfigError, which names the field, what was found and what was expected."""
    if not condition:
        raise ConfigError(f"{name}: found {found!r}, expected {expected}.")


@dataclass(frozen=True)
class TargetsConfig:
    """Shares of the kinds of target in stage 1; they are normalised to sum to one."""

    continuation: float = 0.5
    """The text is cut at a random point; the rest is predicted through the bottleneck."""

    reconstruction: float = 0.5
    """The text itself is predicted through the bottleneck, a part of its input tokens dropped."""

    pair: float = 0.0
    """Query to document and document to query, from the training pairs alone."""

    def __post_init__(self) -> None:
        for name, share in dataclasses.asdict(self).items():
            require(share >= 0, f"learn.targets.{name}", share, "a share of zero or more")
        require(self.total > 0, "learn.targets", dataclasses.asdict(self), "at least one positive share")

    @property
    def total(self) -> float:
        return self.continuation + self.reconstruction + self.pair


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay; the same for both stages."""

    lr: float = 1e-4
    """Peak learning rate."""

    bottleneck_lr_factor: float = 10.0
    """The bottleneck's embeddings learn at this many times `lr`: they start from nothing."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up; linear and cosine end at a tenth of the peak."""

    warmup_fraction: float = 0.1
    """Share of the steps in which the learning rate rises from zero."""

    weight_decay: float = 0.01
    """Decoupled weight decay of the matrices; norms, biases and the bottleneck have none."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.98
    """Decay of the second moment; short runs want it below 0.999."""

    max_grad_norm: float = 1.0
    """The global gradient is scaled down to this norm; 0 switches clipping off."""

    spike_factor: float = 20.0
    """A step whose gradient norm is above this many times the median of the last ones is skipped; 0: never.
    A step whose gradient is not finite is always skipped, by every rank alike."""

    most_skipped: int = 10
    """So many skipped steps in a row end the run."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        require(
            self.bottleneck_lr_factor > 0,
            "optimizer.bottleneck_lr_factor",
            self.bottleneck_lr_factor,
            "a positive number",
        )
        require(0 <= self.warmup_fraction < 1, "optimizer.warmup_fraction", self.warmup_fraction, "0 to below 1")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "zero or more")
        require(self.max_grad_norm >= 0, "optimizer.max_grad_norm", self.max_grad_norm, "zero (off) or more")
        require(
            self.spike_factor == 0 or self.spike_factor > 1, "optimizer.spike_factor", self.spike_factor, "0 or above 1"
        )
        require(self.most_skipped > 0, "optimizer.most_skipped", self.most_skipped, "a positive number")


@dataclass(frozen=True)
class LearnConfig:
    """Stage 1: causal language modelling through the bottleneck."""

    bottleneck: Literal["mask", "reinject", "none"] = "mask"
    """How the target is kept from seeing the text; `none` is plain continued pretraining."""

    steps: int = 1000
    """Optimizer steps; 0 skips the stage."""

    batch_texts: int = 256
    """Texts in a global batch, whatever the number of ranks."""

    max_text_tokens: int = 1024
    """Longer texts are cut into pieces of this many tokens."""

    row_tokens: int = 8192
    """Tokens that one rank runs at a time: texts are packed into rows of up to this many, without padding. The
    gradients of all rows of a step are reduced once."""

    targets: TargetsConfig = field(default_factory=TargetsConfig)
    """The mixture of targets."""

    drop_target_tokens: float = 0.15
    """Share of a reconstruction's input tokens that are replaced, so that the bottleneck is needed."""

    text_weight: float = 1.0
    """Weight of the loss on the text itself, beside that on the target."""

    kl_weight: float = 0.0
    """`reinject` alone: weight of the KL divergence to a unit normal, a bottleneck token (nats). Above 0 the vectors
    that are injected are drawn from a learned posterior: a variational bottleneck."""

    z_loss: float = 0.0
    """Weight of the mean squared log-normaliser of the softmax, which keeps logits from drifting."""

    held_out_texts: int = 64
    """Texts kept out of training for the diagnostics: at most this many, and at most a twentieth of the corpus."""

    diagnose_every: int = 100
    """The diagnostics are measured before the first step, after each so many steps, and at the end; 0: never."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer of this stage."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "learn.steps", self.steps, "zero or more")
        require(self.batch_texts > 0, "learn.batch_texts", self.batch_texts, "a positive number")
        require(self.max_text_tokens > 1, "learn.max_text_tokens", self.max_text_tokens, "two or more")
        require(self.row_tokens > 0, "learn.row_tokens", self.row_tokens, "a positive number")
        require(0 <= self.drop_target_tokens < 1, "learn.drop_target_tokens", self.drop_target_tokens, "0 to below 1")
        for name in ("text_weight", "kl_weight", "z_loss", "held_out_texts", "diagnose_every"):
            require(getattr(self, name) >= 0, f"learn.{name}", getattr(self, name), "zero or more")
        if self.kl_weight and self.bottleneck != "reinject":
            raise ConfigError(
                f"learn.kl_weight: found {self.kl_weight} with learn.bottleneck {self.bottleneck!r}. The divergence is "
                "that of the injected vectors: use `reinject`, or set it to 0."
            )


@dataclass(frozen=True)
class RepresentConfig:
    """Stage 2: contrastive training on the compressed vectors, with the gradient cache."""

    steps: int = 1000
    """Optimizer steps; 0 skips the stage."""

    batch_pairs: int = 1024
    """Pairs in a global batch, whatever the number of ranks: every document in it is a negative."""

    grad_accum: int = 1
    """Global batches in an optimizer step: its gradient is the mean of theirs. A query sees the documents of its own
    batch alone, so this makes the gradient less noisy but the task no harder; `batch_pairs` does both."""

    batches: Literal["mixed", "by_source"] = "mixed"
    """`by_source` takes all pairs of a batch from one source, in proportion to the sources' sizes: negatives of the
    same kind are harder, and nothing can be told by the source alone."""

    hard_negatives: int = 0
    """Hard negatives taken from each pair's own negatives; pairs with fewer bring what they have."""

    chunk_tokens: int | None = None
    """Tokens that one rank runs at a time (the gradient cache's chunk), packed without padding. Not set: planned."""

    keep_graphs: Literal["auto"] | int = "auto"
    """Chunks of a rank whose graphs are kept, so that they need not run twice; all of them is one ordinary pass.
    `auto` keeps what fits into memory."""

    separate_sides: bool = False
    """Queries and documents in chunks of their own; otherwise chunks hold what fills them best."""

    temperature: float = 0.05
    """Temperature of the softmax over cosine similarities; where it is learned, what it begins at."""

    learn_temperature: bool = False
    """Train the temperature's logarithm, at the rate of the bottleneck's embeddings; it stays above 0.01."""

    symmetric: bool = False
    """The mean of two losses: each query finds its document, and each document its query."""

    margin: float | None = None
    """Documents of a similarity above the positive's by more than this are taken for false negatives and left out.
    Documents known to answer the query, by id or text, are always left out."""

    prefixes: tuple[int, ...] = ()
    """Matryoshka: the loss is the mean over these leading parts of the vector, which then serve as shorter vectors."""

    exchange: Literal["auto", "flat", "two_level"] = "auto"
    """How representations travel: in one collective over all ranks, or first between the nodes and then inside each,
    which `auto` takes where there are several nodes of as many ranks each."""

    pooling: Pooling = "bottleneck_last"
    """Which hidden states are the embedding."""

    diagnose_every: int = 100
    """The dev pairs are measured before the first step, after each so many steps, and at the end; 0: never."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer of this stage."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "represent.steps", self.steps, "zero or more")
        require(self.batch_pairs > 1, "represent.batch_pairs", self.batch_pairs, "two or more")
        require(self.grad_accum > 0, "represent.grad_accum", self.grad_accum, "a positive number")
        require(self.hard_negatives >= 0, "represent.hard_negatives", self.hard_negatives, "zero or more")
        require(self.diagnose_every >= 0, "represent.diagnose_every", self.diagnose_every, "zero or more")
        chunk = self.chunk_tokens
        require(chunk is None or chunk > 0, "represent.chunk_tokens", chunk, "a positive number, or null to plan it")
        kept = self.keep_graphs
        require(kept == "auto" or kept > 0, "represent.keep_graphs", kept, "`auto`, or one graph or more")
        lowest = MIN_TEMPERATURE if self.learn_temperature else 0.0
        finite = self.temperature > lowest and math.isfinite(self.temperature)
        require(finite, "represent.temperature", self.temperature, f"a finite number above {lowest:g}")
        positive = self.margin is None or self.margin >= 0
        require(positive, "represent.margin", self.margin, "a similarity of zero or more, or null")
        rising = all(a < b for a, b in itertools.pairwise((0, *self.prefixes)))
        require(rising, "represent.prefixes", self.prefixes, "widths that rise, from 1 on")
