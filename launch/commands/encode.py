"""`lbr encode`: the vectors of a collection, by this process or as one rank of many."""

from __future__ import annotations

import argparse
from pathlib import Path

from lbr_dist.console import Say, silent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lbr encode`."""
    add = parser.add_argument
    add("model", type=Path, help="model folder")
    add("input", type=Path, help="JSONL or Parquet with id and text")
    add("--out", type=Path, required=True, help="FILE.npy (with FILE.ids next to it) or FILE.parquet")
    add("--kind", choices=("query", "document"), default="document", help="which prompt to use")
    add("--part-texts", type=int, default=4096, help="texts per part; a killed rank loses at most one")
    add("--threads", type=int, help="threads per rank on a CPU (default: its cores)")
    add("--chunk-tokens", type=int, default=8192, help="tokens per forward pass")


def run(args: argparse.Namespace, say: Say) -> None:
    """Encode the collection.

    Raises:
        ConfigError, DataError, ModelError, LaunchError: see the messages.
    """
    from lbr_dist.encode.collection import EncodeJob, encode_collection
    from lbr_dist.ranks.group import joined
    from lbr_dist.ranks.process import quiet_libraries

    job = EncodeJob(args.model, args.input, args.out, args.kind, args.chunk_tokens, args.part_texts, args.threads)
    with joined() as ranks:
        quiet_libraries()
        encode_collection(job, ranks, say if ranks.is_first else silent)
