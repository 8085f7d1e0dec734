"""A copy of a base model's folder with more rows in its vocabulary tables, and everything else unchanged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from lbr_dist.errors import ModelError
from lbr_dist.model.backbone import WEIGHTS_INDEX, WeightFiles, read_json

_STALE = re.compile(
    r"(vocab\.(json|txt)|merges\.txt|added_tokens\.json|manifest\.json|lbr\.json|.*\.model"
    r"|.*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)(\.index\.json)?)$"
)
"""Files that describe the old vocabulary or hold the old weights."""


def vocabulary_tables(base: Path) -> list[str]:
    """Names, in the weight files, of all tensors that have a row for each token.

    Raises:
        ModelError: not a causal LM, or it has vocabulary tables other than input embeddings and LM head.
    """
    files = WeightFiles(base)
    read_json(base / "config.json")
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(f"{base}: not a causal LM that transformers can build ({error}).") from None
    model.tie_weights()
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not inputs and module.num_embeddings == inputs.num_embeddings
    ]
    if others or outputs is None or "vocab_size" not in config.to_dict():
        raise ModelError(
            f"{base}/config.json: found a model with {', '.join(others) or 'no vocab_size or LM head of its own'}, "
            "expected one table of input embeddings and one LM head. Use another base model."
        )
    named = list(model.named_parameters(remove_duplicate=False))
    names = [
        [name for name, other in named if other is parameter and name in files]
        for module in (inputs, outputs)
        for parameter in module.parameters()
    ]
    rows = {name: files.shape(name)[0] for found in names for name in found}
    if not all(names) or set(rows.values()) != {config.vocab_size}:
        raise ModelError(
            f"{base}: found the tables {rows} in its weights, expected input embeddings and LM head of vocab_size = "
            f"{config.vocab_size} rows. The download is incomplete, or belongs to another model."
        )
    return list(rows)


def write_grown(
    base: Path, out: Path, tables: Iterable[str], rows: int, stands_for: Mapping[int, Sequence[int]]
) -> None:
    """Write the files of `base` to `out`, except tokenizer.json and stale ones, with `tables` grown to `rows` rows.

    The row of a new id is the mean of the rows of the ids it replaces. A weight file with a table is read into memory.
    """
    files = WeightFiles(base)
    added = 0
    for file in sorted(set(files.files.values())):
        inside = [files.stored[name] for name in tables if files.files[files.stored[name]] == file]
        if not inside:
            shutil.copyfile(base / file, out / file)
            continue
        with safe_open(base / file, framework="pt") as tensors:
            metadata = tensors.metadata()
            weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        for name in inside:
            table = weights[name]
            weights[name] = _grown(table, rows, stands_for)
            added += weights[name].nbytes - table.nbytes
        save_file(weights, out / file, metadata)
    if (base / WEIGHTS_INDEX).exists():
        index = read_json(base / WEIGHTS_INDEX)
        size = index.get("metadata", {}).get("total_size", 0)
        write_json(out / WEIGHTS_INDEX, index | {"metadata": {"total_size": size + added}})
    write_json(out / "config.json", read_json(base / "config.json") | {"vocab_size": rows})
    for each in sorted(base.iterdir()):
        made = (WEIGHTS_INDEX, "config.json", "tokenizer.json")
        if each.is_file() and each.name not in made and not _STALE.match(each.name):
            shutil.copyfile(each, out / each.name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _grown(table: Tensor, rows: int, stands_for: Mapping[int, Sequence[int]]) -> Tensor:
    grown = torch.cat([table, table.new_zeros(rows - len(table), *table.shape[1:])])
    for i, old in stands_for.items():
        grown[i] = table[list(old)].double().mean(0).to(table.dtype)
    return grown
