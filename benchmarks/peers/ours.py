"""Our stage 1 on prepared sequences, as one rank, for `benchmarks/stage1.py`. Trainer reads the same file.

The last line that each rank prints is a JSON object: `rank`, `step_seconds`, `peak_rss_bytes`, `real_tokens_per_step`
and `losses`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from lbr_dist.config import DataConfig, LearnConfig, ModelConfig, RunConfig
from lbr_dist.data.packing import TrainingSequence
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.learn import Learn, accumulate_step
from lbr_dist.ranks import group
from lbr_dist.ranks.process import quiet_libraries
from lbr_dist.trainer import load_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sequences", type=Path, required=True)
    parser.add_argument("--form", choices=("mask", "plain"), default="mask")
    parser.add_argument("--batch", type=int, required=True, help="sequences per step, over all ranks")
    parser.add_argument("--row-tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    ranks = group.start()
    quiet_libraries()
    plain = args.form == "plain"
    k = 0 if plain else 8
    config = RunConfig(
        run_dir="unused",
        domain="unused",
        model=ModelConfig(base=str(args.model), bottleneck_tokens=8, dtype="bfloat16"),
        data=DataConfig(corpus="unused", train="unused"),
        learn=LearnConfig(bottleneck="none" if plain else "mask", row_tokens=args.row_tokens, max_text_tokens=64),
    )
    tokenizer = TextTokenizer(args.model)
    engine, _ = load_engine(Learn, config, args.model, tokenizer, ranks)
    engine.train()
    fields = [json.loads(line) for line in args.sequences.read_text(encoding="utf-8").splitlines()]
    sequences = [
        TrainingSequence(
            tuple(f["context"]),
            k,
            () if plain else tuple(f["target"]),
            tuple(f["target_inputs"]) if f.get("target_inputs") and not plain else None,
        )
        for f in fields
    ]
    seconds, tokens, losses = [], [], []
    for step in range(args.steps):
        batch = sequences[step * args.batch : (step + 1) * args.batch]
        began = time.perf_counter()
        values = accumulate_step(engine, batch, config.learn, tokenizer.sink_id, ranks)
        engine.step(2e-4)
        seconds.append(time.perf_counter() - began)
        tokens.append(int(values["num_tokens"]))
        losses.append(values["loss"])
    result = {
        "rank": ranks.rank,
        "step_seconds": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "real_tokens_per_step": tokens,
        "losses": losses,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    engine.close()
    group.stop()


if __name__ == "__main__":
    main()
