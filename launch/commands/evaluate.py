"""`lbr evaluate`: score model folders on held-out pairs, next to BM25."""

from __future__ import annotations

import argparse
from pathlib import Path

from lbr_dist.console import Say
from lbr_dist.errors import ConfigError
from lbr_dist.launch.commands.columns import add_columns, columns_of
from lbr_dist.storage.hub import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lbr evaluate`."""
    add = parser.add_argument
    add("model", help="a model of ours, a sentence-transformers folder, or a causal LM")
    add("--pairs", type=Path, required=True, help="held-out pairs")
    add("--documents", type=Path, required=True, help="the collection to search")
    add("--out", type=Path, required=True, help="folder for metrics.json and the TREC files")
    add("--beside", action="append", default=[], metavar="NAME=FOLDER", help="another model to score, e.g. the base")
    add("--pooling", choices=("mean", "last"), default="mean", help="for a bare causal LM")
    add("--query-prompt", default="", help="for a bare causal LM")
    add("--bm25-tokens", choices=("words", "characters"), default="words")
    add("--chunk-tokens", type=int, default=8192, help="tokens per forward pass")
    add_columns(parser)


def run(args: argparse.Namespace, say: Say) -> None:
    """Score the folders and print the table.

    Raises:
        ConfigError, DataError, ModelError: see the messages.
    """
    # before torch is imported
    folders = {"model": model_folder(args.model, "model")}
    for beside in args.beside:
        name, equals, folder = beside.partition("=")
        if not (name.isidentifier() and equals and folder) or name in ("bm25", *folders):
            raise ConfigError(f"--beside: found {beside!r}, expected NAME=FOLDER with a name not used yet.")
        folders[name] = model_folder(folder, f"--beside {name}")

    from lbr_dist.config import EvaluateConfig
    from lbr_dist.data.tokenizer import EmbeddingSettings
    from lbr_dist.evaluation.evaluate import TestSet, evaluate_folders, table
    from lbr_dist.ranks.process import quiet_libraries

    quiet_libraries()
    test = TestSet.read(args.pairs, args.documents, columns_of(args))
    settings = EvaluateConfig(bm25_tokens=args.bm25_tokens, chunk_tokens=args.chunk_tokens)
    plain = EmbeddingSettings(args.pooling, query_prompt=args.query_prompt)
    metrics = evaluate_folders(folders, test, settings, plain, 0, args.out, say)
    say(table(metrics["systems"]))
    say(f"\nwritten to {args.out}")
