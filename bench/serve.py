"""Sessions per chain: how many live sessions one chain holds in real time, with encoders, clocks and speech.

    PYTHONPATH=. python bench/serve.py --sessions 1 2 4 --seconds 20 [--engine testcard] [--set engine.runtime.batch=4] [--compare OLD.json]

One studio (liveavatar.serving.studio), as the server runs it; its admission and its ladder are set aside, so that overload is seen. Every
session has a viewer that takes H.264 and Opus and is spoken through: three seconds of sound at once, as a voice that is faster
than real time gives them, then two of silence. Of the time after --settle: underrun is the share of ticks without a fresh
picture, turn the time from pushed sound to its first picture, late how far ticks were behind their clock. "holds" is an
underrun below 1 % and no clock set anew.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from measured import earlier, parser_of, show, write

from liveavatar import config as configs
from liveavatar.core import SAMPLE_RATE
from liveavatar.serving.live import LiveSession
from liveavatar.serving.packets import H264, OPUS
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ENGINES, ServeConfig
from liveavatar.serving.studio import Studio

SPOKEN, PAUSE = 3.0, 2.0  # seconds
HOLDS = 0.01  # share of ticks without a fresh picture
COLUMNS = {"sessions": "d", "underrun": ".4f", "worst_underrun": ".4f", "turn_p50_ms": ".0f", "turn_p95_ms": ".0f", "late_p95_ms": ".0f", "fps": ".2f",
           "cores": ".2f", "holds": ""}  # fmt: skip


class Viewer:
    """Takes what a browser takes and counts it."""

    def __init__(self):
        self.name, self.wants, self.packets, self.bytes = "bench", frozenset((H264, OPUS)), 0, 0

    def put(self, packet) -> None:
        self.packets, self.bytes = self.packets + 1, self.bytes + len(packet.data)

    def flush(self, epoch: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


class Watch:
    """One session under load: turns it took and ticks it was shown since `begin`."""

    def __init__(self, live: LiveSession):
        self.live, self.turns, self.late = live, [], []
        self._before = None

    def begin(self) -> None:
        g, self.turns, self.late = self.live.gauges, [], []
        self._before = dict(g.kinds), self.live.stats()["reanchors"]

    async def speak(self) -> None:
        """Utterance after utterance, until cancelled."""
        tone = (6000 * np.sin(np.arange(round(SPOKEN * SAMPLE_RATE)) * 2 * np.pi * 220 / SAMPLE_RATE)).astype(np.int16)
        while True:
            self.live.gauges.first_frame_seconds = None
            await self.live.push_audio(tone, SAMPLE_RATE, end=True)
            ends = self.live.clock() + SPOKEN + PAUSE
            while self.live.clock() < ends:
                await asyncio.sleep(0.05)
                self.late.append(self.live.gauges.late)
            if self.live.gauges.first_frame_seconds is not None:
                self.turns.append(self.live.gauges.first_frame_seconds)

    def figures(self) -> tuple[int, int, int]:
        """(ticks, those without a fresh picture, clocks set anew) since begin()."""
        (kinds, reanchors), now = self._before, self.live.gauges.kinds
        ticks = sum(now.values()) - sum(kinds.values())
        return ticks, now["filler"] - kinds["filler"], self.live.stats()["reanchors"] - reanchors


async def measure(studio: Studio, sessions: int, seconds: float, settle: float) -> dict:
    """So many sessions at once for so long."""
    g = studio.engine.geometry
    picture = torch.randint(0, 256, (3, g.height, g.width), dtype=torch.uint8)
    watches = [Watch(await studio.open(Role(avatar="bench", picture=picture, seed=n))) for n in range(sessions)]
    viewers = [Viewer() for _ in watches]
    for watch, viewer in zip(watches, viewers):
        watch.live.add_sink(viewer)
    speaking = []
    for watch in watches:  # not in step: people do not speak in chorus
        speaking.append(asyncio.create_task(watch.speak()))
        await asyncio.sleep((SPOKEN + PAUSE) / sessions)
    await asyncio.sleep(settle)
    for watch in watches:
        watch.begin()
    used, began = cpu_seconds(), studio.clock()
    await asyncio.sleep(seconds)
    figures, spent = [watch.figures() for watch in watches], (cpu_seconds() - used) / (studio.clock() - began)
    for task in speaking:
        task.cancel()
    await asyncio.gather(*speaking, return_exceptions=True)
    for watch in watches:
        await watch.live.close()
    ticks, missed, anew = (sum(column) for column in zip(*figures))
    turns, late = [t for w in watches for t in w.turns], [s for w in watches for s in w.late]
    return {"sessions": sessions, "underrun": round(missed / max(1, ticks), 4), "worst_underrun": round(max(m / max(1, t) for t, m, _ in figures), 4),
            "turn_p50_ms": at(turns, 50), "turn_p95_ms": at(turns, 95), "late_p95_ms": at(late, 95), "fps": round(ticks / sessions / seconds, 2),
            "clocks_set_anew": anew, "cores": round(spent, 2), "kbit_s": round(sum(v.bytes for v in viewers) * 8 / 1000 / sessions / (seconds + settle)),
            "holds": missed / max(1, ticks) < HOLDS and not anew}


def at(values: list[float], percentile: float) -> float | None:
    """ms, None where nothing was measured."""
    return round(1000 * float(np.percentile(values, percentile)), 1) if values else None


def cpu_seconds() -> float:
    """Of this process and its ranks."""
    own = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (own, *own.children(recursive=True)))


async def run(config: ServeConfig, counts: list[int], seconds: float, settle: float) -> tuple[dict, list[dict]]:
    """(what the studio measured and would let in, a row per number of sessions)."""
    studio = Studio(config)
    await studio.start()
    admits = {"factor": round(studio.factor, 2), "admits": max(1, math.floor(studio.factor * (1 - config.sessions.headroom)))}
    studio.capacity = max(counts)
    try:
        rows = []
        for count in counts:
            rows.append(await measure(studio, count, seconds, settle))
            print(json.dumps(rows[-1]), flush=True)
        return admits, rows
    finally:
        await studio.aclose()


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "serve.json")
    parser.add_argument("--engine", choices=ENGINES, default="model")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--settle", type=float, default=5.0)
    parser.add_argument("--config", type=Path, help="of `liveavatar serve`")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    args = parser.parse_args(argv)
    config = replace(configs.load(args.config, args.overrides, ServeConfig), engine_kind=args.engine)
    room = max(config.engine.runtime.sessions, max(args.sessions))
    config = replace(config, engine=replace(config.engine, runtime=replace(config.engine.runtime, sessions=room)),
                     sessions=replace(config.sessions, degrade=False))
    load = os.getloadavg()[0]
    admits, rows = asyncio.run(run(config, args.sessions, args.seconds, args.settle))
    title = f"{admits['factor']}x real time for one session alone; admission would let in {admits['admits']}"
    show(title, rows, COLUMNS, ("sessions",), earlier(args.compare, ("sessions",)), ("underrun", "turn_p95_ms"))
    write(args.out, config=asdict(config), rows=rows, load_before=load, **admits)


if __name__ == "__main__":
    main()
