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
        "torch>=2.10",  # older versions: CVE-2026-24747 in weights_only loading
        "transformers>=5.3",  # older versions: CVE-2026-4372
        "deepspeed>=0.19.8",  # coalesced gradient reduction for ZeRO-3
        "peft>=0.17",
        "sentence-transformers>=5.0",
        "datasets>=4.0",
        "pyarrow>=15",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "submitit>=1.5.3",
        "bm25s>=0.2",
        "jsonargparse>=4.40",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pyyaml>=6.0",
        "rich>=13",
        "xxhash>=3.4",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.7", "liger-kernel>=0.8"],
        "mpi": ["mpi4py>=4.0"],
        "mining": ["faiss-cpu>=1.8"],  # `lbr data negatives --index ivf`
        "tracking": ["tensorboard>=2.16"],
        "eval": ["gguf>=0.10", "accelerate>=1.0"],  # transformers needs them to read the demo's base model
        "dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.9", "mypy>=1.14"],
    },
)
