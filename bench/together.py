"""What blocks that move together gain: a shift register over the steps of a rank, and sessions batched at a step.

    PYTHONPATH=. python bench/together.py --sessions 1 2 4 --blocks 12 --repeats 3 [--ranks 1] [--config C] [--compare OLD.json]

Offline sessions on one chain (the embedded avatar or --config), as fast as it goes: pictures per second of all of them, with and
without runtime.shift_register and runtime.batch; the ways of running take turns, and the best of the repeats counts. cpu_ms is
what this process computed for a block, which a neighbour on the machine changes less (with --threads 1 and in process; its gain
is the one to believe on a shared machine). alone_ms: the latency of a block that has no company, from its sound to its pictures.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from measured import earlier, parser_of, show, write

from liveavatar import config as configs
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.placement import cut

ALONE = 5  # blocks one after the other
COLUMNS = {"sessions": "d", "way": "", "fps": ".1f", "gain": ".2f", "cpu_ms": ".1f", "cpu_gain": ".2f", "alone_ms": ".1f"}


def ways(sessions: int) -> dict[str, dict]:
    """Ways to run so many sessions."""
    made = {"one by one": {}, "shift": {"shift_register": True}}
    if sessions > 1:
        made |= {"batch": {"batch": sessions}, "shift + batch": {"shift_register": True, "batch": sessions}}
    return made


async def rate(engine: Engine, sessions: int, blocks: int) -> tuple[float, float]:
    """(pictures per second of all sessions together, CPU ms of this process a block)."""
    g = engine.geometry
    picture, pcm = torch.full((3, g.height, g.width), 128, dtype=torch.uint8), np.zeros(blocks * g.samples_per_block, np.float32)
    opened = [await engine.open(picture, seed=n) for n in range(sessions)]

    async def through(session) -> int:
        pushing = asyncio.create_task(_speak(session, pcm))
        count = 0
        async for output in session:
            count += len(output.pictures)
        await pushing
        return count

    began, used = time.monotonic(), time.process_time()
    counts = await asyncio.gather(*map(through, opened))
    spent, used = time.monotonic() - began, time.process_time() - used
    for session in opened:
        await session.close()
    return sum(counts) / spent, 1000 * used / (sessions * blocks)


async def _speak(session, pcm: np.ndarray) -> None:
    await session.push_audio(pcm)
    await session.end_audio()


async def alone(engine: Engine) -> float:
    """Median ms of a block without company."""
    g, times = engine.geometry, []
    session = await engine.open(torch.full((3, g.height, g.width), 128, dtype=torch.uint8))
    await session.push_audio(np.zeros(engine.source.lookahead_samples, np.float32))
    for _ in range(ALONE):
        began = time.monotonic()
        await session.push_audio(np.zeros(g.samples_per_block, np.float32))
        await anext(session)
        times.append(time.monotonic() - began)
    await session.close()
    return 1000 * float(np.median(times))


def best(figures: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Highest rate, least CPU, shortest wait: what disturbs a run only ever makes it slower."""
    fps, cpu, wait = zip(*figures)
    return max(fps), min(cpu), min(wait)


async def measure(base: configs.Config, counts: list[int], blocks: int, repeats: int) -> list[dict]:
    """A row per number of sessions and way."""
    rows = []
    for sessions in counts:
        runs = {}
        for _ in range(repeats):
            for name, said in ways(sessions).items():
                config = replace(base, runtime=replace(base.runtime, sessions=max(sessions, 2), **said))
                engine = await Engine.start(config)
                try:
                    await rate(engine, 1, 2)  # warm
                    runs.setdefault(name, []).append((*await rate(engine, sessions, blocks), await alone(engine)))
                finally:
                    await engine.aclose()
        plain = best(runs["one by one"])
        for name, figures in runs.items():
            fps, cpu, wait = best(figures)
            rows.append({"sessions": sessions, "way": name, "fps": round(fps, 1), "gain": round(fps / plain[0], 3), "cpu_ms": round(cpu, 1),
                         "cpu_gain": round(plain[1] / cpu, 3), "alone_ms": round(wait, 1), "all": [[round(v, 1) for v in run] for run in figures]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "together.json")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--launcher", default="inproc")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--config", type=Path)
    args = parser.parse_args(argv)
    base = configs.load(args.config)
    base = replace(base, stages=cut(base.chain, args.ranks), runtime=replace(base.runtime, launcher=args.launcher, threads=args.threads))
    load = os.getloadavg()[0]
    rows = asyncio.run(measure(base, args.sessions, args.blocks, args.repeats))
    show("blocks that move together", rows, COLUMNS, ("sessions", "way"), earlier(args.compare, ("sessions", "way")), ("fps", "cpu_ms"))
    write(args.out, config=asdict(base), rows=rows, load_before=load)


if __name__ == "__main__":
    main()
