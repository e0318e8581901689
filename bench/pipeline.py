"""The chain end to end: frames per second, loading and time to first frame for each number of ranks.

    python bench/pipeline.py --ranks 1 5 --launcher local --seconds 8 [--compare bench/results/pipeline-old.json]

Runs `liveavatar.generate` (the same code as the demo) on the embedded avatar or --config, once per number of
ranks after one warm-up, prints a table and writes JSON with machine, commit and config.

    python bench/pipeline.py --fixed --ranks 1 2 5 --launcher inproc local --slices 1 8

Stages that sleep instead of computing, so that what is measured is ours: links, queues, the head. Blocks carry tensors of the 14B model's
sizes, on the stage's GPU where there is one.

Time to first frame is from opening the session to its first picture; efficiency the rate of a full pipe against one block per slowest
stage (of the real chain: the rank with most work on a block, as its trace has it; tracing waits for a GPU after each role); latency
with --fixed that of a block alone, from its audio to its pictures, of the real chain that of a block in the full pipe, from when it is
sent down; the AAS gap the longest time between two blocks around the new sink, in units of the slowest stage.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from liveavatar import config as configs
from liveavatar.core import Geometry
from liveavatar.evaluation.traces import WARMUP, Stream, read_trace
from liveavatar.generate import Job, generate
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.launchers import launch
from liveavatar.runtime.placement import cut

from measured import HERE, earlier, parser_of, show, write

FIXED = {"condition": 0.01, **{f"step{k}": 0.15 for k in range(4)}, "decode": 0.06}  # seconds; a chain of H200s in shape
PREFILL = 0.10  # seconds a step needs for a new sink
FIXED_BLOCKS, REFRESH_BLOCK, ALONE = 40, 4, 8
PIPE = {"slowest_ms": ".1f", "period_ms": ".2f", "efficiency": ".3f", "latency_ms": ".1f"}
ROW = ("ranks", "launcher", "slices")
COLUMNS = {"ranks": "d", "launcher": "", "fps": ".1f", "first_frame_seconds": ".2f", "loading_seconds": ".1f", **PIPE, "aas_gap": ".2f"}
FIXED_COLUMNS = {"ranks": "d", "launcher": "", "slices": "d", "first_frame_seconds": ".2f", **PIPE, "pass_ms": ".1f", "aas_gap": ".2f"}


def measure(base: configs.Config, ranks: int, launcher: str, seconds: float) -> dict:
    """One generation with `ranks` ranks: rates and waits."""
    launcher = "inproc" if ranks == 1 else launcher
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        run = replace(base, stages=cut(base.chain, ranks), runtime=replace(base.runtime, launcher=launcher, trace=str(trace)))
        done = generate(run, Job(out=Path(folder) / "bench.mp4", length=seconds))
        pipe = pipe_of(read_trace(trace).streams[0], base.sampler.refresh_slices)
    return {"ranks": ranks, "launcher": launcher, "frames": done.pictures, "size": [done.width, done.height],
            "fps": round(done.rate, 2), "first_frame_seconds": round(done.wait, 3), "loading_seconds": round(done.loading, 2), **pipe}  # fmt: skip


def pipe_of(stream: Stream, slices: int = 1) -> dict:
    """What a trace says of the pipe; nothing of a run that is too short. slices: of the new sink, whose step is noted with the last."""
    ready, sent = ({line["block"]: line["t"] for line in stream[event]} for event in ("ready", "admitted"))
    worked: dict[int, Counter] = {}  # rank -> block -> seconds
    for span in stream["span"]:
        if span["block"] is not None and span["block"] >= WARMUP:
            worked.setdefault(span["rank"], Counter())[span["block"]] += span["end"] - span["start"]
    if len(ready) < WARMUP + 2 or not worked:
        return {}
    slowest = max(float(np.median(list(blocks.values()))) for blocks in worked.values())
    times, last = list(ready.values()), len(ready) - len(worked) - 1  # at the end the pipe runs empty
    period = (times[last] - times[WARMUP]) / (last - WARMUP) if last > WARMUP else None
    asked = [step["t"] for step in stream["step"] if step["what"] == "refresh"]
    new = [block for block, t in sent.items() if asked and t >= asked[0]]
    gaps = np.diff(times[max(new[0] - slices, 0) : new[0] + 4]) if new else []
    return {"slowest_ms": round(1000 * slowest, 1), "period_ms": period and round(1000 * period, 2), "efficiency": period and round(slowest / period, 4),
            "latency_ms": round(1000 * float(np.median([t - sent[block] for block, t in ready.items() if block >= WARMUP])), 1),
            "aas_gap": round(float(max(gaps)) / slowest, 3) if len(gaps) else None}  # fmt: skip


# ---------------------------------------------------------------- stages of fixed cost


def measure_fixed(ranks: int, launcher: str, slices: int) -> dict:
    """A chain of sleeping stages: rate against the slowest, latency of a block alone, gap at the new sink."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from toy_roles import FixedSource

    base = configs.Config()
    stages = cut(base.chain, ranks, FIXED)
    config = replace(base, stages=stages, sampler=replace(base.sampler, refresh_slices=slices), runtime=replace(base.runtime, launcher=launcher, sessions=2))
    wait, ready, alone = asyncio.run(_run_fixed(config, FixedSource(FIXED, PREFILL, payload=True)))
    behind = REFRESH_BLOCK + slices
    slowest, first, last = max(sum(FIXED[role] for role in stage) for stage in stages), max(behind, len(ready) // 4), len(ready) - ranks - 1
    period, gaps = (ready[last] - ready[first]) / (last - first), np.diff(ready[: behind + 3])
    one_pass = sum(FIXED.values())
    return {"ranks": ranks, "launcher": launcher, "slices": slices, "first_frame_seconds": round(wait, 3),
            "slowest_ms": round(1000 * slowest, 1), "period_ms": round(1000 * period, 2), "efficiency": round(slowest / period, 4),
            "latency_ms": round(1000 * float(np.median(alone)), 1), "pass_ms": round(1000 * one_pass, 1), "aas_gap": round(float(gaps.max()) / slowest, 3)}


async def _run_fixed(config: configs.Config, source) -> tuple[float, list[float], list[float]]:
    """Seconds to the first picture, times at which blocks of a full pipe come out, and seconds of single blocks."""
    head = SimpleNamespace(geometry=Geometry(height=64, width=64), lookahead_samples=0, refresh_block=REFRESH_BLOCK, framing=None)
    engine = Engine.over(config, head, await asyncio.to_thread(launch, config, source=source))
    picture, block = torch.zeros(3, 64, 64, dtype=torch.uint8), np.ones(head.geometry.samples_per_block, np.float32)
    try:
        opened, first, alone = time.monotonic(), 0.0, []
        session = await engine.open(picture)
        for _ in range(ALONE):
            began = time.monotonic()
            await session.push_audio(block)
            await anext(session)
            alone.append(time.monotonic() - began)
            first = first or time.monotonic() - opened
        await session.close()
        session = await engine.open(picture)
        pushing = asyncio.create_task(session.push_audio(np.tile(block, FIXED_BLOCKS)))
        ready = [(await anext(session), time.monotonic())[1] for _ in range(FIXED_BLOCKS)]
        await pushing
        return first, ready, alone[:REFRESH_BLOCK] + alone[REFRESH_BLOCK + config.sampler.refresh_slices :]  # those of the new sink are another matter
    finally:
        await engine.aclose()


def main() -> None:
    parser = parser_of(__doc__, "pipeline.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--launcher", nargs="+", default=["local"], help="several only with --fixed")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--fixed", action="store_true", help="stages that sleep: the cost of everything but the models")
    parser.add_argument("--slices", type=int, nargs="+", default=[1], help="of the new sink's prefill, with --fixed (sampler.refresh_slices)")
    args = parser.parse_args()
    base = configs.load(args.config)
    if args.fixed:
        rows = [measure_fixed(n, launcher, slices) for launcher in args.launcher for n in args.ranks for slices in args.slices]
    else:
        measure(base, 1, "inproc", 0.5)  # page cache and kernels warm
        rows = [measure(base, n, args.launcher[0], args.seconds) for n in args.ranks]
    columns, compared = (FIXED_COLUMNS, ("efficiency",)) if args.fixed else (COLUMNS, ("fps",))
    show("the chain", rows, columns, ROW, earlier(args.compare, ROW), compared)
    out = args.out.with_name("pipeline-fixed.json") if args.fixed and args.out == parser.get_default("out") else args.out
    write(out, config=asdict(base), rows=rows)


if __name__ == "__main__":
    main()
