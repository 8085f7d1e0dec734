"""The checks of torch, GPUs, kernels and DeepSpeed by `lbr doctor`. Its own process, since drivers crash and hang.

Prints a line of JSON for each finding as soon as it is known; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import get_args

from lbr_dist.console import size_text
from lbr_dist.launch.doctor.findings import Finding, fault, ok, warning
from lbr_dist.launch.doctor.node import visible
from lbr_dist.ranks.hardware import count_gpus

HEAD_DIM = 128
"""The head dimension of most models from 1e9 to 70e9 parameters."""

BUSY = 0.1
"""A larger share of a GPU's memory in use gives a warning."""

OLDEST = (8, 0)
"""The lowest compute capability with bfloat16 and flash attention."""


def _torch() -> list[Finding]:
    import torch

    there = count_gpus()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    found = f"{torch.__version__}, built with {build}"
    if there and torch.version.cuda is None:
        advice = "Install torch for CUDA, see pytorch.org: this build does not use the GPUs."
        return [fault("torch", f"{found}, but {there} GPUs are in /dev", advice)]
    return [ok("torch", found)]


def _gpus() -> list[Finding]:
    import torch

    there = count_gpus()
    if not there and not torch.cuda.is_available():
        return [ok("devices", f"no GPUs{visible()}: ranks run on the CPU")]
    if torch.version.cuda is None:
        return []  # the finding on torch reports it
    try:
        torch.cuda.init()
    except RuntimeError as error:
        advice = "See `nvidia-smi`: the driver may be older than torch's CUDA, or not loaded, or a GPU is lost."
        return [fault("devices", f"CUDA does not start: {_first_line(error)}", advice)]
    count, findings = torch.cuda.device_count(), []
    if count != there:
        advice = "A GPU is lost, or hidden by the container or CUDA_VISIBLE_DEVICES: ranks would have none."
        findings.append(fault("devices", f"{there} in /dev, torch sees {count}{visible()}", advice))
    listed: dict[str, list[int]] = {}
    for device in range(count):
        about = torch.cuda.get_device_properties(device)
        kind = f"{about.name}, {size_text(about.total_memory)}, compute capability {about.major}.{about.minor}"
        listed.setdefault(kind, []).append(device)
        free, total = torch.cuda.mem_get_info(device)
        if free < (1 - BUSY) * total:
            advice = "Another process uses it: see `nvidia-smi`."
            findings.append(warning(f"GPU {device}", f"{size_text(free)} of {size_text(total)} free", advice))
        if (about.major, about.minor) < OLDEST:
            advice = "bfloat16 is slow or missing on it, and so is flash attention: use an A100 or newer."
            findings.append(warning(f"GPU {device}", kind, advice))
    kinds = "; ".join(f"{len(devices)} x {kind}" for kind, devices in listed.items())
    return [*findings, ok("devices", f"{kinds}{visible()}")] if kinds else findings


def _group() -> list[Finding]:
    """Check a process group of one rank, made as a rank makes it, with one all-reduce."""
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    version = ""
    if backend == "nccl":
        version = f"{'.'.join(map(str, torch.cuda.nccl.version()))}, "  # type: ignore[no-untyped-call]
    try:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
        summed = torch.ones(1024, device=device)
        dist.all_reduce(summed)
        total = float(summed.sum())
        dist.destroy_process_group()
    except RuntimeError as error:
        interface = f"{backend.upper()}_SOCKET_IFNAME"
        advice = f"Check that {interface}, if set, names an interface of this machine" + (
            ", and see what NCCL_DEBUG=INFO prints." if backend == "nccl" else ", and that the host's name resolves."
        )
        return [fault(backend, f"{version}a group of one process does not work: {_first_line(error)}", advice)]
    if total != 1024:
        return [fault(backend, f"{version}a sum of 1024 ones is {total:g}", "Do not train here: results are wrong.")]
    return [ok(backend, f"{version}a group of one process works")]


# ---- kernels -------------------------------------------------------------------------------------------------------


def _attention() -> list[Finding]:
    import torch

    from lbr_dist.kernels.attention import Backend, choose_backend, why_not

    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = (device, torch.bfloat16, HEAD_DIM)
    chosen = choose_backend("auto", *case)
    reasons = {name: why_not(name, *case) for name in get_args(Backend) if name != "auto"}
    others = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason)
    found = f"`auto` picks {chosen} on {device} in bfloat16{f' ({others})' if others else ''}"
    if chosen == "flash_attn":
        try:
            importlib.import_module("flash_attn")
        except (ImportError, OSError) as error:
            advice = "Build it against this torch: pip install --no-build-isolation --force-reinstall flash-attn"
            return [fault("attention", f"{found}, which cannot be imported: {_first_line(error)}", advice)]
    return [ok("attention", found)]


def _losses() -> list[Finding]:
    import torch

    from lbr_dist.kernels.infonce import backend_for

    queries = torch.zeros(1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
    reason = ""
    try:
        backend_for("triton", queries)
    except ValueError as error:
        reason = f" ({str(error).split(';')[0]})"
    findings = [ok("InfoNCE", f"`auto` picks {backend_for('auto', queries)}{reason}")]
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    if has_liger and queries.is_cuda:
        found = "`auto` picks liger"
    else:
        why = "it needs CUDA" if has_liger else "the package liger-kernel is not installed"
        found = f"`auto` picks chunked (not liger: {why})"
    return [*findings, ok("cross-entropy", found)]


def _deepspeed() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as ranks do
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator().device_name()
    except Exception as error:
        advice = "See what the error names. To compile kernels, `CUDA_HOME` must name a CUDA that matches torch's."
        return [fault("DeepSpeed", f"cannot be imported: {type(error).__name__}: {_first_line(error)}", advice)]
    found = f"{deepspeed.__version__}, accelerator {accelerator}"
    if accelerator != ("cuda" if torch.cuda.is_available() else "cpu"):
        advice = f"Unset DS_ACCELERATOR (it is {os.environ.get('DS_ACCELERATOR', 'not set')!r}): ranks do not use that."
        return [fault("DeepSpeed", found, advice)]
    return [ok("DeepSpeed", found)]


# ---- the process ---------------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


PROBES: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
    ("torch", _torch),
    ("devices", _gpus),
    ("group", _group),
    ("attention", _attention),
    ("InfoNCE", _losses),
    ("DeepSpeed", _deepspeed),
)


def main() -> None:
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name, probe in PROBES:
        try:
            findings = probe()
        except Exception as error:
            found = f"cannot be checked: {type(error).__name__}: {_first_line(error)}"
            findings = [fault(name, found, "Fix what the error names; it may be a package that is missing or broken.")]
        for finding in findings:
            print(json.dumps(asdict(finding)), file=results, flush=True)
        if "torch" not in sys.modules:
            return  # all other checks would fail in the same way


if __name__ == "__main__":
    main()
