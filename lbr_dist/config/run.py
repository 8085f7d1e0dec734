"""The configuration of a run: one tree of frozen dataclasses, read from YAML and ``--section.field=value``.

Imports no torch, so that a mistyped key is refused in a fraction of a second on a login node. Each class checks its own
values in ``__post_init__``; `preflight.py` looks at the files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lbr_dist.config.cluster import ClusterConfig, SlurmConfig
from lbr_dist.config.stages import LearnConfig, RepresentConfig, require
from lbr_dist.errors import ConfigError

Dtype = Literal["bfloat16", "float32"]
StageName = Literal["learn", "represent"]
STAGES: tuple[StageName, ...] = ("learn", "represent")

COLUMNS = ("id", "title", "text", "query", "positive", "negative", "positive_ids", "negative_ids", "source")
"""The fields of documents and pairs that `data.columns` can read from columns of other names."""


def require_columns(columns: Mapping[str, str], field: str) -> None:
    """Refuse a mapping from a name that no record of ours has, or of one column to two.

    Raises:
        ConfigError: names it.
    """
    for ours, theirs in columns.items():
        require(ours in COLUMNS, field, ours, f"one of our names: {', '.join(COLUMNS)}")
        once = bool(theirs) and list(columns.values()).count(theirs) == 1
        require(once, f"{field}: {ours}", theirs, "the name of a column, each at most once")


def sequence_tokens(text: int, bottleneck: int, target: int = 0) -> int:
    """Tokens of a sequence ``[sink x b y]`` whose text, bottleneck and target have this many."""
    return 1 + text + bottleneck + target


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft) instead of full fine-tuning; merged into the weights on export."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""

    alpha: float = 32.0
    """The adapter's product is scaled by alpha / rank."""

    dropout: float = 0.0
    """Dropout of the adapters' inputs."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter. The bottleneck's embeddings are always trained."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "model.lora.rank", self.rank, "zero (off) or more")
        require(self.alpha > 0, "model.lora.alpha", self.alpha, "a positive number")
        require(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "0 to below 1")
        require(bool(self.targets), "model.lora.targets", self.targets, "at least one layer's name")


@dataclass(frozen=True)
class ModelConfig:
    base: str
    """The folder of a Hugging Face causal LM with its tokenizer, or the Hub id of one in the Hugging Face cache."""

    bottleneck_tokens: int = 8
    """k, the number of bottleneck tokens after a text. 0 for baselines that pool the text itself."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of weights and activations. `auto` is bfloat16 where the device has units for it, else float32; a run keeps
    what it started with. The optimizer always keeps float32 master weights."""

    activation_checkpointing: bool = False
    """Recompute each layer in backward: less memory, a third more computation."""

    attention: Literal["auto", "flash_attn", "torch_varlen", "tiles", "sdpa", "reference"] = "auto"
    """Attention kernel. `auto` takes the fastest one on the device; see kernels/attention.py."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters, in both stages."""

    def __post_init__(self) -> None:
        require(0 <= self.bottleneck_tokens <= 256, "model.bottleneck_tokens", self.bottleneck_tokens, "0 to 256")
        require(bool(self.base), "model.base", self.base, "a folder")

    def sequence_tokens(self, text: int) -> int:
        """Tokens of ``[sink x b]`` for a text of this many."""
        return sequence_tokens(text, self.bottleneck_tokens)


@dataclass(frozen=True)
class DataConfig:
    corpus: str
    """Domain text for stage 1, and the documents that pairs name by `id`: a file or folder, see docs/data.md."""

    train: str
    """Training pairs: a file or folder, in any of the formats of docs/data.md."""

    columns: dict[str, str] | None = None
    """Columns of the files that have other names than ours: `{text: abstract, id: pmid}`, in all files of the run."""

    learn_corpus: str | None = None
    """Text for stage 1 if it is not `corpus`: records with `text`. Ids are not needed, and it may exceed memory."""

    cache_dir: str = "~/.cache/lbr-dist"
    """Stage 1's text is tokenised once, into a subfolder of this one that every run and rank reads."""

    longest_document: int = 10_000_000
    """Stage 1 skips documents with more characters than this, and reports how many."""

    dev: str | None = None
    """Development pairs, in the formats of `train`: never trained on, measured during stage 2 to rank its
    checkpoints."""

    test: str | None = None
    """Held-out pairs for the evaluation; without them, the run ends with the export."""

    test_documents: str | None = None
    """The collection that is searched in the evaluation: `id` and `text`. Default: all documents of `corpus`."""

    query_prompt: str = ""
    """Text put before each query: in training, in the exported model and in the evaluation."""

    document_prompt: str = ""
    """Text put before each document."""

    max_query_tokens: int = 64
    """In training, longer queries are cut to this many tokens, including the prompt but not the bottleneck. The
    finished model cuts queries and documents alike, at the larger of both lengths, since most servers know one."""

    max_document_tokens: int = 512
    """In training, longer documents are cut to this many tokens, including the prompt but not the bottleneck."""

    def __post_init__(self) -> None:
        for name in ("longest_document", "max_query_tokens", "max_document_tokens"):
            require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "a positive number")
        for name in ("corpus", "train", "cache_dir"):
            require(bool(getattr(self, name)), f"data.{name}", getattr(self, name), "a path")
        require_columns(self.columns or {}, "data.columns")


@dataclass(frozen=True)
class EngineConfig:
    """How the model is sharded; `engine.py` translates this into DeepSpeed's own settings."""

    zero_stage: Literal[3] = 3
    """ZeRO stage. Parameters, gradients and optimizer states are all sharded."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's states are kept between uses."""

    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where the sharded parameters are kept between uses."""

    nvme_path: str | None = None
    """Folder on a fast local disk, for the `nvme` offloads."""

    nvme_buffer_elements: int = 100_000_000
    """Elements of a buffer for parameters on `nvme`; at least a rank's share of the largest parameter."""

    persistence_threshold: int = 100_000
    """Parameters with fewer elements than this stay whole on every rank."""

    prefetch_elements: int = 50_000_000
    """Elements gathered before they are needed."""

    reduce_elements: int = 50_000_000
    """Elements of the buffer from which gradients are reduced; a larger parameter is reduced by itself."""

    live_elements: int = 1_000_000_000
    """Elements that may be whole at a time; a model with fewer is gathered once per step."""

    resident_head: bool = True
    """Stage 1 keeps the LM head whole on every rank, gathered once per step; false gathers it for every row."""

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
            require(getattr(self, name) >= 0, f"engine.{name}", getattr(self, name), "zero or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """Sharded checkpoints, for both stages."""

    every_steps: int = 200
    """Save a checkpoint every this many steps, and one at the end of a stage."""

    every_minutes: float | None = 30.0
    """And one when this many minutes have passed since the last; null: by steps only."""

    keep: int = 2
    """How many of the newest checkpoints stay on disk."""

    keep_every: int | None = None
    """Also keep the checkpoints of steps that are a multiple of this."""

    keep_best: int = 0
    """Also keep this many of those with the lowest held-out loss."""

    resume: Literal["auto", "required", "never"] | int = "auto"
    """`auto` resumes from the newest intact checkpoint, if any; `required` refuses to start over; `never` starts over
    and sets existing checkpoints aside; a number resumes from the checkpoint of that step."""

    background: bool = True
    """Write while training continues, from a copy in host memory: 12 bytes for each parameter of a rank's share.
    `false` writes straight from the optimizer's tensors, and training waits."""

    trust_group: bool = False
    """Resume from folders that other members of their group can write to. Whoever can write to them can change the
    model."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "checkpoint.every_steps", self.every_steps, "a positive number")
        minutes = self.every_minutes
        require(minutes is None or minutes > 0, "checkpoint.every_minutes", minutes, "a positive number, or null")
        require(self.keep > 0, "checkpoint.keep", self.keep, "a positive number")
        every = self.keep_every
        require(every is None or every > 0, "checkpoint.keep_every", every, "a positive number of steps, or null")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "zero or more")
        resume = self.resume
        named = isinstance(resume, str) or resume > 0
        require(named, "checkpoint.resume", resume, "auto, required, never, or the step of a checkpoint")


@dataclass(frozen=True)
class EvaluateConfig:
    """Exact search over the test collection."""

    systems: tuple[Literal["bm25", "base", "learn", "lbr"], ...] = ("bm25", "base", "learn", "lbr")
    """Systems to score side by side: BM25, the untouched base, the model after stage 1 alone, the result."""

    bm25_tokens: Literal["words", "characters"] = "words"
    """BM25 over words, or over character 3-grams for text whose words don't match (SMILES)."""

    chunk_tokens: int = 32768
    """Tokens that are encoded at a time, packed without padding."""

    bootstrap: int = 1000
    """Resamples of the queries, for the 95 % intervals."""

    examples: int = 6
    """Queries that the report shows with what each system returned."""

    def __post_init__(self) -> None:
        require(bool(self.systems), "evaluate.systems", list(self.systems), "at least one system")
        require(self.chunk_tokens > 0, "evaluate.chunk_tokens", self.chunk_tokens, "a positive number")
        require(self.bootstrap > 0, "evaluate.bootstrap", self.bootstrap, "a positive number")
        require(self.examples >= 0, "evaluate.examples", self.examples, "zero or more")


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

    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What `lbr submit` asks of Slurm."""

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4,294,967,295")
        if self.engine.offload_optimizer == "nvme" and self.checkpoint.resume != "never":
            raise ConfigError(
                f"engine.offload_optimizer: found 'nvme' with checkpoint.resume {self.checkpoint.resume!r}. "
                "The state of an optimizer on nvme is not saved, so a run that stops starts over. Use `cpu`, or set "
                "checkpoint.resume to `never`."
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
        text = self.learn.max_text_tokens
        longest = sequence_tokens(text, k, text)
        if self.learn.steps and self.learn.row_tokens < longest:
            raise ConfigError(
                f"learn.row_tokens: found {self.learn.row_tokens}, expected at least {longest} "
                f"(1 + 2 x learn.max_text_tokens + model.bottleneck_tokens). Raise it, or lower learn.max_text_tokens."
            )
        longest = max(self.sequence_lengths)
        for name in ("represent", "evaluate"):
            tokens = getattr(self, name).chunk_tokens
            if tokens is not None and tokens < longest:
                raise ConfigError(
                    f"{name}.chunk_tokens: found {tokens}, expected at least {longest} (1 + data.max_document_tokens "
                    "+ model.bottleneck_tokens). Raise it, or lower data.max_document_tokens."
                )

    @property
    def sequence_lengths(self) -> tuple[int, int]:
        """Tokens of the longest query and of the longest document in stage 2, with sink and bottleneck."""
        lengths = (self.data.max_query_tokens, self.data.max_document_tokens)
        return self.model.sequence_tokens(lengths[0]), self.model.sequence_tokens(lengths[1])

    def with_dtype(self, dtype: Dtype) -> RunConfig:
        """This config with a dtype in the place of `auto`; one that was asked for by name stays."""
        if self.model.dtype != "auto":
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, dtype=dtype))

    # ---- the run folder ---------------------------------------------------------------------------------------

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir)

    def stage_path(self, stage: StageName) -> Path:
        """`runs/NAME/learn` or `runs/NAME/represent`."""
        return self.run_path / stage

    def stage_base(self, stage: StageName) -> Path:
        """The model that a stage starts from."""
        return self.learn_export if stage == "represent" and self.learn.steps else Path(self.model.base)

    def stage(self, stage: StageName) -> LearnConfig | RepresentConfig:
        """The settings of a stage."""
        return self.learn if stage == "learn" else self.represent

    def stage_export(self, stage: StageName) -> Path:
        """The folder of the model that a stage leaves."""
        return self.learn_export if stage == "learn" else self.model_path

    @property
    def learn_export(self) -> Path:
        """The model after stage 1, which stage 2 starts from."""
        return self.run_path / "learn" / "export"

    @property
    def model_path(self) -> Path:
        """The finished model."""
        return self.run_path / "model"

    @property
    def evaluated_path(self) -> Path:
        """The model whose evaluation the run ends with: that of the last stage that has steps."""
        return self.model_path if self.represent.steps else self.learn_export

    @property
    def report_path(self) -> Path:
        return self.run_path / "report"


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, ready for YAML or JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
