"""LBR compared with its baselines: the same pairs, steps, order, backbone and seeds, through the real command.

    python benchmarks/baselines.py launch/configs/demo.yaml --systems contrastive_bottleneck lbr_mask --seeds 0

Each system is a run folder below `--out`; a finished one is not run again. Appends one line per system and seed to
`benchmarks/results/baselines.jsonl`, with hardware, versions and date, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import record

from lbr_dist.evaluation.retrieval import paired_bootstrap, per_query_values

NO_TOKENS = ("--model.bottleneck_tokens=0", "--learn.bottleneck=none")

SYSTEMS: dict[str, tuple[str, ...]] = {
    "contrastive_last": ("--learn.steps=0", *NO_TOKENS, "--represent.pooling=last"),
    "contrastive_mean": ("--learn.steps=0", *NO_TOKENS, "--represent.pooling=mean"),
    "contrastive_bottleneck": ("--learn.steps=0",),
    "pretraining_mean": (*NO_TOKENS, "--represent.pooling=mean"),
    "pretraining_bottleneck": ("--learn.bottleneck=none",),
    "lbr_mask": ("--learn.bottleneck=mask",),
    "lbr_reinject": ("--learn.bottleneck=reinject",),
}


def read_run(path: Path) -> dict[str, list[tuple[str, float]]]:
    """A TREC run file."""
    run: dict[str, list[tuple[str, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, _, document, _, score, _ = line.split()
        run.setdefault(query, []).append((document, float(score)))
    return run


def read_qrels(path: Path) -> dict[str, set[str]]:
    qrels: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, _, document, _ = line.split()
        qrels.setdefault(query, set()).add(document)
    return qrels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for system in args.systems:
            folder = args.out / f"{system}-{seed}"
            command = [sys.executable, "-m", "lbr_dist.launch.cli", "run", str(args.config), "--ranks", str(args.ranks)]
            command += [f"--run_dir={folder}", f"--seed={seed}", '--evaluate.systems=["lbr"]', *SYSTEMS[system]]
            subprocess.run(command, check=True)
            metrics = json.loads((folder / "report" / "metrics.json").read_text())
            values = per_query_values(
                read_run(folder / "report" / "lbr.run"), read_qrels(folder / "report" / "test.qrels")
            )
            figures = {
                name: metrics["systems"]["lbr"][name] for name in ("ndcg@10", "recall@10", "recall@100", "mrr@10")
            }
            row = {"system": system, "seed": seed, **figures, "seconds": metrics["seconds"]}
            rows.append(row | {"values": values["ndcg@10"]})
            record("baselines", {"config": str(args.config), **row})
    print(f"\n{'system':<26}{'seed':>5}{'nDCG@10':>10}{'recall@10':>11}   lbr_mask minus it, same seed (95 % interval)")
    for row in rows:
        ours = next((r for r in rows if r["system"] == "lbr_mask" and r["seed"] == row["seed"]), None)
        shown = ""
        if ours is not None and ours is not row:
            difference, low, high = paired_bootstrap(ours["values"], row["values"], 1000, 0)
            shown = f"   {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        print(f"{row['system']:<26}{row['seed']:>5}{row['ndcg@10']:>10.3f}{row['recall@10']:>11.3f}{shown}")


if __name__ == "__main__":
    main()
