"""The `lbr` command. Each subcommand imports what it needs when it runs, so that `lbr --help` is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lbr_dist import __version__
from lbr_dist.console import silent
from lbr_dist.errors import EXIT_INTERRUPTED, Interrupted, LbrError
from lbr_dist.ranks.rendezvous import here, started_as

if TYPE_CHECKING:
    from lbr_dist.config import RunConfig, StageName


def _say(message: str) -> None:
    print(message, flush=True)


# ---- training -------------------------------------------------------------------------------------------------


def _read_run(args: argparse.Namespace) -> RunConfig:
    from lbr_dist.config.file import read_config

    overrides = list(args.overrides)
    if args.ranks is not None:
        overrides.append(f"--cluster.ranks={args.ranks}")
    return read_config(args.config, overrides)


def _train(config: RunConfig, wanted: Sequence[StageName]) -> bool:
    """Run the wanted stages that have steps and are not finished. Returns whether this process evaluates next."""
    from lbr_dist import preflight
    from lbr_dist.config.file import write_config
    from lbr_dist.export.checksums import is_finished
    from lbr_dist.ranks.hardware import count_gpus

    preflight.check_run_folder(config)
    preflight.check_base(Path(config.model.base))
    preflight.check_prefixes(config)
    preflight.check_offload(config)
    preflight.check_attention(config, count_gpus())
    preflight.check_data(config)
    stages = [stage for stage in wanted if config.stage(stage).steps]
    if stages == ["represent"] and config.learn.steps and not (config.learn_export / "lbr.json").exists():
        from lbr_dist.errors import CheckpointError

        raise CheckpointError(
            f"{config.learn_export}: not found. Run `lbr learn` first, or set learn.steps to 0 to start from the base."
        )
    place = started_as(config.cluster.ranks)
    gpus = count_gpus()
    ranks = place.world_size if place else preflight.check_ranks(config, gpus)
    first_here = place is None or place.local_rank == 0
    todo: tuple[StageName, ...] = tuple(stage for stage in stages if not is_finished(config, stage))
    if "represent" in todo and first_here:
        preflight.check_plan(config, ranks, place.local_world_size if place else ranks, gpus)
    if todo and first_here:
        preflight.check_disk(config, todo, _say)
    resolved = config.run_path / "config.yaml"
    if place is not None:
        from lbr_dist.launch.worker import run_stages

        if "learn" in todo and first_here:
            preflight.check_text(config, _say)
        if place.rank == 0:
            write_config(config, resolved)
        return run_stages(config, todo)
    from lbr_dist.launch.local_ranks import run_stage
    from lbr_dist.storage.lock import run_lock

    with run_lock(config.run_path) as lock:
        preflight.check_run_folder(config)
        if "learn" in todo:
            preflight.check_text(config, _say)
        write_config(config, resolved)
        for stage in stages:
            if is_finished(config, stage):
                _say(f"{stage}: finished before, nothing to do")
                continue
            _say(f"{stage}: {config.stage(stage).steps} steps on {ranks} rank{'s' if ranks > 1 else ''}")
            run_stage(stage, resolved, ranks, config.run_path / stage / "logs", lock)
    return True


def learn(args: argparse.Namespace) -> None:
    _train(_read_run(args), ["learn"])


def represent(args: argparse.Namespace) -> None:
    _train(_read_run(args), ["represent"])


def run(args: argparse.Namespace) -> None:
    config = _read_run(args)
    if not _train(config, ["learn", "represent"]):
        return
    if config.data.test is None:
        _say(f"model: {config.model_path} (no data.test, so nothing is evaluated)")
        return
    if started_as(config.cluster.ranks) is not None:
        from lbr_dist.launch.worker import evaluate as evaluate_here

        evaluate_here(config)
        return
    from lbr_dist.launch.local_ranks import run_stage

    run_stage("evaluate", config.run_path / "config.yaml", 1, config.report_path)


# ---- models and data ------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> None:
    from lbr_dist.config import EvaluateConfig
    from lbr_dist.data.tokenizer import EmbeddingSettings
    from lbr_dist.errors import ConfigError
    from lbr_dist.evaluation.evaluate import TestSet, evaluate_folders, table
    from lbr_dist.ranks.process import quiet_libraries

    quiet_libraries()
    test = TestSet.read(args.pairs, args.documents)
    settings = EvaluateConfig(bm25_tokens=args.bm25_tokens, chunk_tokens=args.chunk_tokens)
    plain = EmbeddingSettings(args.pooling, query_prompt=args.query_prompt)
    folders = {"model": args.model}
    for beside in args.beside:
        name, equals, folder = beside.partition("=")
        if not (name.isidentifier() and equals and folder) or name in ("bm25", *folders):
            raise ConfigError(f"--beside: found {beside!r}, expected NAME=FOLDER with a name not used yet.")
        folders[name] = Path(folder)
    metrics = evaluate_folders(folders, test, settings, plain, 0, args.out, _say)
    _say(table(metrics["systems"]))
    _say(f"\nwritten to {args.out}")


def encode(args: argparse.Namespace) -> None:
    from lbr_dist.encode.collection import EncodeJob, encode_collection
    from lbr_dist.ranks.group import joined
    from lbr_dist.ranks.process import quiet_libraries

    job = EncodeJob(args.model, args.input, args.out, args.kind, args.chunk_tokens, args.part_texts, args.threads)
    with joined() as ranks:
        quiet_libraries()
        encode_collection(job, ranks, _say if ranks.is_first else silent)


def _tokens(args: argparse.Namespace) -> None:
    from lbr_dist.data.token_cache.build import build

    cache, cores = Path(args.cache_dir).expanduser(), len(os.sched_getaffinity(0))
    place = here()
    if place is None or place.world_size == 1:  # needs no torch
        tokens = build(args.corpus, args.base, cache, args.processes or cores, _say, args.longest_document)
        _say(f"{tokens.report}\nwritten to {tokens.folder}")
        return
    from lbr_dist.ranks.group import joined

    with joined() as ranks:
        say = _say if ranks.is_first else silent
        processes = args.processes or ranks.cores
        tokens = build(args.corpus, args.base, cache, processes, say, args.longest_document, ranks)
        say(f"{tokens.report}\nwritten to {tokens.folder}")


def data(args: argparse.Namespace) -> None:
    if args.what == "model":
        from lbr_dist.data.domains.smollm2 import build_smollm2

        _say(f"model: {build_smollm2(args.out)}")
        return
    if args.what == "vocab":
        from lbr_dist.ranks.process import quiet_libraries
        from lbr_dist.vocabulary.add import add_vocabulary

        quiet_libraries()
        _say(add_vocabulary(args.base, args.corpus, args.out, args.pieces, args.min_count, _say).summary())
        return
    if args.what == "tokens":
        _tokens(args)
        return
    if args.what == "negatives":
        from lbr_dist.launch.commands.negatives import run as mine

        mine(args, _say)
        return
    from lbr_dist.data.domains.write import build_domain

    manifest = build_domain(args.what, args.out)
    counts = ", ".join(f"{name} {count:,}" for name, count in manifest["counts"].items())
    _say(f"{args.what}: {counts}\nwritten to {args.out}")


def plan(args: argparse.Namespace) -> None:
    from lbr_dist.config.file import read_config
    from lbr_dist.launch.commands import plan as planning

    planning.run(args, read_config(args.config, args.overrides), _say)


def checkpoints(args: argparse.Namespace) -> None:
    from lbr_dist.launch.commands import checkpoints as commands

    commands.run(args, _say)


def submit(args: argparse.Namespace) -> None:
    from lbr_dist.slurm import submit as submission

    submission.run(args, _say)


def _slurm_command(name: str) -> Callable[[argparse.Namespace], None]:
    def run(args: argparse.Namespace) -> None:
        from lbr_dist.slurm import commands

        getattr(commands, name)(args, _say)

    return run


def doctor(args: argparse.Namespace) -> int:
    from lbr_dist.launch.doctor import command as commands

    return commands.run(args, _say)


def config(args: argparse.Namespace) -> None:
    from lbr_dist.config.file import describe

    _say(describe())


# ---- the parser -----------------------------------------------------------------------------------------------


def _parser(doctor_alone: bool = False) -> argparse.ArgumentParser:
    from lbr_dist.launch.doctor import command as doctor_command

    parser = argparse.ArgumentParser(
        prog="lbr",
        description="Learn Before Represent: turn a causal LLM into the embedding model of a domain.",
        epilog="Example: lbr run launch/configs/demo.yaml --ranks 2 --learn.steps=50",
    )
    parser.add_argument("--version", action="version", version=f"lbr-dist {__version__}")
    # deepspeed's launcher adds it before all other arguments; LOCAL_RANK has the same value
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def add_doctor() -> None:
        text = "Check this machine and its cluster: what a run can use, what is missing, and how to fix it."
        doctor_command.add_arguments(command("doctor", doctor, text))

    if doctor_alone:  # the other commands' options import packages, and the doctor must run when one is missing
        add_doctor()
        return parser
    from lbr_dist.config import DataConfig
    from lbr_dist.launch.commands import checkpoints as checkpoint_commands
    from lbr_dist.launch.commands import negatives
    from lbr_dist.launch.commands import plan as planning
    from lbr_dist.slurm import arguments as slurm_commands

    for name, function, text in (
        ("run", run, "Both stages, export, evaluation and report."),
        ("learn", learn, "Stage 1: causal language modelling through the bottleneck."),
        ("represent", represent, "Stage 2: contrastive training on the compressed vectors."),
    ):
        sub = command(name, function, text)
        sub.add_argument(
            "config", type=Path, help="YAML config; every field can be overridden by --section.field=value"
        )
        sub.add_argument("--ranks", type=int, help="processes to start here (default: one per GPU, or 2 on a CPU)")
        sub.set_defaults(takes_overrides=True)
    sub = command("submit", submit, "Queue a run's stages on Slurm, as one chain of jobs.")
    slurm_commands.add_submit_arguments(sub)
    sub.set_defaults(takes_overrides=True)
    for name, text in (
        ("status", "The state of a submitted run: jobs, steps, losses, time left, reasons."),
        ("logs", "The logs of a submitted run's jobs and ranks."),
        ("cancel", "Cancel all jobs of a submitted run; what it has saved is kept."),
    ):
        getattr(slurm_commands, f"add_{name}_arguments")(command(name, _slurm_command(name), text))
    sub = command("plan", plan, "Estimate what a step of stage 2 costs on a cluster: memory, traffic, time.")
    planning.add_arguments(sub)
    sub.set_defaults(takes_overrides=True)
    sub = command("checkpoints", checkpoints, "List, verify, export or prune the checkpoints of a run.")
    checkpoint_commands.add_arguments(sub)
    add_doctor()
    command("config", config, "Print every key of a config with its default and meaning.")

    def encoding(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--chunk-tokens", type=int, default=8192, help="tokens per forward pass")

    sub = command("evaluate", evaluate, "Score a model folder on held-out pairs, next to BM25.")
    sub.add_argument("model", type=Path, help="a model of ours, a sentence-transformers folder, or a causal LM")
    sub.add_argument("--pairs", type=Path, required=True, help="held-out pairs")
    sub.add_argument("--documents", type=Path, required=True, help="the collection to search")
    sub.add_argument("--out", type=Path, required=True, help="folder for metrics.json and the TREC files")
    sub.add_argument(
        "--beside", action="append", default=[], metavar="NAME=FOLDER", help="another model to score, e.g. the base"
    )
    sub.add_argument("--pooling", choices=("mean", "last"), default="mean", help="for a bare causal LM")
    sub.add_argument("--query-prompt", default="", help="for a bare causal LM")
    sub.add_argument("--bm25-tokens", choices=("words", "characters"), default="words")
    encoding(sub)
    sub = command("encode", encode, "Encode a collection as vectors, in .npy or .parquet.")
    sub.add_argument("model", type=Path, help="model folder")
    sub.add_argument("input", type=Path, help="JSONL or Parquet with id and text")
    sub.add_argument("--out", type=Path, required=True, help="FILE.npy (with FILE.ids next to it) or FILE.parquet")
    sub.add_argument("--kind", choices=("query", "document"), default="document", help="which prompt to use")
    sub.add_argument("--part-texts", type=int, default=4096, help="texts per part; a killed rank loses at most one")
    sub.add_argument("--threads", type=int, help="threads per rank on a CPU (default: its cores)")
    encoding(sub)
    sub = command("data", data, "Build a domain's data, or the base model of the demo.")
    kinds = sub.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name in ("medical", "chemistry", "code"):
        kind = kinds.add_parser(name, help=f"the {name} domain: corpus, pairs and test collection")
        kind.add_argument("--out", type=Path, required=True, help="folder to write")
    kind = kinds.add_parser("vocab", help="a base model with a domain's words added to its vocabulary")
    kind.add_argument("--base", type=Path, required=True, help="Hugging Face folder of the base model")
    kind.add_argument("--corpus", type=Path, required=True, nargs="+", help="domain text: records with `text`")
    kind.add_argument("--out", type=Path, required=True, help="folder of the new base model")
    kind.add_argument("--pieces", type=int, default=2000, help="entries to add to the vocabulary")
    kind.add_argument("--min-count", type=int, default=10, help="how often a piece must occur in the corpus")
    kind = kinds.add_parser("tokens", help="tokenise stage 1's text ahead of a run, into the cache that runs read")
    kind.add_argument("--base", type=Path, required=True, help="Hugging Face folder of the base model")
    kind.add_argument("--corpus", type=Path, required=True, help="records with `text`")
    kind.add_argument("--cache-dir", default=DataConfig.cache_dir, help="data.cache_dir of the run")
    kind.add_argument("--longest-document", type=int, default=DataConfig.longest_document, help="as in the run")
    kind.add_argument("--processes", type=int, help="processes per rank (default: one per core)")
    negatives.add_arguments(kinds.add_parser("negatives", help="hard negatives for training pairs, by model or BM25"))
    kind = kinds.add_parser("model", help="a base model as a Hugging Face folder")
    kind.add_argument("name", choices=("smollm2",))
    kind.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for a user's error; 2 for a wrong command line; 75 for a run that was asked to stop and
        saved a checkpoint; 130 for a second Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(doctor_alone=given[:1] == ["doctor"])
    args, rest = parser.parse_known_args(given)
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    try:
        code: int | None = args.run(args)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except LbrError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}. Name a path that can be read and written.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; start the run again to resume from its last checkpoint", file=sys.stderr)
        return 130
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
