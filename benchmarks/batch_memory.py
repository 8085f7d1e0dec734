"""Memory of a step of stage 2 by batch size: it grows only as fast as the representations and the token ids.

    python benchmarks/batch_memory.py

A model of two layers, d = 128, on texts of 6 to 10 random tokens and 2 bottleneck tokens, one graph kept, chunks of
4,096 tokens. Each size runs in its own process: after a small step, which allocates what a chunk needs, it measures the
peak of one step above the memory in use before the batch is built. This is compared with a count of what must be in
memory on one rank for each pair of the global batch: float32 representations of the rank's own texts and of all
documents, a gradient for each, and the batch's token ids as tuples. The slope of a line through the measured peaks is
the cost of a pair. A float32 similarity matrix would take 16 GiB at 65,536 pairs. Appends to benchmarks/results/ and
draws batch_memory.png there.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import HERE, RESULTS, print_result, record, run_ranks, status_bytes

if TYPE_CHECKING:
    from lbr_dist.data.pairs import PairBatch

D, BOTTLENECK, CHUNK_TOKENS, SHORTEST, LONGEST, WARM_UP = 128, 2, 4096, 6, 10, 1024
MIB = 2**20


def write_model(folder: Path) -> None:
    """A causal LM of two layers with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(HERE.parent))
    from tests.tiny import write_tokenizer

    folder.mkdir()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=write_tokenizer(folder),
        hidden_size=D,
        intermediate_size=2 * D,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=D // 4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def random_batch(pairs: int, vocabulary: int, seed: int) -> PairBatch:
    from lbr_dist.data.pairs import PairBatch

    rng = random.Random(seed)
    ids = list(range(vocabulary))  # one object for each id, as in any tokenizer's table

    def texts() -> list[tuple[int, ...]]:
        return [tuple(rng.choices(ids, k=rng.randint(SHORTEST, LONGEST))) for _ in range(pairs)]

    names = [str(i) for i in range(pairs)]
    return PairBatch(texts(), texts(), [(column,) for column in range(pairs)], names, names)


def counted_bytes(batch: PairBatch, world_size: int) -> tuple[float, float]:
    """What a pair must at least take on one rank: bytes of representations, and of token ids."""
    listed = sum(sys.getsizeof(text) for text in batch.texts) / len(batch.queries)
    own, all_documents = 2 / world_size, 1
    return 2 * 4 * D * (own + all_documents), listed  # representations with their gradients


def measure_step(model: Path, pairs: int) -> None:
    """In this process: a small step, then the peak of a step of this size above the memory in use before it."""
    from lbr_dist.config import DataConfig, LearnConfig, ModelConfig, RepresentConfig, RunConfig
    from lbr_dist.data.tokenizer import TextTokenizer
    from lbr_dist.ranks import group
    from lbr_dist.ranks.process import quiet_libraries
    from lbr_dist.represent import ContrastiveStep, Represent
    from lbr_dist.trainer import load_engine

    ranks = group.start()
    quiet_libraries()
    config = RunConfig(
        run_dir="unused",
        domain="unused",
        model=ModelConfig(base=str(model), bottleneck_tokens=BOTTLENECK, dtype="bfloat16"),
        data=DataConfig("unused", "unused", max_query_tokens=LONGEST, max_document_tokens=LONGEST),
        learn=LearnConfig(steps=0),
        represent=RepresentConfig(batch_pairs=pairs, chunk_tokens=CHUNK_TOKENS, keep_graphs=1),
    )
    tokenizer = TextTokenizer(model)
    engine, _ = load_engine(Represent, config, model, tokenizer, ranks)
    engine.train()
    step = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    step.accumulate([random_batch(WARM_UP, len(tokenizer.hf), seed=1)], "0/0")
    engine.step(1e-4)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use now
    before, began = status_bytes("VmRSS"), time.perf_counter()
    batch = random_batch(pairs, len(tokenizer.hf), seed=2)
    values = step.accumulate([batch], "0/1")
    engine.step(1e-4)
    seconds = time.perf_counter() - began
    above = status_bytes("VmHWM") - before
    representations, ids = counted_bytes(batch, ranks.world_size)
    print_result(
        ranks.rank,
        pairs=pairs,
        bytes_above=above,
        held_before=before,
        representation_bytes=representations,
        token_bytes=ids,
        seconds=seconds,
        chunks=int(values["chunks"]),
    )
    engine.close()
    group.stop()


def draw(points: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Peak memory of a step over the pairs of its batch, one line for each number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    sizes = [point["pairs"] for point in next(iter(points.values()))]
    dense = [size * size * 4 / MIB for size in sizes]
    axes.plot(sizes, dense, "--", color="0.55", label="the float32 similarity matrix alone (never built)")
    for colour, (ranks, measured) in zip(("C0", "C1", "C2", "C3"), points.items(), strict=False):
        plural = "rank" if ranks == 1 else "ranks"
        peaks = [point["bytes_above"] / MIB for point in measured]
        counted = [(p["representation_bytes"] + p["token_bytes"]) * p["pairs"] / MIB for p in measured]
        axes.plot(sizes, peaks, "o-", color=colour, label=f"measured, {ranks} {plural}")
        label = f"representations, gradients and token ids, {ranks} {plural}"
        axes.plot(sizes, counted, ":", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("pairs in the global batch")
    axes.set_ylabel("peak memory of a step, MiB per rank above its start")
    axes.set_title(f"A step of stage 2: chunks of {CHUNK_TOKENS:,} tokens, d = {D}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def fitted(points: list[dict[str, Any]]) -> float:
    """Bytes per pair: the slope of the least-squares line through the measured peaks."""
    x, y = [p["pairs"] for p in points], [p["bytes_above"] for p in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1024 * 2**i for i in range(7)])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # passed to each rank
    args = parser.parse_args()
    if args.model:
        measure_step(args.model, args.pairs[0])
        return
    points: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="lbr-bench-") as name:
        model = Path(name) / "model"
        write_model(model)
        for ranks in args.ranks:
            points[ranks] = []
            for pairs in args.pairs:
                lines = run_ranks(Path(__file__), "--model", str(model), "--pairs", str(pairs), ranks=ranks)
                worst = max(lines, key=lambda line: line["bytes_above"])
                points[ranks].append(worst)
                counted = (worst["representation_bytes"] + worst["token_bytes"]) * pairs
                print(
                    f"{ranks} rank(s) {pairs:>7,} pairs {worst['bytes_above'] / MIB:>9.1f} MiB above "
                    f"{worst['held_before'] / MIB:.0f}, counted {counted / MIB:>7.1f}, {worst['chunks']:>4} chunks, "
                    f"{worst['seconds']:.1f} s",
                    flush=True,
                )
    for ranks, measured in points.items():
        row: dict[str, Any] = {"ranks": ranks, "d": D, "chunk_tokens": CHUNK_TOKENS, "kept_graphs": 1}
        row["mib_above"] = {p["pairs"]: round(p["bytes_above"] / MIB, 1) for p in measured}
        if len(measured) > 1:
            slope, last = fitted(measured), measured[-1]
            counted = last["representation_bytes"] + last["token_bytes"]
            print(
                f"{ranks} rank(s): {slope:,.0f} bytes per pair, {slope / counted:.2f} of the {counted:,.0f} counted "
                f"({last['representation_bytes']:,.0f} of representations, {last['token_bytes']:,.0f} of token ids)"
            )
            row |= {"bytes_a_pair": round(slope), "representation_bytes": last["representation_bytes"]}
            row |= {"token_bytes": round(last["token_bytes"]), "of_counted": round(slope / counted, 3)}
        record("batch_memory", row)
    draw(points, RESULTS / "batch_memory.png")


if __name__ == "__main__":
    main()
