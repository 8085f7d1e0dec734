"""`lbr encode`: the vectors of a collection, by this process or as one rank of many."""

from __future__ import annotations

import argparse
from pathlib import Path

from lbr_dist.console import Say, silent
from lbr_dist.launch.commands.columns import add_columns, columns_of
from lbr_dist.storage.hub import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lbr encode`."""
    add = parser.add_argument
    add("model", help="model folder, or the Hub id of a model in the Hugging Face cache")
    add("input", type=Path, help="a file or folder of documents, see docs/data.md")
    add("--out", type=Path, required=True, help="FILE.npy (with FILE.ids next to it) or FILE.parquet")
    add("--kind", choices=("query", "document"), default="document", help="which prompt to use")
    add("--part-texts", type=int, default=4096, help="texts per part; a killed rank loses at most one")
    add("--threads", type=int, help="threads per rank on a CPU (default: its cores)")
    add("--chunk-tokens", type=int, default=8192, help="tokens per forward pass")
    add_columns(parser)


def run(args: argparse.Namespace, say: Say) -> None:
    """Encode the collection.

    Raises:
        ConfigError, DataError, ModelError, LaunchError: see the messages.
    """
    model, columns = model_folder(args.model, "model"), columns_of(args)  # before torch is imported

    from lbr_dist.encode.collection import EncodeJob, encode_collection
    from lbr_dist.ranks.group import joined
    from lbr_dist.ranks.process import quiet_libraries

    sizes = (args.chunk_tokens, args.part_texts, args.threads)
    job = EncodeJob(model, args.input, args.out, args.kind, *sizes, columns)
    with joined() as ranks:
        quiet_libraries()
        encode_collection(job, ranks, say if ranks.is_first else silent)
