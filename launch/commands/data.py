"""`lbr data`: build a domain's data or a base model, grow a vocabulary, tokenise ahead of a run, mine negatives."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from lbr_dist.config import DataConfig
from lbr_dist.console import Say, silent
from lbr_dist.launch.commands import negatives
from lbr_dist.launch.commands.columns import add_columns, columns_of
from lbr_dist.ranks.rendezvous import here
from lbr_dist.storage.hub import model_folder

DOMAINS = ("medical", "chemistry", "code")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each kind of data, with its options."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    def kind(name: str, make: Callable[[argparse.Namespace, Say], None], text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text)
        sub.set_defaults(make=make)
        return sub

    for name in DOMAINS:
        sub = kind(name, _domain, f"the {name} domain: corpus, pairs and test collection")
        sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub = kind("vocab", _vocabulary, "a base model with a domain's words added to its vocabulary")
    sub.add_argument("--base", type=Path, required=True, help="Hugging Face folder of the base model")
    sub.add_argument("--corpus", type=Path, required=True, nargs="+", help="domain text: records with `text`")
    sub.add_argument("--out", type=Path, required=True, help="folder of the new base model")
    sub.add_argument("--pieces", type=int, default=2000, help="entries to add to the vocabulary")
    sub.add_argument("--min-count", type=int, default=10, help="how often a piece must occur in the corpus")
    sub = kind("tokens", _tokens, "tokenise stage 1's text ahead of a run, into the cache that runs read")
    sub.add_argument("--base", type=Path, required=True, help="Hugging Face folder of the base model")
    sub.add_argument("--corpus", type=Path, required=True, help="records with `text`")
    sub.add_argument("--cache-dir", default=DataConfig.cache_dir, help="data.cache_dir of the run")
    sub.add_argument("--longest-document", type=int, default=DataConfig.longest_document, help="as in the run")
    sub.add_argument("--processes", type=int, help="processes per rank (default: one per core)")
    add_columns(sub)
    negatives.add_arguments(kind("negatives", negatives.run, "hard negatives for training pairs, by model or BM25"))
    sub = kind("model", _model, "a base model as a Hugging Face folder")
    sub.add_argument("name", choices=("smollm2",))
    sub.add_argument("--out", type=Path, required=True, help="folder to write")


def run(args: argparse.Namespace, say: Say) -> None:
    """Make what was asked for.

    Raises:
        LbrError: see the messages.
    """
    args.make(args, say)


def _domain(args: argparse.Namespace, say: Say) -> None:
    from lbr_dist.data.domains.write import build_domain

    manifest = build_domain(args.what, args.out)
    counts = ", ".join(f"{name} {count:,}" for name, count in manifest["counts"].items())
    say(f"{args.what}: {counts}\nwritten to {args.out}")


def _model(args: argparse.Namespace, say: Say) -> None:
    from lbr_dist.data.domains.smollm2 import build_smollm2

    say(f"model: {build_smollm2(args.out)}")


def _vocabulary(args: argparse.Namespace, say: Say) -> None:
    base = model_folder(args.base, "--base")  # before torch is imported

    from lbr_dist.ranks.process import quiet_libraries
    from lbr_dist.vocabulary.add import add_vocabulary

    quiet_libraries()
    say(add_vocabulary(base, args.corpus, args.out, args.pieces, args.min_count, say).summary())


def _tokens(args: argparse.Namespace, say: Say) -> None:
    from lbr_dist.data.token_cache.build import build

    base = model_folder(args.base, "--base")
    cache, cores, columns = Path(args.cache_dir).expanduser(), len(os.sched_getaffinity(0)), columns_of(args)
    place = here()
    if place is None or place.world_size == 1:  # needs no torch
        processes = args.processes or cores
        tokens = build(args.corpus, base, cache, processes, say, args.longest_document, columns=columns)
        say(f"{tokens.report}\nwritten to {tokens.folder}")
        return
    from lbr_dist.ranks.group import joined

    with joined() as ranks:
        tell = say if ranks.is_first else silent
        processes = args.processes or ranks.cores
        tokens = build(args.corpus, base, cache, processes, tell, args.longest_document, ranks, columns)
        tell(f"{tokens.report}\nwritten to {tokens.folder}")
