"""The settings of the two stages and of their optimizers; a part of the tree in `run.py`. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

from lbr_dist.errors import ConfigError

Pooling = Literal["bottleneck_last", "bottleneck_mean", "last", "mean"]
MIN_TEMPERATURE = 0.01
"""A learned temperature stays above this: below it, one pair decides each query's loss (CLIP, arXiv 2103.00020)."""


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raises ConfigError if the condition fails: it names the field, what was found and what was expected."""
    if not condition:
        raise ConfigError(f"{name}: found {found!r}, expected {expected}.")


@dataclass(frozen=True)
class TargetsConfig:
    """Shares of the kinds of target in stage 1; they are normalised to sum to one."""

    continuation: float = 0.5
    """The text is cut at a random point; the rest is predicted through the bottleneck."""

    reconstruction: float = 0.5
    """The text itself is predicted through the bottleneck, with some of its input tokens dropped."""

    pair: float = 0.0
    """Query to document and document to query, from the training pairs only."""

    def __post_init__(self) -> None:
        for name, share in dataclasses.asdict(self).items():
            require(share >= 0, f"learn.targets.{name}", share, "a share of zero or more")
        require(self.total > 0, "learn.targets", dataclasses.asdict(self), "at least one positive share")

    @property
    def total(self) -> float:
        return self.continuation + self.reconstruction + self.pair


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay."""

    lr: float = 1e-4
    """Peak learning rate."""

    bottleneck_lr_factor: float = 10.0
    """The bottleneck's embeddings learn at this many times `lr`, since they start from scratch."""

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
    """The global gradient is clipped to this norm; 0 turns clipping off."""

    spike_factor: float = 20.0
    """Skip a step whose gradient norm is above this many times the median of the last ones; 0: never.
    A step whose gradient is not finite is always skipped, on every rank."""

    most_skipped: int = 10
    """The run ends after this many skipped steps in a row."""

    def check(self, section: str) -> None:
        """Raises ConfigError for a value out of range; `section` is the optimizer's place in the config."""
        finite = {name: math.isfinite(value) for name, value in vars(self).items() if isinstance(value, float)}
        for name, ok, expected in (
            ("lr", self.lr > 0, "a positive number"),
            ("bottleneck_lr_factor", self.bottleneck_lr_factor > 0, "a positive number"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "zero or more"),
            ("beta1", 0 <= self.beta1 < 1, "0 to below 1"),
            ("beta2", 0 <= self.beta2 < 1, "0 to below 1"),
            ("max_grad_norm", self.max_grad_norm >= 0, "zero (off) or more"),
            ("spike_factor", self.spike_factor == 0 or self.spike_factor > 1, "0 or above 1"),
            ("most_skipped", self.most_skipped > 0, "a positive number"),
        ):
            require(ok and finite.get(name, True), f"{section}.{name}", getattr(self, name), expected)


@dataclass(frozen=True)
class LearnConfig:
    """Stage 1: causal language modelling through the bottleneck."""

    bottleneck: Literal["mask", "reinject", "none"] = "mask"
    """How the target is kept from seeing the text; `none` is plain continued pretraining."""

    steps: int = 1000
    """Optimizer steps; 0 skips the stage."""

    batch_texts: int = 256
    """Texts in a global batch, for any number of ranks."""

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
    """Weight of the loss on the text itself, next to that on the target."""

    kl_weight: float = 0.0
    """For `reinject` only: weight of the KL divergence to a unit normal, in nats per bottleneck token. Above 0, the
    injected vectors are drawn from a learned posterior: a variational bottleneck."""

    z_loss: float = 0.0
    """Weight of the mean squared log-normaliser of the softmax, which keeps logits from drifting."""

    held_out_texts: int = 64
    """Texts kept out of training for the diagnostics: at most this many, and at most a twentieth of the corpus."""

    diagnose_every: int = 100
    """The diagnostics are measured before the first step, every this many steps, and at the end; 0: never."""

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
        self.optimizer.check("learn.optimizer")
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
    """Pairs in a global batch, for any number of ranks: every document in it is a negative."""

    grad_accum: int = 1
    """Global batches in an optimizer step: its gradient is the mean of theirs. A query sees only its own batch's
    documents, so this makes the gradient less noisy but the task no harder; `batch_pairs` does both."""

    batches: Literal["mixed", "by_source"] = "mixed"
    """`by_source` takes all pairs of a batch from one source, in proportion to the sources' sizes: negatives of the
    same kind are harder, and the source alone gives nothing away."""

    hard_negatives: int = 0
    """Hard negatives taken from each pair's own negatives; a pair with fewer brings all it has."""

    chunk_tokens: int | None = None
    """Tokens that one rank runs at a time (the gradient cache's chunk), packed without padding. null: planned."""

    keep_graphs: Literal["auto"] | int = "auto"
    """Chunks of a rank whose graphs are kept, so that they run only once; keeping all is one ordinary pass.
    `auto` keeps as many as fit into memory."""

    separate_sides: bool = False
    """Queries and documents in separate chunks; otherwise chunks hold whatever fills them best."""

    temperature: float = 0.05
    """Temperature of the softmax over cosine similarities; its initial value if it is learned."""

    learn_temperature: bool = False
    """Train the temperature's logarithm, at the bottleneck's learning rate; the temperature stays above 0.01."""

    symmetric: bool = False
    """The mean of two losses: each query finds its document, and each document its query."""

    margin: float | None = None
    """Documents more similar to the query than the positive is, by more than this, count as false negatives and are
    left out. Documents known to answer the query, by id or text, are always left out."""

    prefixes: tuple[int, ...] = ()
    """Matryoshka: the loss is the mean over these prefixes of the vector, which can then be used as shorter vectors."""

    exchange: Literal["auto", "flat", "two_level"] = "auto"
    """How representations are gathered: in one collective over all ranks, or first between nodes and then inside each.
    `auto` takes two levels if there are several nodes with equally many ranks."""

    pooling: Pooling = "bottleneck_last"
    """Which hidden states are the embedding."""

    diagnose_every: int = 100
    """The dev pairs are measured before the first step, every this many steps, and at the end; 0: never."""

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
        require(rising, "represent.prefixes", self.prefixes, "rising widths of one or more")
        self.optimizer.check("represent.optimizer")
