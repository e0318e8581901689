"""Training started by torchrun's own agent, by its script, and by Ray Train: the same stages, one group, one checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from liveavatar.training import recipe
from liveavatar.training.loop import load_checkpoint
from test_distillation import MICRO, SPECTRUM, encoded_clip

ROOT = MICRO.parents[1]
FORKED_WITH = ("torch.distributed.fsdp",)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on the CPU is what is tested here")


def clips(folder: Path) -> list[str]:
    """Clips of noise under `folder`; the settings of a short stage on them."""
    for index in range(3):
        encoded_clip(folder / "latents", index)
    return [f"run={folder}", "text=null", "forcing.start=''", "forcing.loop.iterations=3", "forcing.loop.muon=false", *SPECTRUM]


def logged(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "forcing.jsonl").read_text().splitlines()]


def run_recipe(overrides: list[str]) -> None:
    """What a process of torchrun does."""
    recipe.run("forcing", MICRO, overrides)
    assert not torch.distributed.is_initialized(), "who joined leaves"


def be_torchrun(rank: int, overrides: list[str]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    agent = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
                         max_restarts=0, monitor_interval=0.2)
    elastic_launch(agent, run_recipe)(overrides)


def test_processes_of_torchrun_join_one_group(tmp_path, forker):
    """Sharded, too: they leave one checkpoint, which one process goes on with."""
    overrides = [*clips(tmp_path), "forcing.loop.strategy=fsdp2"]
    forker.run(be_torchrun, overrides, world=1)
    assert len(logged(tmp_path)) == 3, "rank 0 alone writes the log"
    assert int(load_checkpoint(tmp_path / "forcing.pt")["iteration"]) == 3
    recipe.run("forcing", MICRO, [*overrides, "forcing.loop.strategy=single", "forcing.loop.iterations=4"])
    assert int(load_checkpoint(tmp_path / "forcing.pt")["iteration"]) == 4 and len(logged(tmp_path)) == 4


def test_scripts_say_what_to_run(tmp_path):
    """The command lines, without running them."""
    env = {**os.environ, "PYTHON": "echo", "CONFIG": "a.yaml", "RANKS": "2", "NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "host"}
    said = subprocess.run(["bash", "launch/train_torchrun.sh", "dmd", "seed=4"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert "--nnodes 3 --node-rank 1 --master-addr host" in said and "--nproc-per-node 2" in said
    assert said.strip().endswith("-m liveavatar train dmd --config a.yaml seed=4")
    (tmp_path / "srun").write_text('#!/bin/bash\nshift; SLURM_NODEID=1 exec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    slurm = {**env, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "2"}
    said = subprocess.run(["bash", "launch/train_slurm.sbatch", "dmd", "seed=4"], cwd=ROOT, env=slurm, capture_output=True, text=True, check=True).stdout
    assert "--node-rank 1" in said and said.strip().endswith("train dmd --config a.yaml seed=4")
    for path in ("train_torchrun.sh", "train_slurm.sbatch", "train_ray.py"):
        assert len((ROOT / "launch" / path).read_text().splitlines()) <= 30


@pytest.mark.skipif("RAY_TRAIN_TEST" not in os.environ, reason="takes minutes on two cores: set RAY_TRAIN_TEST, with liveavatar[ray-train]")
def test_ray_train_runs_a_stage(tmp_path):
    settings = [*clips(tmp_path), "forcing.loop.iterations=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"}
    command = [sys.executable, "launch/train_ray.py", "forcing", "--config", str(MICRO), "--workers", "2", "--cpu", *settings]
    made = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert made.returncode == 0, made.stderr[-3000:]
    assert len(logged(tmp_path)) == 2 and int(load_checkpoint(tmp_path / "forcing.pt")["iteration"]) == 2
