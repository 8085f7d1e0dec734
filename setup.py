"""Packaging of lbr-dist: its dependencies, with reasons for some of the minimum versions."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

version = re.search(r'__version__ = "(.+)"', Path("lbr_dist/__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    version=version,
    # kernels/, launch/ and slurm/ are top-level folders that are linked into the package. None of them has an
    # __init__.py, since a top-level package named `kernels` would break transformers
    packages=find_namespace_packages(include=["lbr_dist", "lbr_dist.*"]),
    package_data={"lbr_dist.launch": ["configs/*.yaml"]},
    install_requires=[
        "torch>=2.11",  # 2.11 on a GPU; CI runs 2.13. Before 2.10: CVE-2026-24747 in weights_only loading
        "transformers>=5.23.0",  # the first with prevent_arange_dtype_change: exact rotary tables under ZeRO-3
        "deepspeed>=0.19.8",  # coalesced gradient reduction for ZeRO-3
        "peft>=0.19.0",
        "sentence-transformers>=6.0.0",
        "datasets>=4.8.0",
        "pyarrow>=21.0.0",
        "safetensors>=0.8.0",
        "tokenizers>=0.23.1",
        "sentencepiece>=0.2.1",
        "submitit>=1.5.3",
        "bm25s>=0.2.14",
        "jsonargparse>=4.46.0",
        "matplotlib>=3.9.0",
        "numpy>=2.1.0",
        "pyyaml>=6.0.2",
        "rich>=13.9.0",
        "xxhash>=3.5.0",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.7", "liger-kernel>=0.8"],
        "mpi": ["mpi4py>=4.0.0"],
        "mining": ["faiss-cpu>=1.12.0"],  # `lbr data negatives --index ivf`
        "tracking": ["tensorboard>=2.19.0"],
        "eval": ["gguf>=0.17.1", "accelerate>=1.10.0"],  # transformers needs them to read the demo's base model
        "dev": ["pytest>=8.4.0", "hypothesis>=6.140.0", "ruff>=0.9", "mypy>=1.14"],
    },
)
