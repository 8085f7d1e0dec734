"""The configuration of a run: one tree of frozen dataclasses, read from YAML and ``--section.field=value``.

Nothing here imports torch, so that a mistyped key is refused in a fraction of a second on a login node.
Each class checks what it can know by itself in ``__post_init__``; ``check_paths`` looks at the files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lbr_dist.errors import ConfigError

POOLINGS = ("bottleneck_last", "bottleneck_mean", "last", "mean")
Pooling = Literal["bottleneck_last", "bottleneck_mean", "last", "mean"]


def _require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: found {found!r}, expected {expected}.")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters by peft in the place of full fine-tuning; merged into the weights on export."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""

    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank."""

    dropout: float = 0.0
    """Dropout of the adapters' inputs."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter. The bottleneck's embeddings are always trained."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "model.lora.rank", self.rank, "zero (off) or more")
        _require(self.alpha > 0, "model.lora.alpha", self.alpha, "a positive number")
        _require(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "0 to below 1")
        _require(bool(self.targets), "model.lora.targets", self.targets, "at least one layer's name")


@dataclass(frozen=True)
class ModelConfig:
    base: str
    """Folder of the base model: any Hugging Face causal LM with its tokenizer."""

    bottleneck_tokens: int = 8
    """k, the number of bottleneck tokens after a text. 0 for the baselines that pool the text itself."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and activations. The optimizer always keeps float32 master weights."""

    activation_checkpointing: bool = False
    """Recompute each layer in backward: less memory, a third more computation."""

    attention: Literal["auto", "flash_attn", "torch_varlen", "tiles", "sdpa", "reference"] = "auto"
    """Attention kernel. `auto` takes the fastest that the device has; see kernels/attention.py."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters, in both stages."""

    def __post_init__(self) -> None:
        _require(0 <= self.bottleneck_tokens <= 256, "model.bottleneck_tokens", self.bottleneck_tokens, "0 to 256")


@dataclass(frozen=True)
class DataConfig:
    corpus: str
    """Domain text for stage 1, and the documents that pairs name: JSONL or Parquet with `id` and `text`."""

    train: str
    """Training pairs: JSONL, Parquet or a Hugging Face dataset folder, in any of the formats of docs/data.md."""

    learn_corpus: str | None = None
    """Text for stage 1 where it is not `corpus`: records with `text`, ids not needed, larger than memory if need be."""

    cache_dir: str = "~/.cache/lbr-dist"
    """Stage 1's text is tokenised once, into a folder below this one that every run and rank reads."""

    longest_document: int = 10_000_000
    """Stage 1 skips documents of more characters than this, and says so."""

    test: str | None = None
    """Held-out pairs for the evaluation; without them the run ends with the export."""

    test_documents: str | None = None
    """The collection that is searched in the evaluation: `id` and `text`. Default: all documents of `corpus`."""

    query_prompt: str = ""
    """Text put before each query, in training, in the exported model and in the evaluation."""

    document_prompt: str = ""
    """Text put before each document."""

    max_query_tokens: int = 64
    """Longer queries are cut to this many tokens, prompt included, bottleneck not."""

    max_document_tokens: int = 512
    """Longer documents are cut to this many tokens, prompt included, bottleneck not."""

    def __post_init__(self) -> None:
        _require(self.max_query_tokens > 0, "data.max_query_tokens", self.max_query_tokens, "a positive number")
        _require(
            self.max_document_tokens > 0, "data.max_document_tokens", self.max_document_tokens, "a positive number"
        )


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
            _require(share >= 0, f"learn.targets.{name}", share, "a share of zero or more")
        _require(self.total > 0, "learn.targets", dataclasses.asdict(self), "at least one positive share")

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
        _require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        _require(
            self.bottleneck_lr_factor > 0,
            "optimizer.bottleneck_lr_factor",
            self.bottleneck_lr_factor,
            "a positive number",
        )
        _require(0 <= self.warmup_fraction < 1, "optimizer.warmup_fraction", self.warmup_fraction, "0 to below 1")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "zero or more")
        _require(self.max_grad_norm >= 0, "optimizer.max_grad_norm", self.max_grad_norm, "zero (off) or more")
        _require(
            self.spike_factor == 0 or self.spike_factor > 1, "optimizer.spike_factor", self.spike_factor, "0 or above 1"
        )
        _require(self.most_skipped > 0, "optimizer.most_skipped", self.most_skipped, "a positive number")


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
        _require(self.steps >= 0, "learn.steps", self.steps, "zero or more")
        _require(self.batch_texts > 0, "learn.batch_texts", self.batch_texts, "a positive number")
        _require(self.max_text_tokens > 1, "learn.max_text_tokens", self.max_text_tokens, "two or more")
        _require(self.row_tokens > 0, "learn.row_tokens", self.row_tokens, "a positive number")
        _require(0 <= self.drop_target_tokens < 1, "learn.drop_target_tokens", self.drop_target_tokens, "0 to below 1")
        for name in ("text_weight", "kl_weight", "z_loss", "held_out_texts", "diagnose_every"):
            _require(getattr(self, name) >= 0, f"learn.{name}", getattr(self, name), "zero or more")
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

    hard_negatives: int = 0
    """Hard negatives taken from each pair's own negatives; pairs with fewer bring what they have."""

    chunk_tokens: int = 32768
    """Tokens that one rank runs at a time (the gradient cache's chunk), packed without padding."""

    temperature: float = 0.05
    """Temperature of the softmax over cosine similarities."""

    pooling: Pooling = "bottleneck_last"
    """Which hidden states are the embedding."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer of this stage."""

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "represent.steps", self.steps, "zero or more")
        _require(self.batch_pairs > 1, "represent.batch_pairs", self.batch_pairs, "two or more")
        _require(self.hard_negatives >= 0, "represent.hard_negatives", self.hard_negatives, "zero or more")
        _require(self.temperature > 0, "represent.temperature", self.temperature, "a positive number")


@dataclass(frozen=True)
class EngineConfig:
    """How the model is sharded; see `engine.py`, the only module that knows DeepSpeed's own settings."""

    zero_stage: Literal[3] = 3
    """ZeRO stage. Parameters, gradients and optimizer states are all sharded."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's states live while they are not used."""

    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where the sharded parameters live while they are not used."""

    nvme_path: str | None = None
    """Folder on a fast local disk, for the `nvme` offloads."""

    nvme_buffer_elements: int = 100_000_000
    """Elements of a buffer for parameters from `nvme`; at least a rank's share of the largest parameter."""

    persistence_threshold: int = 100_000
    """Parameters of fewer elements than this stay whole on every rank."""

    prefetch_elements: int = 50_000_000
    """Elements gathered ahead of their use."""

    reduce_elements: int = 50_000_000
    """Elements of the buffer that gradients are reduced from; a larger parameter is reduced by itself."""

    live_elements: int = 1_000_000_000
    """Elements that may be whole at a time; with a model smaller than this, it is gathered once a step."""

    resident_head: bool = True
    """Stage 1 keeps the LM head whole on every rank, gathered once a step; false gathers it for every row."""

    def __post_init__(self) -> None:
        needs_nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if needs_nvme and not self.nvme_path:
            raise ConfigError("engine.nvme_path: not set, but an offload is `nvme`. Name a folder on a local disk.")
        for name in (
            "nvme_buffer_elements",
            "persistence_threshold",
            "prefetch_elements",
            "reduce_elements",
            "live_elements",
        ):
            _require(getattr(self, name) >= 0, f"engine.{name}", getattr(self, name), "zero or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """Sharded checkpoints, for both stages."""

    every_steps: int = 200
    """A checkpoint after each so many steps, and one at the end of a stage."""

    keep: int = 2
    """How many of the newest checkpoints stay on disk."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest complete checkpoint of the run folder, where there is one."""

    def __post_init__(self) -> None:
        _require(self.every_steps > 0, "checkpoint.every_steps", self.every_steps, "a positive number")
        _require(self.keep > 0, "checkpoint.keep", self.keep, "a positive number")


@dataclass(frozen=True)
class EvaluateConfig:
    """Exact search over the test collection."""

    systems: tuple[Literal["bm25", "base", "learn", "lbr"], ...] = ("bm25", "base", "learn", "lbr")
    """What is scored, side by side: BM25, the untouched base, the model after stage 1 alone, the result."""

    bm25_tokens: Literal["words", "characters"] = "words"
    """BM25 over words, or over character 3-grams where words don't match (SMILES)."""

    chunk_tokens: int = 32768
    """Tokens that are encoded at a time, packed without padding."""

    bootstrap: int = 1000
    """Resamples of the queries for the 95 % intervals."""

    examples: int = 6
    """Queries that the report shows with what each system returned."""

    def __post_init__(self) -> None:
        _require(self.bootstrap > 0, "evaluate.bootstrap", self.bootstrap, "a positive number")
        _require(self.examples >= 0, "evaluate.examples", self.examples, "zero or more")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the ranks run."""

    ranks: int | None = None
    """Ranks that `lbr` starts on this machine. Default: one a GPU, or 2 on a CPU. Under torchrun it is torchrun's."""

    timeout_minutes: int = 30
    """A collective that takes longer than this ends the run."""

    def __post_init__(self) -> None:
        if self.ranks is not None:
            _require(self.ranks > 0, "cluster.ranks", self.ranks, "a positive number")
        _require(self.timeout_minutes > 0, "cluster.timeout_minutes", self.timeout_minutes, "a positive number")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: both stages, export and evaluation."""

    run_dir: str
    """The run folder; everything the run writes is in it."""

    domain: str
    """Name of the domain, for the report and the model card."""

    model: ModelConfig
    """The base model and its bottleneck."""

    data: DataConfig
    """Corpus, pairs and prompts."""

    seed: int = 0
    """Seed of everything random: order, targets, bottleneck."""

    learn: LearnConfig = field(default_factory=LearnConfig)
    """Stage 1."""

    represent: RepresentConfig = field(default_factory=RepresentConfig)
    """Stage 2."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """Sharding and offload."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ranks."""

    def __post_init__(self) -> None:
        if self.engine.offload_optimizer == "nvme" and self.checkpoint.resume != "never":
            raise ConfigError(
                f"engine.offload_optimizer: found 'nvme' with checkpoint.resume {self.checkpoint.resume!r}. DeepSpeed "
                "does not restore an optimizer that is offloaded to nvme: the run would go on with wrong states, and "
                "say nothing. Use `cpu`, or set checkpoint.resume to `never`."
            )
        k = self.model.bottleneck_tokens
        if self.represent.steps and self.represent.pooling.startswith("bottleneck") and k == 0:
            raise ConfigError(
                f"represent.pooling: found {self.represent.pooling!r} with model.bottleneck_tokens 0. "
                "Use `last` or `mean`, or give the model bottleneck tokens."
            )
        if self.learn.steps and self.learn.bottleneck != "none" and k == 0:
            raise ConfigError(
                f"learn.bottleneck: found {self.learn.bottleneck!r} with model.bottleneck_tokens 0. "
                "Use `none`, or give the model bottleneck tokens."
            )
        # one sequence of stage 1 is [sink x b y] with x and y up to max_text_tokens each
        longest = 1 + 2 * self.learn.max_text_tokens + k
        if self.learn.steps and self.learn.row_tokens < longest:
            raise ConfigError(
                f"learn.row_tokens: found {self.learn.row_tokens}, expected at least {longest} "
                f"(1 + 2 x learn.max_text_tokens + model.bottleneck_tokens). Raise it, or lower learn.max_text_tokens."
            )
        longest = 1 + max(self.data.max_query_tokens, self.data.max_document_tokens) + k
        for name in ("represent", "evaluate"):
            tokens = getattr(self, name).chunk_tokens
            if tokens < longest:
                raise ConfigError(
                    f"{name}.chunk_tokens: found {tokens}, expected at least {longest} (1 + data.max_document_tokens "
                    "+ model.bottleneck_tokens). Raise it, or lower data.max_document_tokens."
                )

    # ---- the run folder ---------------------------------------------------------------------------------------

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir)

    def stage_path(self, stage: Literal["learn", "represent"]) -> Path:
        """`runs/NAME/learn` or `runs/NAME/represent`."""
        return self.run_path / stage

    @property
    def learn_export(self) -> Path:
        """The model after stage 1, which stage 2 starts from."""
        return self.run_path / "learn" / "export"

    @property
    def model_path(self) -> Path:
        """The finished model."""
        return self.run_path / "model"

    @property
    def report_path(self) -> Path:
        return self.run_path / "report"


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, ready for YAML or JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two plain configs differ."""
    names: list[str] = []
    for key in sorted({*found, *expected}):
        a, b = found.get(key), expected.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names
