"""What `lbr_dist.represent` is compared with: a contrastive step with a gradient cache in other libraries, under DDP.

`benchmarks/stage2.py` starts it once per rank. `--model` is a folder that we exported, so its tokenizer appends the
bottleneck, and the pooling is that of the last token. `--pairs` is JSONL of prepared pairs, objects with all token ids
of `query` and `document`. Step t uses the t-th `--batch` lines; each rank takes its part of them, in their order.

- `sentence-transformers`: `CachedMultipleNegativesRankingLoss` with `gather_across_devices`, in a plain loop (with less
  around a step than their Trainer, which puts DDP into the loss in the same way). Its mini-batches follow the order of
  the batch and drop the padding that all their texts share; it does not sort by length.
- `gradcache`: luyug's `GradCache` with its `DistributedContrastiveLoss`, for queries and documents of one encoder;
  gradients are reduced only for the last chunk of each (`no_sync_except_last`). The package's modules import each other
  under a different name than the package has. The loss has no temperature, so the queries are scaled before it. DDP's
  mean over the ranks would leave 1/ranks of the true gradient, so the loss is multiplied by the number of ranks. Chunks
  drop the padding that all their texts share, with a `split_input_fn` of ours.

Weights, gradients and AdamW's states have `--dtype`, whole on every rank; attention is SDPA. Prints a line with
`print_result`: `step_seconds`, `step_cpu_seconds` (of this process), `losses`, `grad_norms`, `real_tokens_per_step`,
`peak_rss_bytes`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from measure import print_result, status_bytes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Features = dict[str, Tensor]
Step = Callable[[Features, Features], float]
"""Leaves the gradient of the global batch in the parameters; returns this rank's part of the loss."""


def padded(texts: list[list[int]], pad_id: int) -> Features:
    """``[texts, longest]``, padded on the right."""
    shape = (len(texts), max(map(len, texts)))
    ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def parallel(model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def sentence_transformers_step(
    folder: Path, dtype: torch.dtype, mini_batch: int, scale: float
) -> tuple[nn.Module, Step]:
    from sentence_transformers import SentenceTransformer, losses
    from sentence_transformers.util import cos_sim

    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs=options, local_files_only=True)
    model[0].auto_model.config.use_cache = False
    loss = losses.CachedMultipleNegativesRankingLoss(
        model,
        scale=scale,
        similarity_fct=lambda a, b: cos_sim(a.float(), b.float()),
        mini_batch_size=mini_batch,
        gather_across_devices=True,
    )
    loss.model = loss.loss.model = parallel(model)  # as their Trainer does it

    def step(queries: Features, documents: Features) -> float:
        value = loss([queries, documents], torch.empty(0))
        value.backward()
        return float(value.detach()) / dist.get_world_size()

    return model, step


class Encoder(nn.Module):
    """Unit-norm last-token embeddings, float32."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = transformers.AutoModel.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]
        return nn.functional.normalize(last.float(), dim=1)


def trimmed_chunks(features: Features, size: int) -> list[Features]:
    chunks = []
    for start in range(0, len(features["input_ids"]), size):
        rows = {name: values[start : start + size] for name, values in features.items()}
        longest = int(rows["attention_mask"].sum(1).max())
        chunks.append({name: values[:, :longest] for name, values in rows.items()})
    return chunks


def gradcache_step(folder: Path, dtype: torch.dtype, mini_batch: int, scale: float) -> tuple[nn.Module, Step]:
    import gradcache

    sys.modules["grad_cache"] = gradcache
    from gradcache.grad_cache import GradCache
    from gradcache.loss import DistributedContrastiveLoss

    world_size = dist.get_world_size()
    model = Encoder(folder, dtype)
    encoder = parallel(model)
    contrastive = DistributedContrastiveLoss()
    cache = GradCache(
        models=[encoder, encoder],
        chunk_sizes=mini_batch,
        loss_fn=lambda queries, documents: contrastive(scale * queries, documents) * world_size,
        split_input_fn=trimmed_chunks,
    )

    def step(queries: Features, documents: Features) -> float:
        # every rank has the loss of the whole batch
        return float(cache(queries, documents, no_sync_except_last=True)) / world_size**2

    return model, step


SYSTEMS = {"sentence-transformers": sentence_transformers_step, "gradcache": gradcache_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True, help="pairs per step, over all ranks")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--mini-batch", type=int, required=True, help="texts that a rank runs at a time")
    parser.add_argument("--scale", type=float, required=True, help="1 / temperature")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, step = SYSTEMS[args.system](args.model, getattr(torch, args.dtype), args.mini_batch, args.scale)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    pad_id = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True).pad_token_id
    pairs: list[dict[str, Any]] = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    seconds, cpu_seconds, tokens, losses, norms = [], [], [], [], []
    for number in range(args.steps):
        batch = pairs[number * args.batch : (number + 1) * args.batch]
        mine = args.batch // world_size
        part = batch[rank * mine : (rank + 1) * mine]
        dist.barrier()
        began, cpu_began = time.perf_counter(), time.process_time()
        queries, documents = (padded([pair[side] for pair in part], pad_id) for side in ("query", "document"))
        loss = step(queries, documents)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # DDP's buckets are the gradients
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        tokens.append(sum(len(pair["query"]) + len(pair["document"]) for pair in batch))
        whole = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(whole)
        losses.append(float(whole))
        norms.append(float(norm))
    print_result(
        rank,
        step_seconds=seconds,
        step_cpu_seconds=cpu_seconds,
        losses=losses,
        grad_norms=norms,
        real_tokens_per_step=tokens,
        peak_rss_bytes=status_bytes("VmHWM"),
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
