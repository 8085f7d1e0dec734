"""Reads exported folders with plain sentence-transformers, in a process that imports none of our code.

`current` uses the pinned versions, `old` those of `tests/readers.txt`: transformers 4.57. They get an environment of
their own, `build/readers`, made once. It takes torch from `.venv`, which is most of what would have to be installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lbr_dist.storage.files import checksum

ROOT = Path(__file__).parents[3]
WANTED = ROOT / "tests" / "readers.txt"
INSTALLED = ROOT / "build" / "readers"

READ = """
import json, sys
work = json.load(open(sys.argv[1]))
import numpy, torch, transformers
from sentence_transformers import SentenceTransformer

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
found = {"transformers": transformers.__version__, "ids": {}}
vectors = {}
for folder in work["folders"]:
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    found["ids"][folder] = {}
    for kind, encode in (("query", model.encode_query), ("document", model.encode_document)):
        ids = []
        for text in work["texts"]:  # one by one, so that none is padded
            features = model.tokenize([model.prompts[kind] + text])
            ids.append(features["input_ids"][0].tolist())
        found["ids"][folder][kind] = ids
        vectors[f"{folder} {kind}"] = encode(work["texts"], show_progress_bar=False)
json.dump(found, open(sys.argv[2] + ".json", "w"))
numpy.savez(sys.argv[2] + ".npz", **vectors)
"""


class Reading:
    """What plain sentence-transformers made of the folders."""

    def __init__(self, found: dict[str, Any], vectors: dict[str, np.ndarray]) -> None:
        self.transformers: str = found["transformers"]
        self._ids, self._vectors = found["ids"], vectors

    def ids(self, folder: Path, kind: str) -> list[tuple[int, ...]]:
        return [tuple(ids) for ids in self._ids[str(folder)][kind]]

    def vectors(self, folder: Path, kind: str) -> np.ndarray:
        return self._vectors[f"{folder} {kind}"]


def _install() -> Path:
    """The interpreter of the environment with the old versions; makes it if it is missing or differs from the list."""
    python, mark = INSTALLED / "bin" / "python", INSTALLED / "made-from"
    wanted = f"{checksum(WANTED)} {torch.__version__} {sys.version}"
    if not mark.exists() or mark.read_text() != wanted:
        venv.create(INSTALLED, clear=True, with_pip=True)
        site = next(INSTALLED.glob("lib/python*/site-packages"))
        ours = Path(torch.__file__).parents[1]
        for path in (*(ours / name for name in ("torch", "torchgen", "functorch")), *ours.glob("torch-*.dist-info")):
            (site / path.name).symlink_to(path)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(WANTED)], check=True)
        mark.write_text(wanted)
    return python


def read(which: Literal["current", "old"], folders: list[Path], texts: list[str], scratch: Path) -> Reading:
    """Open each folder and encode the texts, as queries and as documents, in float32.

    Args:
        which: versions; see above.
        folders: exported models.
        texts: without prompts.
        scratch: a folder for the results.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    python = _install() if which == "old" else sys.executable
    work = {"folders": [str(folder) for folder in folders], "texts": texts}
    (scratch / "work.json").write_text(json.dumps(work))
    out = scratch / which
    command = [str(python), "-c", READ, str(scratch / "work.json"), str(out)]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(f"{out}.npz") as vectors:
        return Reading(json.loads(Path(f"{out}.json").read_text()), dict(vectors))
