"""What a machine has: bfloat16 units, memory, GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.ranks import hardware

FLAGS = {
    "Xeon with AMX": ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8", True),
    "Zen 4": ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_vnni", True),
    "Zen 3": ("flags\t\t: fpu sse2 ssse3 fma avx2 vaes vpclmulqdq", False),
    "Skylake": ("flags\t\t: fpu sse2 avx2 avx512f avx512bw avx512vl", False),
    "Graviton 3": ("Features\t: fp asimd sve bf16 i8mm", True),
    "Graviton 2": ("Features\t: fp asimd dcpop", False),
    "nothing is said": ("", False),
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
