"""What a machine has, and what the environment's variables say about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.errors import LaunchError
from lbr_dist.ranks import hardware
from lbr_dist.ranks.hardware import omp_threads, visible_gpus

FLAGS = {
    "Xeon with AMX": ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8", True),
    "Zen 4": ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_vnni", True),
    "Zen 3": ("flags\t\t: fpu sse2 ssse3 fma avx2 vaes vpclmulqdq", False),
    "Skylake": ("flags\t\t: fpu sse2 avx2 avx512f avx512bw avx512vl", False),
    "Graviton 3": ("Features\t: fp asimd sve bf16 i8mm", True),
    "Graviton 2": ("Features\t: fp asimd dcpop", False),
    "no flags at all": ("", False),
}


@pytest.mark.parametrize("name", FLAGS)
def test_bfloat16_of_a_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line, expected = FLAGS[name]
    monkeypatch.setattr(hardware, "_cpu_lines", lambda: [line])
    assert hardware.has_bfloat16(gpus=0) is expected
    assert hardware.fitting_dtype(0) == ("bfloat16" if expected else "float32")


def test_the_lines_of_this_machine() -> None:
    text = Path("/proc/cpuinfo").read_text()
    assert len(hardware._cpu_lines()) == sum(line.startswith(("flags", "Features")) for line in text.splitlines()) > 0


@pytest.mark.parametrize(
    ("printed", "expected"), [("9.0\n9.0\n", True), ("9.0\n7.5\n", False), ("[N/A]\n", True), (None, True)]
)
def test_bfloat16_of_gpus(printed: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest decides; a driver that does not answer leaves what every GPU since 2020 has."""
    if printed is not None:
        program = tmp_path / "nvidia-smi"
        answer = tmp_path / "answer"
        answer.write_text(printed)
        program.write_text(f"#!/bin/sh\ncat {answer}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + ":/usr/bin:/bin")
    assert hardware.has_bfloat16(gpus=2) is expected


@pytest.mark.parametrize(
    ("variable", "count"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("2", 1),
        ("0,3", 2),
        (" 0, 1", 2),
        ("0,-1,1", 1),  # nothing after the first that is invalid
        ("0,7,1", 1),
        ("NoDevFiles", 0),
        ("GPU-8932f937-d72c,GPU-6a3b", 2),
        ("MIG-4b1c", 1),
    ],
)
def test_visible_gpus(variable: str | None, count: int) -> None:
    assert visible_gpus(variable, 4) == count


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), (" 4 , 2", 4), ("", None), (None, None)])
def test_omp_threads(monkeypatch: pytest.MonkeyPatch, value: str | None, threads: int | None) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert omp_threads() == threads


@pytest.mark.parametrize("value", ["0", "-2", "many", ",4"])
def test_wrong_omp_threads_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(LaunchError, match=f"OMP_NUM_THREADS: found '{value}'"):
        omp_threads()
