"""A step of stage 1 on two real ZeRO-3 ranks: ours and `transformers.Trainer`, same sequences, order and config.

    python benchmarks/stage1.py

SmolLM2-135M in bfloat16 on the medical corpus (`make demo` builds both), one thread per rank. Two comparisons: `mask`
is stage 1 itself, which Trainer runs with a padded batch and the dense 4D mask of a data collator; `plain` is ordinary
causal LM training on the texts alone, padded by `DataCollatorForLanguageModeling`. A step has the same sequences in
both; the amount run at a time is `--row-tokens` for us and `--micro-batch` for Trainer, where larger ones are faster
and take more memory. Trainer runs with its default order and with its batches grouped by length. The systems take
turns; the figure is the median over all steps but the first of every turn. The target for `mask`: 2 times the real
tokens per second, at most 0.6 of the peak memory of a rank.
Appends to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import record, run_ranks

from lbr_dist.config import EngineConfig, LearnConfig
from lbr_dist.data.targets import LearnData
from lbr_dist.data.token_cache.build import build
from lbr_dist.data.token_cache.cache import Pieces
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.engine import deepspeed_config

PEERS = Path(__file__).parent / "peers"
RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/base/smollm2-135m"))
    parser.add_argument("--corpus", type=Path, default=Path("runs/data/medical/corpus.jsonl"))
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--row-tokens", type=int, default=1024, help="ours: tokens that a rank runs at a time")
    parser.add_argument("--micro-batch", type=int, default=8, help="Trainer's per-device batch")
    parser.add_argument("--forms", nargs="+", default=["mask", "plain"], choices=("mask", "plain"))
    parser.add_argument("--steps", type=int, default=3, help="steps per turn; the first is not counted")
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lbr-bench-") as name:
        folder = Path(name)
        tokenizer = TextTokenizer(args.base)
        texts = Pieces(build(args.corpus, args.base, folder / "cache", 1, lambda message: None), 512)
        learn = LearnConfig(batch_texts=args.batch, max_text_tokens=512)
        data = LearnData(texts, [], tokenizer.drop_id)
        sequences = [s for step in range(args.steps) for s in data.batch(learn, 8, step, seed=0)]
        (folder / "sequences.jsonl").write_text("".join(json.dumps(asdict(s)) + "\n" for s in sequences))
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed_config(EngineConfig(), "bfloat16", 1.0)))
        shared = ["--model", str(args.base), "--sequences", str(folder / "sequences.jsonl")]
        shared += ["--steps", str(args.steps)]
        accumulation = args.batch // (RANKS * args.micro_batch)
        peer = ["trainer.py", *shared, "--batch", str(args.micro_batch), "--accumulation", str(accumulation)]
        peer += ["--deepspeed", str(folder / "deepspeed.json")]
        systems = {
            "ours": ["ours.py", *shared, "--batch", str(args.batch), "--row-tokens", str(args.row_tokens)],
            "Trainer": [*peer, "--sampling", "sequential"],
            "Trainer, by length": [*peer, "--sampling", "group_by_length"],
        }
        for form in args.forms:
            rates: dict[str, list[float]] = {system: [] for system in systems}
            memory = dict.fromkeys(systems, 0)
            for _ in range(args.turns):
                for system, (script, *arguments) in systems.items():
                    first, *_ = lines = run_ranks(PEERS / script, *arguments, "--form", form, ranks=RANKS)
                    slowest = [max(line["step_seconds"][i] for line in lines) for i in range(args.steps)]
                    steps = list(zip(first["real_tokens_per_step"], slowest, strict=True))[1:]
                    rates[system] += [tokens / seconds for tokens, seconds in steps]
                    memory[system] = max(memory[system], *(line["peak_rss_bytes"] for line in lines))
                    rate, gib = statistics.median(rates[system]), memory[system] / 2**30
                    print(f"{form:<7}{system:<20}{rate:>7.0f} real tokens/s {gib:>7.2f} GiB per rank", flush=True)
            medians = {system: statistics.median(values) for system, values in rates.items()}
            row: dict[str, Any] = {"form": form, "ranks": RANKS, "sequences": args.batch, "row_tokens": args.row_tokens}
            row["trainer_micro_batch"] = args.micro_batch
            for system in systems:
                speed, share = medians["ours"] / medians[system], memory["ours"] / memory[system]
                row[system] = {
                    "real_tokens_per_second": round(medians[system], 1),
                    "peak_rss_gib": round(memory[system] / 2**30, 3),
                }
                if system != "ours":
                    row[system] |= {"ours_speed_ratio": round(speed, 3), "ours_memory_ratio": round(share, 3)}
                    print(f"{form}: {speed:.2f} times the tokens/s of {system}, {share:.2f} of its memory", flush=True)
            record("stage1", row)


if __name__ == "__main__":
    main()
