"""`lbr data negatives`: its options, the checks before a model is loaded, and its ranks."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lbr_dist.console import Say, silent
from lbr_dist.errors import ConfigError, DataError
from lbr_dist.launch.commands.columns import add_columns, columns_of

if TYPE_CHECKING:
    from lbr_dist.mining.candidates import Candidates
    from lbr_dist.mining.work import MiningSettings

MARGIN_PERCENT = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; docs/negatives.md gives the reasons for them."""
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="training pairs, in any format that a run reads")
    add("--documents", type=Path, required=True, help="the corpus that negatives are taken from")
    add("--out", type=Path, required=True, help="FILE.jsonl: the pairs with their negatives")
    add("--with", dest="miner", choices=("model", "bm25"), help="default: model, if there is --model")
    add("--model", help="a model of ours, a sentence-transformers folder, or a causal LM")
    add("--index", choices=("exact", "ivf"), default="exact", help="ivf: faiss, faster in a large corpus, not exact")
    add("--negatives", type=int, default=8, help="negatives per pair, at most")
    add("--first", type=int, default=1, help="rank of the first candidate that may be taken")
    add("--last", type=int, default=100, help="rank of the last candidate that may be taken")
    percent = f"keep what scores at most this share of the positive's score (default {MARGIN_PERCENT}; BM25: no margin)"
    add("--margin-percent", type=float, help=percent)
    add("--margin-absolute", type=float, help="keep what scores at least this much less than the positive")
    add("--sample", choices=("top", "random"), default="top", help="which of the kept candidates to take")
    add("--seed", type=int, default=0, help="seed of --sample random")
    add("--bm25-tokens", choices=("words", "characters"), default="words")
    add("--chunk-tokens", type=int, default=8192, help="tokens per forward pass")
    add("--ranks", type=int, help="processes to start here (default: one per GPU, or one per core if memory allows)")
    add("--threads", type=int, default=1, help="threads per rank on a CPU")
    add_columns(parser)


def run(args: argparse.Namespace, say: Say) -> None:
    """Mine: in this process, on ranks that we start, or as one rank of another launcher.

    Raises:
        ConfigError, DataError, ModelError, LaunchError: if possible before a model is loaded or a rank starts.
    """
    from lbr_dist import preflight
    from lbr_dist.mining.candidates import Candidates
    from lbr_dist.mining.work import MiningSettings
    from lbr_dist.ranks.hardware import count_gpus
    from lbr_dist.ranks.rendezvous import started_as
    from lbr_dist.storage.hub import model_folder

    gpus = count_gpus()
    miner: Literal["model", "bm25"] = args.miner or ("model" if args.model else "bm25")
    if args.miner is None and args.model is None:
        raise ConfigError("--model: found none, expected a model folder, or --with bm25.")
    margin = args.margin_percent
    if margin is None and args.margin_absolute is None and miner == "model":
        margin = MARGIN_PERCENT
    settings = MiningSettings(
        pairs=str(args.pairs),
        documents=str(args.documents),
        out=str(args.out),
        model=str(model_folder(args.model, "--model")) if args.model and miner == "model" else None,
        miner=miner,
        index=args.index,
        negatives=args.negatives,
        first=args.first,
        last=args.last,
        margin_percent=margin,
        margin_absolute=args.margin_absolute,
        sample=args.sample,
        seed=args.seed,
        bm25_tokens=args.bm25_tokens,
        chunk_tokens=args.chunk_tokens,
        threads=args.threads,
        device="cuda" if gpus else "cpu",
        columns=columns_of(args),
    )
    place = started_as(args.ranks)
    preflight.check_mining(settings)
    ranks = 0 if place else preflight.check_mining_ranks(settings, args.ranks, gpus)
    is_first = place is None or place.rank == 0
    candidates = Candidates.read(settings.pairs, settings.documents, say if is_first else silent, settings.columns)
    most = candidates.most_candidates()
    if most < settings.first:
        raise DataError(
            f"{settings.documents}: found {most} candidates for the pair that has the most (without the documents "
            f"that answer it), expected at least {settings.first} (--first). Add documents."
        )
    if args.ranks is None:
        # a rank without a unit of its own would only load the model
        texts = candidates.texts if settings.model else candidates.pairs
        ranks = min(ranks, math.ceil(len(texts) / settings.unit))
    if place:
        _run_as_rank(settings, candidates, say)
    else:
        _run_here(settings, candidates, ranks, say)


# ---- ranks --------------------------------------------------------------------------------------------------------


def _run_here(settings: MiningSettings, candidates: Candidates, ranks: int, say: Say) -> None:
    from lbr_dist.mining.work import SETTINGS, clean, prepare
    from lbr_dist.storage.whole_folder import locked

    settings.work.mkdir(parents=True, exist_ok=True)
    with locked(settings.work / "lock", say):
        prepare(settings, say)
        if ranks > 1:
            from lbr_dist.launch.local_ranks import run_stage

            run_stage("negatives", settings.work / SETTINGS, ranks, settings.work / "logs")
        else:
            from lbr_dist.mining.mine import mine
            from lbr_dist.ranks.group import Ranks
            from lbr_dist.ranks.process import quiet_libraries

            quiet_libraries()
            mine(settings, candidates, Ranks.alone(settings.device), say)
        clean(settings)


def _run_as_rank(settings: MiningSettings, candidates: Candidates, say: Say) -> None:
    """Mine as one rank of another launcher; the first rank makes the work folder and removes it."""
    from lbr_dist.mining.mine import mine
    from lbr_dist.mining.work import clean, prepare
    from lbr_dist.ranks import group
    from lbr_dist.ranks.process import quiet_libraries

    with group.joined() as ranks:
        quiet_libraries()
        if ranks.is_first:
            prepare(settings, say)
        group.meet(ranks)
        mine(settings, candidates, ranks, say)
        group.meet(ranks)
        if ranks.is_first:
            clean(settings)


def run_rank(settings_path: Path, say: Say) -> None:
    """Mine as one rank that we started; the parent process has prepared the work folder and will remove it."""
    from lbr_dist.mining.candidates import Candidates
    from lbr_dist.mining.mine import mine
    from lbr_dist.mining.work import read_settings
    from lbr_dist.ranks import group
    from lbr_dist.ranks.process import quiet_libraries

    settings = read_settings(settings_path)
    with group.joined() as ranks:
        quiet_libraries()
        mine(settings, Candidates.read(settings.pairs, settings.documents, columns=settings.columns), ranks, say)
