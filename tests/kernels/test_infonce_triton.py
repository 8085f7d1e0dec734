"""InfoNCE in Triton: in the interpreter, compiled for an H100, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.infonce_cases import CASES, DTYPES, Case, case, check, largest


def triton_in_the_interpreter() -> None:
    """Run by `test_triton_in_its_own_process`."""
    from lbr_dist.kernels import infonce_triton

    torch.set_num_threads(1)
    check(CASES["everything"], "triton", torch.float32, 1)  # everything in one block
    infonce_triton.BLOCK, infonce_triton.PANEL, infonce_triton.PROGRAMS = 16, 32, 3
    for number, (name, c) in enumerate(CASES.items()):
        print(name, file=sys.stderr)
        check(c, "triton", DTYPES[number % 3], 1)
    for dtype in DTYPES:
        c = case(19, 37, 75, 2, document_ids=29, margin=0.2)  # d spans several blocks
        by_column = [x.T.contiguous().T for x in (c.queries, c.documents)]
        check(Case(*by_column, *c[2:]), "triton", dtype, 1)
    infonce_triton.BLOCK = infonce_triton.PANEL = 64
    assert largest("triton") <= 500 * 16 * 4  # the interpreter copies its inputs as bytes


def triton_for_an_h100() -> None:
    """Compile the kernels, which needs no GPU, and check types, shared memory, and products on the tensor cores."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lbr_dist.kernels import infonce_triton as kernels

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    of_floats = ("query_scale", "document_scale", "limits", "tops", "totals", "logsumexp", "pull", "gradient", "scale")
    for dtype in DTYPES:
        pointers = dict.fromkeys(of_floats, torch.float32) | dict.fromkeys(("positives", "excluded"), torch.int64)
        pointers |= dict.fromkeys(("queries", "documents", "others"), dtype) | {"weights": kernels._weight_dtype(dtype)}
        types = {name: f"*{names[of]}" for name, of in pointers.items()} | {"counts": "*i32"}
        blocks = dict.fromkeys(("BLOCK_Q", "BLOCK_N", "BLOCK_M", "BLOCK_W"), kernels.BLOCK)
        blocks |= dict.fromkeys(("BLOCK_D", "BLOCK_K"), kernels._depth(dtype))
        known = {"width": 4096, "LIMITED": True, **kernels._settings(dtype), **blocks}
        options = {name: known[name] for name in ("num_warps", "num_stages")}
        for kernel in (kernels._statistics, kernels._weights, kernels._accumulate):
            arguments = kernel.arg_names
            signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in arguments}
            constants = {(place,): known[name] for place, name in enumerate(arguments) if name in known}
            aligned = [name.endswith("stride") or signature[name].startswith("*") for name in arguments]
            attributes = {(place,): [["tt.divisibility", 16]] for place, yes in enumerate(aligned) if yes}
            source = ASTSource(kernel, signature, constants, attributes)
            made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert made.metadata.shared <= 227 * 1024
            assert dtype == torch.float32 or "wgmma.mma_async" in made.asm["ptx"]


@pytest.mark.parametrize(
    "script", ["triton_in_the_interpreter", pytest.param("triton_for_an_h100", marks=pytest.mark.slow)]
)
def test_triton_in_its_own_process(script: str) -> None:
    """Triton's interpreter must be chosen before Triton is imported, so each script has its own process."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(script == "triton_in_the_interpreter"))}
    command = f"from tests.kernels import test_infonce_triton; test_infonce_triton.{script}()"
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_triton_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], "triton", dtype, 1, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_on_a_gpu_in_several_blocks(dtype: torch.dtype) -> None:
    check(case(301, 1027, 4096, 3, 0, 250, 900, margin=0.2, symmetric=True), "triton", dtype, 1, device="cuda")
