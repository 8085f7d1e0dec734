"""A step of stage 2 at a large global batch, on two real ranks: ours and two other libraries that cache gradients.

    python -m pip install --no-deps gradcache==0.0.1     # for this benchmark only; without it, name --systems
    python benchmarks/stage2.py

SmolLM2-135M with 8 bottleneck tokens, exported once, and medical pairs (`make data` builds both): the same texts in the
same order, the same tokens (queries cut to 24, documents to 48), no document twice in a batch, cosine similarity at
scale 20, negatives of both ranks. One thread per rank, gloo, bfloat16 weights, a step of AdamW with clipping. Ours runs
under ZeRO-3 with sharded float32 master weights, the others under DDP with whole bfloat16 states. `benchmarks/peers/`
has each system and how it is set up. Before anything is timed, each does a step in float32 on `--check-pairs` pairs:
their losses must be the same to 1e-4, their gradient norms to a thousandth.

Two comparisons. At `--pairs` pairs: ours as it plans the step, ours with a single graph kept (what a batch of any size
needs), sentence-transformers and GradCache, each at all given `--mini-batches`; the best counts. At `--one-pass-pairs`
pairs, which fit into memory: ours in one pass with every graph kept, as planned, and with a single graph kept.

The systems take turns; the figure is the median over all steps but the first of every turn, and a step takes as long as
on its slower rank. The first step allocates the memory that later steps reuse; its loss and gradient norm are shown.
`cpu s` is the processor time of a step, which a busy machine changes less. Targets: at most 0.75 of either library's
time; as planned at most 1.05, with a single graph at most 1.35 of the time of one pass. Appends to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import record, run_ranks

PEERS = Path(__file__).parent / "peers"
RANKS, BOTTLENECK, QUERY_TOKENS, DOCUMENT_TOKENS, SCALE, LR = 2, 8, 24, 48, 20.0, 1e-4
EVERY_GRAPH = 10**6
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3
"""In float32: the difference of two losses, and the relative difference of two gradient norms."""


@dataclass
class System:
    """One way to do a step, and the measurements of its turns."""

    script: str
    arguments: list[str]
    pairs: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    loss: float = math.nan
    grad_norm: float = math.nan
    peak_rss: int = 0
    chunks: str = ""

    def start(self, shared: list[str], pairs: int, steps: int, dtype: str) -> list[dict[str, Any]]:
        """Run a process for each rank; returns their measurements."""
        arguments = [*self.arguments, *shared, "--batch", str(pairs), "--steps", str(steps), "--dtype", dtype]
        return run_ranks(PEERS / self.script, *arguments, ranks=RANKS)

    def take_turn(self, shared: list[str], steps: int) -> None:
        first, *_ = lines = self.start(shared, self.pairs, steps, "bfloat16")
        for name, figures in (("step_seconds", self.seconds), ("step_cpu_seconds", self.cpu_seconds)):
            figures += [max(line[name][i] for line in lines) for i in range(1, steps)]
        self.tokens = first["real_tokens_per_step"][-1]
        self.loss, self.grad_norm = first["losses"][0], first["grad_norms"][0]
        self.peak_rss = max(self.peak_rss, *(line["peak_rss_bytes"] for line in lines))
        if "chunks" in first:
            self.chunks = f"{first['kept_graphs']} of {first['chunks']}"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"pairs": self.pairs, "seconds": round(self.median, 3), "steps": len(self.seconds)}
        figures |= {"cpu_seconds": round(statistics.median(self.cpu_seconds), 3)}
        figures |= {"real_tokens": self.tokens, "peak_rss_gib": round(self.peak_rss / 2**30, 3)}
        figures |= {"loss": round(self.loss, 5), "grad_norm": round(self.grad_norm, 4)}
        return figures | ({"kept_graphs": self.chunks} if self.chunks else {})


def prepare(base: Path, data: Path, count: int, folder: Path) -> None:
    """Write the model that all systems start from, `model/`, and `pairs.jsonl`, in which no text occurs twice."""
    from lbr_dist.config import DataConfig, ModelConfig, RunConfig
    from lbr_dist.data.records import read_corpus, read_pairs
    from lbr_dist.data.tokenizer import EmbeddingSettings, TextTokenizer
    from lbr_dist.export.folder import export
    from lbr_dist.model.bottleneck import load_model
    from lbr_dist.ranks import group
    from lbr_dist.ranks.process import quiet_libraries

    ranks = group.start()
    quiet_libraries()
    corpus, train = str(data / "corpus.jsonl"), str(data / "train.jsonl")
    config = RunConfig(
        run_dir="unused",
        domain="medical",
        model=ModelConfig(base=str(base), bottleneck_tokens=BOTTLENECK, dtype="bfloat16"),
        data=DataConfig(corpus, train, max_query_tokens=QUERY_TOKENS, max_document_tokens=DOCUMENT_TOKENS),
    )
    model = load_model(config.model, base, TextTokenizer(base), seed=0)
    settings = EmbeddingSettings.of(config.data, "bottleneck_last")
    export(model, TextTokenizer(base), settings, config, folder / "model", ranks)
    group.stop()
    tokenizer = TextTokenizer(folder / "model").hf
    found = read_pairs(train, read_corpus(corpus))
    pairs = random.Random(0).sample(found.pairs, len(found.pairs))
    texts = {
        "query": ([pair.query for pair in pairs], QUERY_TOKENS),
        "document": ([found.documents[pair.positives[0]] for pair in pairs], DOCUMENT_TOKENS),
    }
    ids = {
        side: tokenizer(values, truncation=True, max_length=1 + most + BOTTLENECK)["input_ids"]
        for side, (values, most) in texts.items()
    }
    used: set[tuple[int, ...]] = set()
    chosen: list[dict[str, list[int]]] = []
    for query, document in zip(ids["query"], ids["document"], strict=True):
        if tuple(query) not in used and tuple(document) not in used and len(chosen) < count:
            used |= {tuple(query), tuple(document)}
            chosen.append({"query": query, "document": document})
    if len(chosen) < count:
        raise SystemExit(f"{train}: {len(chosen)} pairs have a document of their own, {count} are needed")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in chosen), encoding="utf-8")


def make_systems(args: argparse.Namespace) -> dict[str, System]:
    chunk = ["--chunk-tokens", str(args.chunk_tokens)] if args.chunk_tokens else []

    def ours(pairs: int, kept: int | str) -> System:
        return System("ours_contrastive.py", [*chunk, "--keep-graphs", str(kept)], pairs)

    small = args.one_pass_pairs
    systems: dict[str, System] = {}
    for name in args.systems:
        if name == "ours":
            systems |= {"ours": ours(args.pairs, "auto")}
        elif name == "ours-1":
            systems |= {"ours, 1 graph kept": ours(args.pairs, 1)}
        elif name == "one-pass":
            systems |= {"one pass": ours(small, EVERY_GRAPH)}
            systems |= {"planned": ours(small, "auto"), "1 graph kept": ours(small, 1)}
        else:
            for size in args.mini_batches:
                arguments = [name, "--mini-batch", str(size)]
                systems[f"{name}, mini-batch {size}"] = System("contrastive.py", arguments, args.pairs)
    return systems


def check_same(systems: dict[str, System], shared: list[str], pairs: int) -> dict[str, list[float]]:
    """Loss and gradient norm of each system in float32; raises SystemExit if they differ."""
    found: dict[str, list[float]] = {}
    for name, system in systems.items():
        line = system.start(shared, pairs, 1, "float32")[0]
        found[name] = [line["losses"][0], line["grad_norms"][0]]
    (first, (loss, norm)), *others = found.items()
    print(f"in float32, {pairs} pairs: loss {loss:.6f}, gradient norm {norm:.5f} ({first})")
    for name, (other_loss, other_norm) in others:
        same = abs(loss - other_loss) <= LOSS_TOLERANCE and abs(other_norm / norm - 1) <= NORM_TOLERANCE
        print(f"    {name}: {other_loss - loss:+.1e}, {other_norm / norm - 1:+.1e} of the norm", flush=True)
        if not same:
            raise SystemExit(f"{first} and {name} don't compute the same")
    return found


def compare(systems: dict[str, System]) -> dict[str, float]:
    """Print the ratios of medians with their targets, and return the ratios."""
    best: dict[str, System] = {}
    for name, system in systems.items():
        kind = name.split(",")[0] if "mini-batch" in name else name
        if kind not in best or system.median < best[kind].median:
            best[kind] = system
    wanted = [
        (ours, peer, 0.75) for peer in ("sentence-transformers", "gradcache") for ours in ("ours", "ours, 1 graph kept")
    ]
    wanted += [("planned", "one pass", 1.05), ("1 graph kept", "one pass", 1.35)]
    ratios = {}
    for one, other, target in wanted:
        if one in best and other in best:
            ratio = best[one].median / best[other].median
            memory = best[one].peak_rss / best[other].peak_rss
            ratios[f"{one} / {other}"] = round(ratio, 3)
            verdict = "met" if ratio <= target else "missed"
            print(f"{one} / {other}: {ratio:.3f} of the time (target {target}: {verdict}), {memory:.2f} of the memory")
    return ratios


def main() -> None:
    names = ("ours", "ours-1", "sentence-transformers", "gradcache", "one-pass")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/base/smollm2-135m"))
    parser.add_argument("--data", type=Path, default=Path("runs/data/medical"), help="corpus.jsonl and train.jsonl")
    parser.add_argument("--systems", nargs="+", default=list(names), choices=names)
    parser.add_argument("--pairs", type=int, default=512, help="global batch of the libraries and ours")
    parser.add_argument("--one-pass-pairs", type=int, default=256, help="global batch that fits in memory in one pass")
    parser.add_argument("--check-pairs", type=int, default=16, help="global batch of the check; 0 skips it")
    parser.add_argument("--mini-batches", type=int, nargs="+", default=[32], help="of the libraries, texts per rank")
    parser.add_argument("--chunk-tokens", type=int, default=None, help="of ours; planned by default")
    parser.add_argument("--steps", type=int, default=3, help="steps per turn; the first is not counted")
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    for name in ("pairs", "one_pass_pairs", "check_pairs"):
        if getattr(args, name) % RANKS:
            parser.error(f"--{name.replace('_', '-')} must be a multiple of {RANKS}")
    if args.steps < 2:
        parser.error("--steps must be 2 or more: the first is not counted")
    systems = make_systems(args)
    with tempfile.TemporaryDirectory(prefix="lbr-bench-") as name:
        folder = Path(name)
        # in its own process, so that its memory is free again for the ranks
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            count = args.steps * max(args.pairs, args.one_pass_pairs)
            pool.submit(prepare, args.base, args.data, count, folder).result()
        shared = ["--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl")]
        shared += ["--scale", str(SCALE), "--lr", str(LR)]
        checked = check_same(systems, shared, args.check_pairs) if args.check_pairs else {}
        heads = ("pairs", "median s", "cpu s", "tokens/s", "GiB / rank", "loss", "norm", "kept")
        print(f"{'system':<36}" + "".join(f"{head:>11}" for head in heads))
        for _ in range(args.turns):
            for name, system in systems.items():
                system.take_turn(shared, args.steps)
                cpu, gib = statistics.median(system.cpu_seconds), system.peak_rss / 2**30
                line = f"{name:<36}{system.pairs:>11}{system.median:>11.2f}{cpu:>11.2f}"
                line += f"{system.tokens / system.median:>11.0f}{gib:>11.2f}{system.loss:>11.4f}"
                print(f"{line}{system.grad_norm:>11.3f}{system.chunks:>11}", flush=True)
    row: dict[str, Any] = {"ranks": RANKS, "threads": 1, "dtype": "bfloat16", "chunk_tokens": args.chunk_tokens}
    row["systems"] = {name: system.row() for name, system in systems.items()}
    row["float32_loss_and_norm"] = checked
    row["ratios"] = compare(systems)
    record("stage2", row)


if __name__ == "__main__":
    main()
