"""Processes that train together: who is here, what all must agree on, where tensors live."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from liveavatar.core import ConfigError

MEETING = timedelta(hours=24)  # the longest that ranks wait for one that renders clips or writes files alone


def grouped() -> bool:
    """True inside a process group."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process' place in the group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if grouped() else (0, 1)


def meet() -> None:
    """Wait for the other ranks of the group, if there is one: for hours, where collectives of training give up after minutes."""
    if grouped():
        room = dist.new_group(backend="gloo", timeout=MEETING)
        dist.barrier(room)
        dist.destroy_process_group(room)


def agreed(**drawn: int) -> None:
    """Compare what every rank drew. Raises ConfigError, on all ranks, where they differ (another seed or iteration)."""
    if not grouped():
        return
    own = torch.tensor(list(drawn.values()))
    all_ranks = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, own)
    different = [name for i, name in enumerate(drawn) if len({int(r[i]) for r in all_ranks}) > 1]
    if different:
        raise ConfigError(f"ranks drew different {', '.join(different)}: {[r.tolist() for r in all_ranks]}; same seed and checkpoint everywhere?")


def decided(value: bool) -> bool:
    """What rank 0 thinks, on every rank: for what depends on a clock or a file, and is done together or not at all."""
    if not grouped():
        return value
    word = torch.tensor([int(value)])
    dist.broadcast(word, 0)
    return bool(word[0])


def average_gradients(parameters: list[torch.nn.Parameter], world: int) -> None:
    """Mean of the gradients over all ranks, as one message. On a few CPU cores two processes of one
    thread each train faster than one of two: they meet once an iteration, not once an operator."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.float().flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for p, part in zip(parameters, flat.split([g.numel() for g in gradients])):
        if p.grad is not None or part.any():  # what no rank used stays without, as in one process, and is not decayed
            p.grad = part.view(p.shape).to(p.dtype)


# ---------------------------------------------------------------- joining


def device_of(name: str) -> torch.device:
    """The device of a LoopConfig: "auto" is this process' GPU where there is one. Raises ConfigError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("loop.device='cuda': no GPU here; say auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def launched() -> bool:
    """True when torchrun, Slurm or Ray Train started this process as one of several and set its place in the environment."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def join(rank: int | None = None, world: int | None = None, meeting: str = "env://") -> None:
    """Enter the process group: gloo for tensors on the CPU, NCCL beside it where there are GPUs, one a process.

    Without arguments the place is that of the environment (torchrun's names).
    """
    local = int(os.environ.setdefault("LOCAL_RANK", str(rank or 0)))  # DeepSpeed reads it too
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    where = {} if rank is None else {"rank": rank, "world_size": world}
    dist.init_process_group(backend, init_method=meeting, **where)
