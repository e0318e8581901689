"""The chain end to end: frames per second, loading and time to first frame for each number of ranks.

    python bench/pipeline.py --ranks 1 5 --launcher local --seconds 8 [--compare bench/results/pipeline-old.json]

Runs `liveavatar.generate` (the same code as the demo) on the embedded avatar or --config, once per number of
ranks after one warm-up, prints a table and writes JSON with machine, commit and config.

    python bench/pipeline.py --fixed --ranks 1 2 5 --launcher inproc local

Stages that sleep instead of computing, so that what is measured is ours: links, queues, the head. Efficiency is the rate
against one block per slowest stage; latency that of a block alone, from its audio to its pictures; the AAS gap the longest
time between two blocks around the new sink of block 4, in units of the slowest stage.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from liveavatar import config as configs
from liveavatar.core import Geometry
from liveavatar.generate import Job, generate
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.launchers import launch
from liveavatar.runtime.placement import cut

from measured import HERE, earlier, parser_of, show, write

FIXED = {"condition": 0.01, **{f"step{k}": 0.15 for k in range(4)}, "decode": 0.06}  # seconds; a chain of H200s in shape
PREFILL = 0.10  # seconds a step needs for a new sink
FIXED_BLOCKS, REFRESH_BLOCK, ALONE = 40, 4, 8
COLUMNS = {"ranks": "d", "launcher": "", "fps": ".1f", "first_frame_seconds": ".2f", "loading_seconds": ".1f"}
FIXED_COLUMNS = {"ranks": "d", "launcher": "", "slowest_ms": ".1f", "period_ms": ".2f", "efficiency": ".3f", "latency_ms": ".1f", "pass_ms": ".1f",
                 "aas_gap": ".2f"}  # fmt: skip


def measure(base: configs.Config, ranks: int, launcher: str, seconds: float) -> dict:
    """One generation with `ranks` ranks: rates and waits."""
    launcher = "inproc" if ranks == 1 else launcher
    run = replace(base, stages=cut(base.chain, ranks), runtime=replace(base.runtime, launcher=launcher))
    with tempfile.TemporaryDirectory() as folder:
        done = generate(run, Job(out=Path(folder) / "bench.mp4", length=seconds))
    return {"ranks": ranks, "launcher": launcher, "frames": done.pictures, "size": [done.width, done.height],
            "fps": round(done.rate, 2), "first_frame_seconds": round(done.wait, 3), "loading_seconds": round(done.loading, 2)}


# ---------------------------------------------------------------- stages of fixed cost


def measure_fixed(ranks: int, launcher: str) -> dict:
    """A chain of sleeping stages: rate against the slowest, latency of a block alone, gap at the new sink."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from toy_roles import FixedSource

    base = configs.Config()
    stages = cut(base.chain, ranks, FIXED)
    config = replace(base, stages=stages, runtime=replace(base.runtime, launcher=launcher, sessions=2))
    ready, alone = asyncio.run(_run_fixed(config, FixedSource(FIXED, PREFILL)))
    slowest, first, last = max(sum(FIXED[role] for role in stage) for stage in stages), len(ready) // 4, len(ready) - ranks - 1
    period, gaps = (ready[last] - ready[first]) / (last - first), np.diff(ready[: REFRESH_BLOCK + 4])
    one_pass = sum(FIXED.values())
    return {"ranks": ranks, "launcher": launcher, "slowest_ms": round(1000 * slowest, 1), "period_ms": round(1000 * period, 2),
            "efficiency": round(slowest / period, 4), "latency_ms": round(1000 * float(np.median(alone)), 1),
            "pass_ms": round(1000 * one_pass, 1), "aas_gap": round(float(gaps.max()) / slowest, 3)}


async def _run_fixed(config: configs.Config, source) -> tuple[list[float], list[float]]:
    """Times at which blocks of a full pipe come out, and seconds of single blocks."""
    head = SimpleNamespace(geometry=Geometry(height=64, width=64), lookahead_samples=0, refresh_block=REFRESH_BLOCK)
    engine = Engine.over(config, head, await asyncio.to_thread(launch, config, source=source))
    picture, block = torch.zeros(3, 64, 64, dtype=torch.uint8), np.ones(head.geometry.samples_per_block, np.float32)
    try:
        session, alone = await engine.open(picture), []
        for _ in range(ALONE):
            began = time.monotonic()
            await session.push_audio(block)
            await anext(session)
            alone.append(time.monotonic() - began)
        await session.close()
        session = await engine.open(picture)
        pushing = asyncio.create_task(session.push_audio(np.tile(block, FIXED_BLOCKS)))
        ready = [(await anext(session), time.monotonic())[1] for _ in range(FIXED_BLOCKS)]
        await pushing
        return ready, alone[:REFRESH_BLOCK] + alone[REFRESH_BLOCK + 1 :]  # the block of the new sink is another matter
    finally:
        await engine.aclose()


def main() -> None:
    parser = parser_of(__doc__, "pipeline.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--launcher", nargs="+", default=["local"], help="several only with --fixed")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--fixed", action="store_true", help="stages that sleep: the cost of everything but the models")
    args = parser.parse_args()
    base = configs.load(args.config)
    if args.fixed:
        rows = [measure_fixed(n, launcher) for launcher in args.launcher for n in args.ranks]
    else:
        measure(base, 1, "inproc", 0.5)  # page cache and kernels warm
        rows = [measure(base, n, args.launcher[0], args.seconds) for n in args.ranks]
    columns, compared = (FIXED_COLUMNS, ("efficiency",)) if args.fixed else (COLUMNS, ("fps",))
    show("the chain", rows, columns, ("ranks", "launcher"), earlier(args.compare, ("ranks", "launcher")), compared)
    out = args.out.with_name("pipeline-fixed.json") if args.fixed and args.out == parser.get_default("out") else args.out
    write(out, config=asdict(base), rows=rows)


if __name__ == "__main__":
    main()
