"""`lbr plan`: what a step of stage 2 costs on a cluster, computed without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lbr_dist.console import Say
from lbr_dist.errors import ConfigError, LbrError

if TYPE_CHECKING:
    from lbr_dist.config import RunConfig
    from lbr_dist.plan.machine import Machine
    from lbr_dist.plan.planner import StepPlanner
    from lbr_dist.plan.step import Batch, StepPlan

GPUS = ("a100-80g", "b200", "cpu", "h100", "h200")
SAMPLE = 512
CHARACTERS_A_TOKEN = 4.0
GIB = 2**30
POSITIVE = ("memory_gib", "efficiency", "tflops", "within_gbs", "between_gbs", "query_tokens", "document_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lbr plan`."""
    parser.add_argument("config", type=Path, help="YAML config; every field can be overridden by --section.field=value")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="ranks per node")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="device of each rank")
    parser.add_argument("--memory-gib", type=float, help="usable memory per rank (default: 90 %% of the device)")
    parser.add_argument("--efficiency", type=float, help="share of the peak that matrix products reach")
    parser.add_argument("--tflops", type=float, help="dense bfloat16 peak of a device")
    parser.add_argument("--within-gbs", type=float, help="GB/s that a rank receives from its node")
    parser.add_argument("--between-gbs", type=float, help="GB/s that a rank receives from other nodes")
    parser.add_argument("--query-tokens", type=float, help="mean tokens per query (default: measured on the data)")
    parser.add_argument(
        "--document-tokens", type=float, help="mean tokens per document (default: measured on the data)"
    )
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace, say: Say) -> None:
    """Plan and print.

    Raises:
        ConfigError, ModelError: the step cannot fit, or an option is out of range.
    """
    from lbr_dist.config.file import read_config
    from lbr_dist.model.probe import check_family
    from lbr_dist.plan.cost import StepCost
    from lbr_dist.plan.machine import Cluster
    from lbr_dist.plan.model import graph_bytes, model_sizes
    from lbr_dist.plan.planner import HEADROOM, StepPlanner
    from lbr_dist.ranks.hardware import fitting_dtype

    config = read_config(args.config, args.overrides)
    config = config.with_dtype(fitting_dtype(0) if args.gpu == "cpu" else "bfloat16")
    _check(args)
    machine = _machine(args)
    budget = args.memory_gib * GIB if args.memory_gib else HEADROOM * machine.memory
    folder = Path(config.model.base)
    check_family(folder)
    sizes = model_sizes(config.model, folder)
    batch, lengths = _batch(config, args)
    typical = [round(batch.query_tokens)] * 8 + [round(batch.document_tokens)] * round(
        8 * batch.documents / batch.pairs
    )
    graph = graph_bytes(config.model, folder, "cpu" if args.gpu == "cpu" else "cuda", typical)

    def planner(nodes: int) -> StepPlanner:
        cluster = Cluster(machine, nodes * args.gpus_per_node, args.gpus_per_node)
        return StepPlanner(config, sizes, graph, cluster, budget)

    here = planner(args.nodes)
    cost = StepCost(here)
    plan = cost.plan(batch)
    ranks = here.cluster.ranks
    say(f"model      {sizes.elements() / 1e9:.2f}e9 parameters, {_trained(here)}; sizes from {sizes.source}")
    say(f"cluster    {args.nodes} x {args.gpus_per_node} {machine.name}, {budget / GIB:.1f} GiB each to plan with")
    say(f"batch      {batch.pairs:,} pairs, up to {batch.documents:,} documents, {batch.tokens:,} tokens; {lengths}")
    say(f"\nA step of one rank of {ranks}\n  {_shape(plan, config)}")
    say("\nMemory at the peak (GiB)")
    for name, nbytes in plan.memory.items():
        say(f"  {name:<58}{nbytes / GIB:>9.3f}")
    say(f"  {'in all':<58}{sum(plan.memory.values()) / GIB:>9.3f}   of {budget / GIB:.1f}")
    if plan.host:
        say(f"  {'offloaded':<58}{plan.host / GIB:>9.3f}")
    say("\nTraffic that a rank receives (GB)          inside the node    between nodes")
    for name, received in plan.traffic.items():
        say(f"  {name:<41}{received.within / 1e9:>15.3f}{received.between / 1e9:>17.3f}")
    say(f"\nTime (s); {plan.flops / 1e12:,.0f} TFLOP a rank")
    for name, seconds in plan.seconds.items():
        say(f"  {name:<41}{seconds:>15.3f}")
    rate = config.represent.grad_accum * batch.pairs / plan.step_seconds
    say(f"  {'in all':<41}{plan.step_seconds:>15.3f}   {rate:,.0f} pairs a second; limit: {plan.limit}")
    say(f"\nThe largest batch that fits: {cost.largest_batch(batch):,} pairs, one graph kept")
    say("\n" + _scaling(planner, batch, args.nodes))
    say("\n" + _assumptions(here, machine, args))


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that is out of range."""
    for name in ("nodes", "gpus_per_node", *POSITIVE):
        value = getattr(args, name)
        least = "a positive number" if name in POSITIVE else "one or more"
        if value is not None and (value <= 0 or not math.isfinite(value)):
            raise ConfigError(f"--{name.replace('_', '-')}: found {value:g}, expected {least}.")


def _machine(args: argparse.Namespace) -> Machine:
    from lbr_dist.plan.machine import GB, MACHINES, available_memory

    machine = MACHINES[args.gpu]
    if args.gpu == "cpu":
        import torch

        memory = available_memory(torch.device("cpu"), args.gpus_per_node)
        machine = dataclasses.replace(machine, memory=float(memory))
    given = {
        "efficiency": args.efficiency,
        "flops": args.tflops and args.tflops * 1e12,
        "within": args.within_gbs and args.within_gbs * GB,
        "between": args.between_gbs and args.between_gbs * GB,
    }
    return dataclasses.replace(machine, **{name: value for name, value in given.items() if value is not None})


def _batch(config: RunConfig, args: argparse.Namespace) -> tuple[Batch, str]:
    """The batch by its mean lengths, and where these come from."""
    from lbr_dist.plan.step import Batch

    data, represent = config.data, config.represent
    means, source = _measured(config)
    query = args.query_tokens or means[0]
    document = args.document_tokens or means[1]
    if args.query_tokens and args.document_tokens:
        source = "given"
    elif args.query_tokens or args.document_tokens:
        source += ", one of them given"
    extra = config.model.sequence_tokens(0)
    query, document = min(query, data.max_query_tokens), min(document, data.max_document_tokens)
    words = f"queries of {query:.0f} and documents of {document:.0f} tokens ({source}), {extra} more each"
    documents = represent.batch_pairs * (1 + represent.hard_negatives)
    return Batch(represent.batch_pairs, documents, query + extra, document + extra), words


def _measured(config: RunConfig) -> tuple[tuple[float, float], str]:
    """Mean tokens of a query and a document, prompts included, and how they were found."""
    from lbr_dist.data.records import read_corpus, read_pairs

    data = config.data
    longest = (float(data.max_query_tokens), float(data.max_document_tokens))
    try:
        found = read_pairs(data.train, read_corpus(data.corpus, data.columns), data.columns)
    except (LbrError, OSError):
        return longest, "the maximum: the data cannot be read"
    step = -(-len(found.pairs) // SAMPLE)
    queries = [data.query_prompt + pair.query for pair in found.pairs[::step]]
    texts = list(found.documents.values())
    documents = [data.document_prompt + text for text in texts[:: -(-len(texts) // SAMPLE)]]
    folder = Path(config.model.base)
    if (folder / "tokenizer.json").exists():
        from lbr_dist.data.tokenizer import TextTokenizer

        tokenizer = TextTokenizer(folder)
        ids = (tokenizer.encode(queries, data.max_query_tokens), tokenizer.encode(documents, data.max_document_tokens))
        means = tuple(sum(map(len, side)) / len(side) for side in ids)
        return (means[0], means[1]), f"means of {len(queries)} and {len(documents)} texts of the data"
    characters = [
        sum(min(len(text) / CHARACTERS_A_TOKEN, most) for text in side) / len(side)
        for side, most in zip((queries, documents), longest, strict=True)
    ]
    return (characters[0], characters[1]), f"estimated: {CHARACTERS_A_TOKEN:g} characters per token, no tokenizer"


def _trained(planner: StepPlanner) -> str:
    trained = planner.sizes.elements(trained=True)
    return "all trained" if trained == planner.sizes.elements() else f"{trained / 1e6:.1f}e6 trained"


def _shape(plan: StepPlan, config: RunConfig) -> str:
    planned = "" if config.represent.chunk_tokens else " (planned)"
    kept = "all graphs kept: one pass" if plan.kept == plan.chunks else f"{plan.kept} graphs kept"
    whole = "gathered once, whole until the step's end" if plan.resident else f"gathered {plan.gathers:.1f} times"
    chunks = f"{plan.chunks} chunk{'s' if plan.chunks > 1 else ''}"
    if config.represent.grad_accum > 1:
        chunks = f"{config.represent.grad_accum} batches, each of {chunks}"
    return f"{chunks} of up to {plan.chunk_tokens:,} tokens{planned}, {kept}; parameters {whole}"


def _scaling(planner: Callable[[int], StepPlanner], batch: Batch, nodes: int) -> str:
    """Tables for 1 to 128 nodes: with a batch that grows with the nodes, and with the same batch for all."""
    from lbr_dist.plan.cost import StepCost

    lines = []
    for title, grows in (("Weak scaling: pairs grow with the nodes", True), ("Strong scaling: the same batch", False)):
        lines.append(f"{title}\n   nodes      pairs   chunks   kept   step (s)   pairs/s/node   between (GB)   limit")
        for count in (1, 2, 4, 8, 16, 32, 64, 128):
            pairs = max(2, batch.pairs * count // nodes) if grows else batch.pairs
            row = f"{count:>8}{pairs:>11,}"
            try:
                plan = StepCost(planner(count)).plan(batch.of(pairs))
            except ConfigError:
                lines.append(f"{row}   does not fit")
                continue
            between = sum(received.between for received in plan.traffic.values()) / 1e9
            lines.append(
                f"{row}{plan.chunks:>9}{plan.kept:>7}{plan.step_seconds:>11.2f}"
                f"{pairs / plan.step_seconds / count:>15.1f}{between:>15.1f}   {plan.limit}"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _assumptions(planner: StepPlanner, machine: Machine, args: argparse.Namespace) -> str:
    from lbr_dist.plan.planner import HEADROOM

    live, used = planner.config.engine.live_elements, planner.sizes.elements("layer", "embedding", "other")
    lines = [
        f"products reach {machine.efficiency:.0%} of {machine.flops / 1e12:,.1f} TFLOP/s (--efficiency, --tflops)",
        f"a rank receives {machine.within / 1e9:g} GB/s inside its node and {machine.between / 1e9:g} GB/s from others "
        "(--within-gbs, --between-gbs), each rank its own copy over its own link",
        "gathers overlap with the products; reduction, exchange and optimizer don't",
        "all ranks have equally many tokens and documents, no document is in a batch twice, all texts have mean length",
    ]
    if not args.memory_gib:
        lines.append(f"{HEADROOM:.0%} of a device's memory can be used (--memory-gib)")
    if not planner.resident:
        lines.append(
            f"engine.live_elements is {live:,}, fewer than the {used:,} of a pass: every pass gathers them again, "
            "and up to engine.prefetch_elements and one parameter for nothing; raise it, and they stay whole for a step"
        )
    return "Assumed\n" + "\n".join(f"  - {line}" for line in lines)
