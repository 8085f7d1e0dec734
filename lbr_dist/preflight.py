"""All checks before a rank starts: files, model folder, batch sizes, run folder, number of ranks.

Imports no torch. The ranks read the files again.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lbr_dist.checkpoint.manifest import STATE_BYTES, Checkpoints, free_bytes
from lbr_dist.config import RunConfig, StageName, sequence_tokens, to_dict
from lbr_dist.config.changes import CHANGES_NO_RESULT, forbidden_changes
from lbr_dist.console import Say, gib
from lbr_dist.data.records import check_apart, check_columns, check_enough, read_corpus, read_pairs
from lbr_dist.errors import ConfigError, LaunchError, ModelError
from lbr_dist.mining.work import MiningSettings
from lbr_dist.ranks import hardware
from lbr_dist.storage.files import others_who_write
from lbr_dist.storage.headers import check_plain_weights, num_elements
from lbr_dist.storage.hub import why_not_a_folder

RANK_BYTES = 900 * 2**20  # interpreter, torch and buffers of one rank, measured on a CPU
OPTIMIZER_BYTES = 18  # bf16 weight and gradient, fp32 gradient, master weight and two moments


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: found a {type(content).__name__}, expected a JSON object.")
    return content


def check_base(folder: Path, field: str = "model.base") -> None:
    """Refuse a folder that is not a causal LM with plain safetensors and a tokenizer that fits it.

    `check_family` looks further, but needs torch.

    Args:
        folder: the folder to check.
        field: the setting that names it, for messages.

    Raises:
        ModelError: names what is missing, or what disagrees.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{field}: found {str(folder)!r}, which is {why_not_a_folder(str(folder))} `lbr data model smollm2 --out "
            "DIR` makes one."
        )
    if not (folder / "config.json").exists():
        raise ModelError(f"{field}: {folder} has no config.json, so it is not a Hugging Face model folder.")
    config = _json(folder / "config.json")
    architectures = config.get("architectures") or []
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise ModelError(
            f"{field}: {folder / 'config.json'} has architecture {', '.join(map(str, architectures)) or 'none'}, "
            "expected one ending in ForCausalLM. The method needs a causal language model."
        )
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise ModelError(f"{field}: {folder} has no model.safetensors. Save the model again with save_pretrained.")
    check_plain_weights(folder, config)
    if not (folder / "tokenizer.json").exists():
        raise ModelError(f"{field}: {folder} has no tokenizer.json. Save its fast tokenizer into the folder.")
    tokenizer = _json(folder / "tokenizer.json")
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    added = [int(token["id"]) for token in tokenizer.get("added_tokens", [])]
    highest = max([*(vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]), *added])
    if "vocab_size" in config and highest >= int(config["vocab_size"]):
        raise ModelError(
            f"{field}: tokenizer and model disagree: {folder / 'tokenizer.json'} goes up to id {highest}, "
            f"config.json has vocab_size {config['vocab_size']}. They belong to different models."
        )


def check_family(folder: Path) -> None:
    """Try the base's family on a small copy, and compare its files with its config. Imports torch, and takes seconds.

    Raises:
        ModelError: says what would be wrong.
    """
    from lbr_dist.model import probe

    probe.check_family(folder, "model.base")
    probe.check_weights(folder)


def check_positions(config: RunConfig) -> None:
    """Refuse sequences that are longer than the base has positions.

    Raises:
        ConfigError: names the fields that make them as long.
    """
    positions = _json(Path(config.model.base) / "config.json").get("max_position_embeddings")
    if not isinstance(positions, int):
        return
    k, learn, data = config.model.bottleneck_tokens, config.learn, config.data
    uses = []
    if learn.steps:
        name = "learn.max_text_tokens"
        longest = sequence_tokens(learn.max_text_tokens, k, learn.max_text_tokens)
        uses.append((name, learn.max_text_tokens, longest, f"1 + 2 x {name} + model.bottleneck_tokens"))
    if config.represent.steps or data.test is not None:
        for name, length in zip(("max_query_tokens", "max_document_tokens"), config.sequence_lengths, strict=True):
            uses.append((f"data.{name}", getattr(data, name), length, f"1 + data.{name} + model.bottleneck_tokens"))
    for name, found, longest, sum_of in uses:
        if longest > positions:
            raise ConfigError(
                f"{name}: found {found}, which makes sequences of {longest} tokens ({sum_of}). {config.model.base} has "
                f"{positions} positions (max_position_embeddings in config.json). Lower {name}, or use another base."
            )


def check_prefixes(config: RunConfig) -> None:
    """Refuse Matryoshka prefixes that are wider than the model's vectors.

    Raises:
        ConfigError: names both widths.
    """
    width = _json(Path(config.model.base) / "config.json").get("hidden_size")
    widest = max(config.represent.prefixes, default=0)
    if width is not None and widest > int(width):
        raise ConfigError(
            f"represent.prefixes: found {widest}, the vectors of {config.model.base} have {width} elements. "
            f"Give widths of at most {width}."
        )


def check_data(config: RunConfig) -> None:
    """Read every data file once, and check that there are enough pairs for the batches.

    Raises:
        DataError: names the file and line.
    """
    data = config.data
    if data.columns:
        paths = (data.corpus, data.learn_corpus, data.train, data.dev, data.test, data.test_documents)
        check_columns(data.columns, [path for path in paths if path])
    corpus = read_corpus(data.corpus, data.columns)
    pairs = read_pairs(data.train, corpus, data.columns)
    if config.represent.steps:
        check_enough(pairs.pairs, config.represent, data.train)
    if data.dev is not None:
        check_apart(read_pairs(data.dev, corpus, data.columns).pairs, pairs.pairs, data.dev, data.train)
    if data.test is not None:
        searched = read_corpus(data.test_documents, data.columns) if data.test_documents else corpus
        read_pairs(data.test, searched, data.columns)


def check_text(config: RunConfig, say: Say) -> None:
    """Tokenise stage 1's text on all cores, unless an earlier run has, and check that it fills a batch.

    Raises:
        DataError, ModelError, LaunchError: text or tokens cannot be read or written, or there is too little text.
    """
    from lbr_dist.data.token_cache.build import token_cache
    from lbr_dist.data.token_cache.cache import learn_texts

    texts, held_out = learn_texts(token_cache(config, len(os.sched_getaffinity(0)), say), config)
    short = f", {texts.num_too_short:,} documents of one token skipped" if texts.num_too_short else ""
    say(f"learn: {len(texts):,} texts of up to {texts.longest} tokens, {len(held_out)} more held out{short}")


def check_attention(config: RunConfig, gpus: int) -> None:
    """Refuse an attention kernel that was chosen by name and cannot run here.

    Raises:
        ConfigError: gives the reason.
    """
    if config.model.attention == "auto":
        return
    import torch

    from lbr_dist.kernels.attention import why_not

    model = _json(Path(config.model.base) / "config.json")
    heads = int(model.get("num_attention_heads", 1))
    head_dim = int(model.get("head_dim") or int(model.get("hidden_size", heads)) // heads)
    reason = why_not(config.model.attention, "cuda" if gpus else "cpu", getattr(torch, config.model.dtype), head_dim)
    if reason is not None:
        raise ConfigError(f"model.attention: found {config.model.attention!r}, but {reason}. Use `auto` or another.")


def check_dtype(config: RunConfig, asked: str, gpus: int, say: Say) -> None:
    """Say which dtype `auto` takes, and warn of a bfloat16 that was asked for by name and would crawl.

    Args:
        config: the run, its dtype settled.
        asked: `model.dtype` as it was given.
        gpus: GPUs that the ranks use; 0 for CPU ranks.
    """
    has_units, dtype = hardware.has_bfloat16(gpus), config.model.dtype
    device = "GPU" if gpus else "CPU"
    if dtype == "bfloat16" and not has_units:
        kept = "the run started with it, and keeps it" if asked == "auto" else "`auto` takes float32 here"
        say(
            f"warning: model.dtype: bfloat16, but this {device} has no units for it: a step takes many times as long "
            f"as in float32 ({kept})"
        )
    elif asked == "auto":
        say(f"dtype: {dtype}, since this {device} has {'' if has_units else 'no '}units for bfloat16")


def check_offload(config: RunConfig) -> None:
    """Refuse an nvme offload that this machine cannot do.

    Raises:
        ConfigError: the folder cannot be written, or libaio is missing.
    """
    engine = config.engine
    if "nvme" not in (engine.offload_optimizer, engine.offload_parameters):
        return
    if not os.access(str(engine.nvme_path), os.W_OK | os.X_OK):
        raise ConfigError(f"engine.nvme_path: found {engine.nvme_path!r}, expected a folder that can be written to.")
    if ctypes.util.find_library("aio") is None:
        raise ConfigError(
            "engine.offload_optimizer, engine.offload_parameters: `nvme` needs libaio, which DeepSpeed compiles its "
            "reader against at the first start. Install libaio-dev, or use `cpu`."
        )


def check_run_folder(config: RunConfig) -> None:
    """Refuse a run folder that holds another run, or that others can write to: no run could resume in it.

    Raises:
        ConfigError: names the fields that differ, or who can write.
    """
    path = config.run_path / "config.yaml"
    who = others_who_write(config.run_path, config.checkpoint.trust_group) if config.run_path.is_dir() else None
    if who is not None:
        raise ConfigError(
            f"run_dir: {config.run_path} can be changed by {who}, so a stopped run could not trust its checkpoints. "
            f"`chmod go-w` it as its owner, name another, or trust its group with --checkpoint.trust_group=true."
        )
    if not path.exists():
        return
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = forbidden_changes(found, to_dict(config)) if isinstance(found, dict) else ["all of it"]
    if names:
        raise ConfigError(
            f"{path}: this run folder holds another config; it differs in {', '.join(names)}. "
            f"Name another run_dir, or set them back. What may differ: {', '.join(CHANGES_NO_RESULT)}."
        )


def check_disk(config: RunConfig, stages: Sequence[StageName], say: Say) -> None:
    """Refuse a run folder without room for one checkpoint; warn if there is no room for all that will be kept.

    Raises:
        LaunchError: says how much is free, and how much is needed.
    """
    if config.model.lora.rank or config.engine.offload_optimizer == "nvme":
        return  # checkpoints are small, or there are none
    one = STATE_BYTES * sum(num_elements(file) for file in Path(config.model.base).glob("*.safetensors"))
    folders = [Checkpoints(config.stage_path(stage) / "checkpoints") for stage in stages]
    there = sum(len(folder.complete()) for folder in folders)
    wanted = len(stages) * config.checkpoint.keep + 1 - there
    free = free_bytes(config.run_path)
    room = f"{config.run_path}: has {gib(free)} free; a checkpoint takes {gib(one)}"
    if free < one:
        raise LaunchError(f"{room}. Make room, or name a run_dir elsewhere.")
    if free < one * wanted:
        say(f"warning: {room}, and up to {wanted} more are kept at a time (checkpoint.keep {config.checkpoint.keep})")


def check_ranks(config: RunConfig, gpus: int) -> int:
    """The number of ranks to start on this machine.

    Raises:
        LaunchError: more ranks than GPUs, or on a CPU more than its cores or memory allow.
    """
    wanted = config.cluster.ranks
    if gpus:
        if wanted is not None and wanted > gpus:
            raise LaunchError(f"--ranks: found {wanted}, this machine has {gpus} GPUs. Give at most {gpus}.")
        return wanted or gpus
    ranks = wanted or 2
    cores = len(os.sched_getaffinity(0))
    if ranks > 4 * cores:
        raise LaunchError(f"--ranks: found {ranks}, this machine has {cores} cores. Give at most {4 * cores}.")
    weights = sum(file.stat().st_size for file in Path(config.model.base).glob("*.safetensors"))
    copy = STATE_BYTES if config.checkpoint.background and not config.model.lora.rank else 0
    needed = ranks * RANK_BYTES + weights // 2 * (OPTIMIZER_BYTES + copy)
    available = hardware.memory()[0]
    if needed > available:
        raise LaunchError(
            f"--ranks: {ranks} ranks of this model need about {gib(needed)}, this machine has "
            f"{gib(available)} free. Give fewer ranks, or a smaller model."
        )
    return ranks


# ---- mining of negatives -------------------------------------------------------------------------------------------


def check_mining(settings: MiningSettings) -> None:
    """Refuse to mine negatives if the result cannot be written, or the model or the index library is missing.

    Raises:
        ConfigError, ModelError: names the option.
    """
    out = Path(settings.out)
    if out.suffix != ".jsonl" or out.is_dir():
        raise ConfigError(f"--out: found {settings.out!r}, expected the name of a file that ends in .jsonl.")
    for name in ("pairs", "documents"):
        other = Path(getattr(settings, name))
        if other.resolve() == out.resolve():
            raise ConfigError(f"--out: found {settings.out!r}, which is --{name}. Name another file.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: found {settings.out!r}, but {parent} is not a writable folder.")
    if settings.index == "ivf" and importlib.util.find_spec("faiss") is None:
        raise ConfigError(
            "--index ivf: the package faiss is not installed. Install it with `pip install 'lbr-dist[mining]'`, or use "
            "--index exact, which needs no package."
        )
    if settings.model is None:
        return
    folder = Path(settings.model)
    if not (folder / "modules.json").exists():
        check_base(folder, "--model")
    elif not any(folder.rglob("*.safetensors")):
        raise ModelError(f"--model: {folder} has no .safetensors file. Save or copy the model again.")


def check_mining_ranks(settings: MiningSettings, wanted: int | None, gpus: int) -> int:
    """The number of ranks to start. On a CPU the default is as many as cores and memory allow.

    Raises:
        LaunchError: more ranks than GPUs, or on a CPU more than its cores or memory allow.
    """
    if wanted is not None and wanted < 1:
        raise LaunchError(f"--ranks: found {wanted}, expected one or more.")
    if gpus:
        if wanted is not None and wanted > gpus:
            raise LaunchError(f"--ranks: found {wanted}, this machine has {gpus} GPUs. Give at most {gpus}.")
        return wanted or gpus
    cores = len(os.sched_getaffinity(0))
    weights = sum(f.stat().st_size for f in Path(settings.model).rglob("*.safetensors")) if settings.model else 0
    fitting = int(hardware.memory()[0] // (RANK_BYTES + weights))
    if wanted is None:
        return max(1, min(cores // settings.threads, fitting))
    if wanted > 4 * cores:
        raise LaunchError(f"--ranks: found {wanted}, this machine has {cores} cores. Give at most {4 * cores}.")
    if wanted > max(1, fitting):
        raise LaunchError(f"--ranks: found {wanted}, this machine has room for {fitting} ranks with this model.")
    return wanted


# ---- the plan of stage 2 -------------------------------------------------------------------------------------------


def check_plan(config: RunConfig, ranks: int, local_ranks: int, gpus: int, memory: int | None = None) -> None:
    """Refuse a step of stage 2 that does not fit into memory, before stage 1 has run for days.

    Args:
        config: the run.
        ranks: ranks on all nodes.
        local_ranks: ranks on each node.
        gpus: GPUs on each node; 0 for CPU ranks.
        memory: bytes for each rank. Default: this machine's GPU memory, or a rank's share of its free memory.

    Raises:
        ConfigError: names the nearest settings that fit.
    """
    if memory is None:
        memory = hardware.gpu_bytes() if gpus else hardware.memory()[0] // local_ranks
    if not config.represent.steps or memory is None:
        return
    from lbr_dist.plan.machine import MACHINES, Cluster
    from lbr_dist.plan.model import graph_bytes, model_sizes
    from lbr_dist.plan.planner import HEADROOM, StepPlanner

    base = Path(config.model.base)
    graph = graph_bytes(config.model, base, "cuda" if gpus else "cpu", config.sequence_lengths)
    # the kind of GPU only decides how long a step takes, not whether it fits
    cluster = Cluster(MACHINES["h100" if gpus else "cpu"], ranks, local_ranks)
    StepPlanner(config, model_sizes(config.model, base), graph, cluster, HEADROOM * memory)
