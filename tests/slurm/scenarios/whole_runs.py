"""The whole chain of stages, a sweep, and a collection encoded on two nodes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

from lbr_dist.config import RepresentConfig, RunConfig, SlurmConfig
from tests.configs import tiny_run
from tests.slurm import chains
from tests.slurm.chains import lbr, outcomes, submit, tries, wait, wait_over, wait_step
from tests.slurm.scenarios.place import Place, two_stages

SECRET = "do-not-write-me-anywhere"
DIRTY = {
    "SLURM_JOB_ID": "999999",
    "SLURM_NTASKS": "64",
    "SLURM_PROCID": "7",
    "SLURM_NODEID": "3",
    "SLURM_MEM_PER_CPU": "999999",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0xFF",
    "SLURM_CPUS_PER_TASK": "48",
    "SLURM_EXPORT_ENV": "NONE",
    "SBATCH_PARTITION": "nonsense",
    "SRUN_CPUS_PER_TASK": "48",
    "RANK": "5",
    "WORLD_SIZE": "9",
    "LOCAL_RANK": "5",
    "MASTER_ADDR": "nowhere",
    "OMP_NUM_THREADS": "77",
    "HF_TOKEN": SECRET,
}
"""The environment of a shell inside another job."""

NASTY_VALUE = "a; $(touch executed) `touch executed` \"b\" 'c' | & > executed\n%j %t \\ $HOME ä"

NASTY_NAME = "a; $(touch executed) 'q' \"d\" %j\nü"


def chain(place: Place) -> tuple[Path, RunConfig, dict[str, str]]:
    """All stages on two nodes, four ranks, with names and values that a shell would execute; see `test_chain.py`."""
    folder = place.folder / NASTY_NAME
    folder.mkdir()
    config = tiny_run(
        folder / "run; $(touch executed)",
        place.model,
        place.data,
        slurm=SlurmConfig(
            nodes=2,
            gpus_per_node=2,
            cpus_per_task=1,
            time_minutes=30,
            lead_seconds=60,
            evaluate_minutes=10,
            job_name="job; $(touch executed) 'q' \"d\" %j",
            environment={"LBR_TRIAL": NASTY_VALUE, "CUDA_VISIBLE_DEVICES": ""},
            setup=("LBR_SETUP='from the config'", "export LBR_SETUP"),
            pass_environment=("LBR_PASSED",),
            extra={"comment": "$(touch executed); 'c'"},
            check_gpus=False,
        ),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, query_prompt=NASTY_VALUE))
    jobs = submit(config, folder, LBR_PASSED=NASTY_VALUE, **DIRTY)
    names = chains.slurm("squeue", "-h", "-o", "%j")
    assert config.slurm.job_name is not None and names.count(config.slurm.job_name) == 3
    found = wait_over(config.run_path)
    assert [row["state"] for row in found.values()] == ["finished"] * 3, chains.log_tails(config.run_path)
    return folder, config, jobs


def a_sweep(place: Place) -> None:
    """One run per value, as an array whose tasks wait only for their own run, and are requeued and cancelled alone."""
    config = two_stages(place, nodes=1)
    config = dataclasses.replace(
        config,
        learn=dataclasses.replace(config.learn, steps=12),
        represent=RepresentConfig(steps=2, batch_pairs=4, chunk_tokens=192),
    )
    jobs = submit(config, place.folder, "--sweep", "seed=0,1,2")
    runs = [config.run_path / "runs" / f"seed={seed}" for seed in range(3)]
    alone = [dataclasses.replace(config, run_dir=str(run)) for run in runs]
    # the last task has the array's own job id
    wait_step(alone[2], 2)
    os.kill(chains.ranks(config, "config-2.yaml")[0], signal.SIGTERM)
    wait("the task was interrupted", lambda: outcomes(alone[2])[:1] == ["interrupted"], config.run_path)
    wait_step(alone[1], 1)
    done = lbr("cancel", str(runs[1]))
    assert done.returncode == 0 and f"job {jobs['learn']}_1 is cancelled" in done.stdout, done
    wait_over(config.run_path)

    whole = {(row["run"], row["stage"]): row for row in chains.rows(config.run_path)}
    states = {run: [whole[str(run), stage]["state"] for stage in ("learn", "represent")] for run in runs}
    assert states == {runs[0]: ["finished"] * 2, runs[1]: ["cancelled"] * 2, runs[2]: ["finished"] * 2}, whole
    assert outcomes(alone[0]) == ["finished"] and outcomes(alone[2]) == ["interrupted", "finished"]
    assert {each.job for each in tries(alone[2])} == {f"{jobs['learn']}_2"}
    assert chains.rows(runs[2]) == [whole[str(runs[2]), stage] for stage in ("learn", "represent")]
    weights = [(runs[seed] / "model" / "model.safetensors").read_bytes() for seed in (0, 2)]
    assert weights[0] != weights[1]


def a_collection(place: Place) -> None:
    """Encoded and tokenised on two nodes, by the ranks of srun and of mpirun: the same bytes as from one process."""
    corpus = place.data / "corpus.jsonl"
    small_parts = (sys.executable, "-m", "tests.end_to_end.with_fault", "none")
    nodes = ("-N2", "--ntasks-per-node=1")
    launchers = {
        "alone": (),
        "srun": ("srun", *nodes, "--mpi=none", "--kill-on-bad-exit=1"),
        # the nodes of the test bed are one machine, and over shared memory Open MPI would not find its ranks
        "mpirun": ("salloc", *nodes, "mpirun", "--allow-run-as-root", "--mca", "btl", "self,tcp"),
    }
    encode = ("encode", str(place.model), str(corpus), "--part-texts", "10", "--threads", "1", "--out")
    tokens = ("data", "tokens", "--base", str(place.model), "--corpus", str(corpus), "--processes", "1", "--cache-dir")
    for name, launcher in launchers.items():
        out = place.folder / name
        for command in ((*encode, str(out / "vectors.npy")), (*tokens, str(out / "cache"))):
            out.mkdir(exist_ok=True)
            done = subprocess.run(
                [*launcher, *small_parts, *command],
                cwd=chains.ROOT,
                env=chains.SHELL,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, (name, done)
            assert ("2 ranks" in done.stdout) == bool(launcher), (name, done)
    made = [_files(place.folder / name) for name in launchers]
    assert made[0] == made[1] == made[2]
    assert {"vectors.npy", "vectors.ids"} < made[0].keys() and len(made[0]) > 4


def _files(folder: Path) -> dict[str, bytes]:
    """Contents by path, without the cache's notes about files that it has read."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "hashes"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
