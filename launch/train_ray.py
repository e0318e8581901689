"""A training stage under Ray Train, which sets up the group and starts again what fails; from the repository:

    python launch/train_ray.py dmd --config configs/train_s2v14b.yaml --workers 64 [--cpu] [KEY=VALUE ...]
"""
import argparse
import os

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(job: dict) -> None:
    from liveavatar.training.recipe import run

    os.chdir(job["folder"])  # of the repository, on a file system that all hosts share
    run(job["stage"], job["config"], job["overrides"], told=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage")
    parser.add_argument("--config", required=True)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--cpu", action="store_true")
    args, overrides = parser.parse_known_args()
    ray.init(include_dashboard=None if "RAY_ADDRESS" in os.environ else False)
    job = {"folder": os.getcwd(), "stage": args.stage, "config": args.config, "overrides": overrides}
    TorchTrainer(work, train_loop_config=job, scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu),
                 torch_config=TorchConfig(backend="gloo" if args.cpu else "cpu:gloo,cuda:nccl"),
                 run_config=RunConfig(storage_path=os.path.abspath("runs/ray"), failure_config=FailureConfig(max_failures=3))).fit()
