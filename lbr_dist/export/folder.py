"""Export the trained model as an ordinary folder: Hugging Face weights, tokenizer, sentence-transformers files, card.

The weights are gathered one tensor at a time and written shard by shard as safetensors, so that no rank holds a whole
7B model in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lbr_dist import __version__
from lbr_dist.config import Pooling, RunConfig, sequence_tokens, to_dict
from lbr_dist.data.tokenizer import EmbeddingSettings, TextTokenizer, bottleneck_token
from lbr_dist.errors import CheckpointError
from lbr_dist.export.checksums import write_checksums
from lbr_dist.export.config_json import config_json
from lbr_dist.model.adapters import file_parameters, merged_weights
from lbr_dist.model.backbone import WEIGHTS, WEIGHTS_INDEX, read_json
from lbr_dist.model.bottleneck import LBRModel
from lbr_dist.model.sharding import full_shape, whole
from lbr_dist.ranks.group import Ranks, meet
from lbr_dist.storage.whole_folder import replace_folder

SHARD_BYTES = 4 * 2**30
SAVED_ALONE = {"gemma3_text": "Gemma3TextModel"}
"""Model types whose weights are named as in the backbone alone, and the backbone's class. Transformers 4 finds none of
the weights of a Gemma 3 causal LM when it opens it as an embedding model, and starts from random ones."""


def _grown(table: Tensor, ids: tuple[int, ...], rows: Tensor | None) -> Tensor:
    """A vocabulary table with a row for every id, and `rows` (or zeros) written at `ids`."""
    needed = max(len(table), *(i + 1 for i in ids))
    grown = torch.cat([table, table.new_zeros(needed - len(table), table.shape[1])])
    if rows is not None:
        grown[list(ids)] = rows.to(grown.dtype)
    return grown


def _tensors(
    model: LBRModel, ids: tuple[int, ...], dtype: torch.dtype, keep: bool
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each weight of the backbone, gathered, by its name in the files; None on the ranks that don't `keep` it."""
    backbone = model.backbone
    bottleneck = None
    if model.bottleneck is not None:
        with whole(model.bottleneck) as value:
            bottleneck = value.detach().cpu().clone()
    tables = [backbone.get_input_embeddings().weight, backbone.get_output_embeddings().weight]
    for name, parameter, tensor in merged_weights(backbone, keep):
        if model.backbone.config.model_type in SAVED_ALONE:
            name = name.removeprefix("model.")
        if tensor is not None and ids and any(parameter is table for table in tables):
            tensor = _grown(tensor, ids, bottleneck if parameter is tables[0] else None)
        yield name, None if tensor is None else tensor.to(dtype)


def _shards(parameters: list[tuple[str, nn.Parameter]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, parameter in parameters:
        more = full_shape(parameter).numel() * parameter.element_size()
        if shards[-1] and size + more > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _write_weights(model: LBRModel, ids: tuple[int, ...], dtype: torch.dtype, folder: Path, writes: bool) -> None:
    shards = _shards(file_parameters(model.backbone))
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    tensors = _tensors(model, ids, dtype, writes)
    total, found = 0, []
    for file, members in zip(names, shards, strict=True):
        part = {name: tensor for name, tensor in (next(tensors) for _ in members) if tensor is not None}
        if writes:
            try:
                save_file(part, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:  # safetensors has no separate error for a full disk
                raise CheckpointError(
                    f"{folder / file}: cannot be written ({error}). Make room and start again: no step is lost."
                ) from None
            (folder / file).chmod(0o644)
            total += sum(tensor.nbytes for tensor in part.values())
            found.append(list(part))
        part.clear()  # else it would stay in memory until the next one is gathered
    if writes and len(shards) > 1:
        weight_map = {name: file for file, written in zip(names, found, strict=True) for name in written}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def _write_sentence_transformers(
    folder: Path, settings: EmbeddingSettings, sink: tuple[int, str], vocabulary: int, dimension: int
) -> None:
    """The files from which sentence-transformers builds Transformer, Pooling and Normalize."""
    k = len(settings.bottleneck_ids)
    types, paths = ["Transformer"], [""]
    if settings.is_mean:
        # a mean over some tokens is a weighted mean over all; the weights are looked up by id
        weighed = dict(zip(settings.bottleneck_ids, (bottleneck_token(j) for j in range(1, k + 1)), strict=True))
        of_text = settings.pooling == "mean"
        if of_text:
            weighed[sink[0]] = sink[1]
        weights = {
            "vocab": [weighed.get(i, "") for i in range(vocabulary)],
            "word_weights": dict.fromkeys(weighed.values(), 0.0 if of_text else 1.0),
            "unknown_word_weight": 1.0 if of_text else 0.0,
        }
        types.append("WordWeights")
        paths.append("1_WordWeights")
        _write_json(folder / "1_WordWeights" / "config.json", weights, indent=None)
    types += ["Pooling", "Normalize"]
    paths += [f"{len(paths)}_Pooling", f"{len(paths) + 1}_Normalize"]
    # key names of older releases, which newer releases and other servers also read
    pooling = {
        "word_embedding_dimension": dimension,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": settings.is_mean,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": not settings.is_mean,
        "include_prompt": True,
    }
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / paths[-2] / "config.json", pooling)
    _write_json(folder / paths[-1] / "config.json", {})
    # sentence-transformers before version 6 refuses any other key here, so that queries cannot have their own length
    length = sequence_tokens(settings.max_tokens, k)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    prompts = {"query": settings.query_prompt, "document": settings.document_prompt}
    content = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write_json(folder / "config_sentence_transformers.json", content)


def _card(settings: EmbeddingSettings, config: RunConfig, dimension: int) -> str:
    note = (
        "\nThe pooling is a mean over "
        + ("the bottleneck tokens" if settings.pooling == "bottleneck_mean" else "the text's tokens")
        + ". sentence-transformers is told so by weights for each token; servers that read no more than the kind of "
        "the pooling (vLLM, text-embeddings-inference) would take the mean over all tokens, which is another vector.\n"
        if settings.is_mean
        else ""
    )
    front = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "learn-before-represent", config.domain],
    }
    k = len(settings.bottleneck_ids)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# An embedding model for the domain: {config.domain}

Trained with lbr-dist {__version__} from a causal LLM, following the design of *Learn Before Represent* (arXiv
2601.11124): first causal language modelling of domain text through an information bottleneck, then contrastive
training on the same compressed vectors. It implements the design, and does not reproduce the paper's configuration.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["..."])        # the query prompt is prepended
documents = model.encode_document(["..."])
scores = model.similarity(queries, documents)
```
{note}
| | |
|---|---|
| dimension | {dimension} |
| pooling | `{settings.pooling}` |
| bottleneck tokens | {k}, appended by the tokenizer |
| query prompt | `{json.dumps(settings.query_prompt)}` |
| document prompt | `{json.dumps(settings.document_prompt)}` |
| maximum text length | {settings.max_tokens} tokens, queries and documents alike |
| outer white space | stripped by the tokenizer |
| similarity | cosine |

## Training

```yaml
{yaml.safe_dump({name: to_dict(getattr(config, name)) for name in ("learn", "represent")}, sort_keys=False)}```
"""


def stage_settings(config: RunConfig, stage: str) -> EmbeddingSettings:
    """How the model turns a text into a vector after a stage, without the bottleneck's token ids."""
    between: Pooling = "bottleneck_mean" if config.model.bottleneck_tokens else "mean"
    return EmbeddingSettings.of(config.data, between if stage == "learn" else config.represent.pooling)


def export(
    model: LBRModel,
    tokenizer: TextTokenizer,
    settings: EmbeddingSettings,
    config: RunConfig,
    folder: Path,
    ranks: Ranks,
) -> None:
    """Write the model to `folder`. Every rank takes part; the first one writes.

    The folder appears complete, by a rename, and replaces an older one.
    """
    k = 0 if model.bottleneck is None else full_shape(model.bottleneck)[0]
    ids = tokenizer.with_bottleneck(k)
    settings = replace(settings, bottleneck_ids=ids)
    ranks.watchdog.beat(f"the export to {folder}")
    building = folder.with_name(f".{folder.name}.building")
    if ranks.is_first:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    meet(ranks)
    _write_weights(model, ids, getattr(torch, config.model.dtype), building, ranks.is_first)
    if ranks.is_first:
        hf_config = type(model.backbone.config).from_dict(model.backbone.config.to_dict())
        rows = full_shape(model.backbone.get_input_embeddings().weight)[0]
        hf_config.vocab_size = max(rows, *(i + 1 for i in ids)) if ids else rows
        hf_config.use_cache = True
        hf_config.save_pretrained(building)
        content = config_json(read_json(building / "config.json"), config.model.dtype)
        if hf_config.model_type in SAVED_ALONE:
            content["architectures"] = [SAVED_ALONE[hf_config.model_type]]
        _write_json(building / "config.json", content)
        tokenizer.write(building, ids, settings.max_tokens)
        settings.write(building)
        dimension = int(model.backbone.config.hidden_size)
        _write_sentence_transformers(building, settings, tokenizer.sink, hf_config.vocab_size, dimension)
        (building / "README.md").write_text(_card(settings, config, dimension), encoding="utf-8")
        write_checksums(building)
        replace_folder(building, folder)
    meet(ranks)
