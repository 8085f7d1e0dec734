"""Our stage 2 on prepared pairs, as one rank, for `benchmarks/stage2.py`. The other libraries read the same file.

Prints a line with `print_result`: `step_seconds`, `step_cpu_seconds` (of this process), `losses`, `grad_norms`,
`real_tokens_per_step`, `peak_rss_bytes`, the `chunks` of a step, and `kept_graphs`, how many of their graphs were kept.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch.distributed as dist
from measure import print_result, status_bytes

from lbr_dist.config import DataConfig, LearnConfig, ModelConfig, OptimizerConfig, RepresentConfig, RunConfig
from lbr_dist.data.pairs import PairBatch
from lbr_dist.data.tokenizer import EmbeddingSettings, TextTokenizer
from lbr_dist.ranks import group
from lbr_dist.ranks.process import quiet_libraries
from lbr_dist.represent import ContrastiveStep, Represent
from lbr_dist.trainer import load_engine


def read_batches(path: Path, size: int, bottleneck: int) -> list[PairBatch]:
    """The global batches of a file of pairs; all documents of a batch must differ."""
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    bare = [{side: tuple(pair[side][1:-bottleneck]) for side in ("query", "document")} for pair in pairs]
    batches = []
    for start in range(0, len(bare) - size + 1, size):
        batch, numbers = bare[start : start + size], range(start, start + size)
        batches.append(
            PairBatch(
                queries=[pair["query"] for pair in batch],
                documents=[pair["document"] for pair in batch],
                positives=[(column,) for column in range(size)],
                query_names=[f"q{i}" for i in numbers],
                document_names=[f"d{i}" for i in numbers],
            )
        )
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True, help="pairs per step, over all ranks")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--chunk-tokens", type=int, default=None, help="planned by default")
    parser.add_argument("--keep-graphs", default="auto", help="chunks whose graphs are kept, or `auto`")
    parser.add_argument("--scale", type=float, required=True, help="1 / temperature")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    ranks = group.start()
    quiet_libraries()
    settings = EmbeddingSettings.read(args.model)
    assert settings is not None, f"{args.model} is not a model of ours"
    k = len(settings.bottleneck_ids)
    config = RunConfig(
        run_dir="unused",
        domain="unused",
        model=ModelConfig(base=str(args.model), bottleneck_tokens=k, dtype=args.dtype),
        data=DataConfig(
            corpus="unused",
            train="unused",
            max_query_tokens=settings.max_query_tokens,
            max_document_tokens=settings.max_document_tokens,
        ),
        learn=LearnConfig(steps=0),
        represent=RepresentConfig(
            batch_pairs=args.batch,
            chunk_tokens=args.chunk_tokens,
            keep_graphs="auto" if args.keep_graphs == "auto" else int(args.keep_graphs),
            temperature=1.0 / args.scale,
            # one rate for all weights, as in the other libraries
            optimizer=OptimizerConfig(lr=args.lr, bottleneck_lr_factor=1.0),
        ),
    )
    tokenizer = TextTokenizer(args.model)
    engine, _ = load_engine(Represent, config, args.model, tokenizer, ranks)
    engine.train()
    contrastive = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    seconds, cpu_seconds, tokens, losses, norms, chunks, kept = [], [], [], [], [], 0, 0
    for number, batch in enumerate(read_batches(args.pairs, args.batch, k)[: args.steps]):
        dist.barrier()
        began, cpu_began = time.perf_counter(), time.process_time()
        values = contrastive.accumulate([batch], f"0/{number}")
        update = engine.step(args.lr)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        tokens.append(int(values["num_tokens"]))
        losses.append(values["loss"])
        norms.append(update.grad_norm)
        chunks, kept = int(values["chunks"]), int(values["kept_graphs"])
    print_result(
        ranks.rank,
        step_seconds=seconds,
        step_cpu_seconds=cpu_seconds,
        losses=losses,
        grad_norms=norms,
        real_tokens_per_step=tokens,
        peak_rss_bytes=status_bytes("VmHWM"),
        chunks=chunks,
        kept_graphs=kept,
    )
    engine.close()
    group.stop()


if __name__ == "__main__":
    main()
