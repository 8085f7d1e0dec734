"""What `lbr_dist.learn` is compared with: stage 1 with `transformers.Trainer`, under the same DeepSpeed config.

    LD_PRELOAD=libtcmalloc_minimal.so.4 OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc-per-node 2 \
        benchmarks/peers/trainer.py --model BASE --sequences SEQUENCES.jsonl --deepspeed CONFIG.json --steps 5

Start it once per rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set. SEQUENCES.jsonl has one
object per line, the fields of `lbr_dist.data.packing.TrainingSequence`: lists of token ids named `context`, `target`
and, if it differs, `target_inputs`. With `--sampling sequential`, step t uses the t-th `ranks x batch x accumulation`
lines.

Two forms:

- `mask`: `[sink x b y]`, one sequence per row, padded to the longest of the batch; positions, labels and the dense 4D
  mask under which `y` doesn't see `x` come from a data collator. The loss is the model's own: one mean over all scored
  tokens of the global batch, where `lbr_dist.learn` adds two means.
- `plain`: only `[sink x]`, padded by `DataCollatorForLanguageModeling`; no bottleneck and no target.

The last line that each rank prints is a JSON object: `rank`, `step_seconds`, `peak_rss_bytes`, and, over all ranks,
`real_tokens_per_step` and `padded_tokens_per_step` (input tokens without and with padding), `losses` and `grad_norms`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

# DeepSpeed and accelerate probe for accelerators unless this is set
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

Item = dict[str, Any]
NO_LABEL = -100


class Sequences(torch.utils.data.Dataset[Item]):
    """The lines of a JSONL file; samplers by length look at `input_ids`, the usual name."""

    def __init__(self, path: Path, form: str, sink_id: int, bottleneck_ids: list[int]) -> None:
        self.items: list[Item] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            context, target = fields["context"], fields["target"]
            if form == "plain":
                self.items.append({"input_ids": [sink_id, *context]})
                continue
            inputs = fields.get("target_inputs") or target
            # the last token of y is only a label; x_i is predicted from i = 2 on, y_1 at the last bottleneck token
            self.items.append(
                {
                    "input_ids": [sink_id, *context, *bottleneck_ids, *inputs[:-1]],
                    "shift_labels": [NO_LABEL, *context[1:]] + [NO_LABEL] * len(bottleneck_ids) + target,
                    "context": len(context),
                    "visible": 1 + len(context) + len(bottleneck_ids),
                }
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


class BottleneckCollator:
    """Pads sequences on the right and writes the mask that keeps the target from seeing the text."""

    def __init__(self, pad_id: int, mask_dtype: torch.dtype) -> None:
        self.pad_id = pad_id
        self.mask_dtype = mask_dtype

    def __call__(self, items: list[Item]) -> dict[str, Tensor]:
        """Inputs of the model: ``[batch, tokens]``, and ``attention_mask [batch, 1, tokens, tokens]``."""
        width = max(len(item["input_ids"]) for item in items)
        shape = (len(items), width)
        input_ids, labels = torch.full(shape, self.pad_id), torch.full(shape, NO_LABEL)
        seen = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(items), 1, 1, 1)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            input_ids[row, :length] = torch.tensor(item["input_ids"])
            labels[row, :length] = torch.tensor(item["shift_labels"])
            seen[row, 0, item["visible"] : length, 1 : 1 + item["context"]] = False
        mask = seen
        if self.mask_dtype is not torch.bool:
            lowest = torch.finfo(self.mask_dtype).min
            mask = torch.zeros(seen.shape, dtype=self.mask_dtype).masked_fill_(~seen, lowest)
        return {
            "input_ids": input_ids,
            "position_ids": torch.arange(width).expand(shape).contiguous(),
            "attention_mask": mask,
            "labels": labels,  # asks the model for its loss, which reads `shift_labels`
            "shift_labels": labels,
        }


class Recorder(TrainerCallback):
    """The seconds of each optimizer step, from the end of the previous one, and the gradient's norm."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.grad_norms: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.grad_norms.append(float(logs["grad_norm"]))


class CountingTrainer(Trainer):
    """Trainer, with the tokens and losses of each optimizer step summed on this rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[list[float]] = []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        real, padded = inputs.pop("num_tokens"), inputs["input_ids"].numel()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if len(self.steps) == self.state.global_step:
            self.steps.append([0.0, 0.0, 0.0])
        self.steps[-1] = [a + b for a, b in zip(self.steps[-1], (real, padded, float(loss)), strict=True)]
        return loss


def counting(collate: Any) -> Any:
    """The collator, with the number of tokens without padding added to its tensors."""

    def count(items: list[Item]) -> dict[str, Any]:
        tokens = sum(len(item["input_ids"]) for item in items)
        return {**collate(items), "num_tokens": tokens}

    return count


def load(base: Path, k: int, attention: str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase, list[int]]:
    """Model and tokenizer with `k` tokens added, and their ids. If `TrainingArguments` exist, sharded while loading."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=attention)
    names = [f"<|bottleneck_{j}|>" for j in range(1, k + 1)]
    if names:
        tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
        model.resize_token_embeddings(len(tokenizer))
    model.config.use_cache = False
    return model, tokenizer, [int(i) for i in tokenizer.convert_tokens_to_ids(names)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--sequences", type=Path, required=True, help="JSONL of prepared sequences")
    parser.add_argument("--deepspeed", type=Path, required=True, help="DeepSpeed's JSON config")
    parser.add_argument("--form", choices=("mask", "plain"), default="mask")
    parser.add_argument("--bottleneck", type=int, default=8, help="k, the number of bottleneck tokens")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a rank's micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--sampling", choices=("sequential", "random", "group_by_length"), default="sequential")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--mask", choices=("additive", "bool"), default="additive", help="kind of the 4D mask")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """The settings of the run; fields of the DeepSpeed config that Trainer wants to fill in are set to `auto`."""
    config = json.loads(args.deepspeed.read_text(encoding="utf-8"))
    config |= {
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        deepspeed=config,
        use_cpu=True,  # without it Trainer refuses bf16 without a GPU
        bf16=args.dtype == "bfloat16",
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.steps,
        optim="adamw_torch_fused",
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        adam_beta2=0.98,
        weight_decay=0.01,
        max_grad_norm=1.0,
        train_sampling_strategy=args.sampling,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )


def main() -> None:
    args = parse()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed's shared-memory helper is only for inference, and would be compiled at the first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # first, since the model is sharded while loading only if these exist
    arguments = training_arguments(args)
    k = args.bottleneck if args.form == "mask" else 0
    transformers.set_seed(args.seed)  # for the new tokens' embeddings
    dtype = getattr(torch, args.dtype)
    model, tokenizer, bottleneck_ids = load(args.model, k, args.attention, dtype)
    first = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    sink_id = next(i for i in first if i is not None)
    data = Sequences(args.sequences, args.form, sink_id, bottleneck_ids)
    collate: Any = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if args.form == "mask":
        collate = BottleneckCollator(tokenizer.pad_token_id, torch.bool if args.mask == "bool" else dtype)
    recorder = Recorder()
    trainer = CountingTrainer(
        model=model, args=arguments, train_dataset=data, data_collator=counting(collate), callbacks=[recorder]
    )
    trainer.train()
    sums = torch.tensor(trainer.steps, dtype=torch.float64)
    dist.all_reduce(sums)
    real, padded, losses = sums.T.tolist()
    result = {
        "rank": dist.get_rank(),
        "step_seconds": recorder.seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "real_tokens_per_step": [int(tokens) for tokens in real],
        "padded_tokens_per_step": [int(tokens) for tokens in padded],
        "losses": [loss / dist.get_world_size() for loss in losses],
        "grad_norms": recorder.grad_norms,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
