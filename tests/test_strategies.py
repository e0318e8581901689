"""Every way of spreading training over two processes makes the step that one process makes on all their clips, for student
and critic on one base; what was saved by two is resumed by one."""

import dataclasses
import importlib.util
import os

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import ClipCondition, exit_table, level_parallel
from liveavatar.training import losses, strategy
from liveavatar.training.groups import join
from liveavatar.training.loop import Learner, LoopConfig, Trainer, load_checkpoint
from test_rollouts import BLOCKS, SIGMAS, clips, start

pytest.importorskip("peft", reason="adapters are PEFT's")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd with threads for GPUs cannot be forked")
WORLD = 2
LOOP = LoopConfig(iterations=4, batch=1, lr=1e-2, warmup=0, cooldown=0.0, clip=0.02, ema=0.5, bf16=False, device="cpu", threads=1, beta1=0.5, audio_factor=0.5)
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
SPREAD = ["single", "fsdp2", pytest.param("deepspeed", marks=needs_deepspeed)]


def roles(kind: str) -> dict:
    """Student, critic and teacher: adapters over one base that already say something, or copies."""
    if kind == "copies":
        return {name: tiny_model(seed).requires_grad_(name != "teacher") for seed, name in enumerate(("teacher", "critic", "student"))}
    from liveavatar.training.adapters import Base
    from test_adapters import moved

    base = Base(tiny_model(), rank=4, alpha=2.0)
    moved(base, "critic", "student")
    return {"teacher": base.as_(None), "critic": base.as_("critic"), "student": base.as_("student")}


def part(rank: int, world: int):
    """The clips of one rank: (condition, noise)."""
    mine = slice(rank * WORLD // world, (rank + 1) * WORLD // world)
    whole = clips(WORLD)
    return ClipCondition(whole.features[mine], whole.context[mine], whole.reference[mine], whole.motion[mine], 3, 9), start(WORLD)[mine]


def stage_two(learners: dict, teacher, rank: int, world: int) -> list[float]:
    """An iteration of Stage 2 by hand: the critic learns from a rollout, then the student from critic and teacher. Norms."""
    condition, noise = part(rank, world)
    tau, eps = torch.full((len(noise), BLOCKS), 0.6), noise.flip(2)
    critic, student = learners["critic"], learners["student"]
    made = level_parallel(condition.velocity(student.module), exit_table(SIGMAS, 2), noise, BLOCKS)
    losses.critic_loss(condition.velocity(critic.module), made.detach(), tau, eps).backward()
    norms = [critic.update(1e-2, 1)]
    direction = losses.dmd_gradient(made.detach(), condition.velocity(teacher), condition.velocity(critic.module), tau, eps)
    losses.matching_loss(made, direction).backward()
    losses.critic_loss(condition.velocity(student.module), made.detach(), tau, eps).backward()  # a second pass into the same step
    return [*norms, student.update(1e-2, 1)]


def work(kind: str, name: str, folder, rank: int, world: int, checkpointing: bool = False) -> None:
    """Two iterations, a checkpoint, one more from what was read back."""
    config = dataclasses.replace(LOOP, strategy=name, checkpointing=checkpointing)
    norms = []
    for iterations in (2, 1):
        cast = roles(kind)
        strategy.strategy_of(config).wrap(cast["teacher"])
        critic = Learner(cast["critic"], config, average=False)
        trainer = Trainer("dmd", cast["student"], config, folder, 0, {"critic": critic})
        for _ in range(iterations):
            norms += stage_two({"critic": critic, "student": trainer.learner}, cast["teacher"], rank, world)
            trainer.iteration += 1
        trainer.save()
    if rank == 0:
        torch.save(norms, folder / "norms")


def as_rank(rank, kind, name, folder, checkpointing):
    """What a rank does."""
    join(rank, WORLD, f"file://{folder}/group")
    try:
        work(kind, name, folder, rank, WORLD, checkpointing)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By kind of roles: the folder where one process did it on all clips."""
    folders = {}
    for kind in ("adapters", "copies"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        work(kind, "single", folders[kind], 0, 1)
    return folders


def compare(found: dict, expected: dict, where: str = "") -> None:
    """Trees of tensors alike to rounding: relative to the size of each tensor."""
    assert found.keys() == expected.keys(), where
    for key, value in expected.items():
        if isinstance(value, dict):
            compare(found[key], value, f"{where}/{key}")
        else:
            error = float((found[key].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-30))
            assert error < 1e-4, (where, key, error)


def spread(monkeypatch, kind, name, folder, checkpointing=False):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.start_processes(as_rank, args=(kind, name, folder, checkpointing), nprocs=WORLD, start_method="fork")


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_two_processes_step_as_one(alone, kind, name, tmp_path, monkeypatch):
    """Weights, averages, gradients (in the moments and norms), of both roles; through a checkpoint in the middle."""
    spread(monkeypatch, kind, name, tmp_path)
    assert torch.load(tmp_path / "norms") == pytest.approx(torch.load(alone[kind] / "norms"), rel=1e-4)
    found, expected = load_checkpoint(tmp_path / "dmd.pt"), load_checkpoint(alone[kind] / "dmd.pt")
    assert set(found) == {"model", "ema", "optimiser", "critic", "iteration", "seed"} and int(found["iteration"]) == 3
    compare(found, expected)
