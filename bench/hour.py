"""Frames over an hour: the embedded avatar speaks without a pause, and says the same words at every mark.

    PYTHONPATH=. .venv/bin/python bench/hour.py --minutes 60 --ranks 2
    PYTHONPATH=. .venv/bin/python bench/hour.py --minutes 160 --video runs/eval_long/drift.mp4   # of a drift run, which has probes at each minute

Streams through `runtime.Engine`, as fast as the machine can, and keeps five pictures after each mark: a sheet of them
(one row a mark) for people to look at, and JSON with the mean colour at each mark, memory and speed, both written again
at every mark. Nothing is encoded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageDraw
from measured import parser_of, write

from liveavatar import config as configs
from liveavatar.conditioning.identity import load_picture
from liveavatar.conditioning.media import read_audio
from liveavatar.core import FPS, SAMPLE_RATE
from liveavatar.evaluation.clips import VideoFile
from liveavatar.generate import PORTRAIT, SPEECH
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.placement import cut

AFTER = (0.4, 1.2, 2.0, 2.8, 3.6)  # seconds after a mark


def sound(speech: np.ndarray, marks: list[float], seconds: float) -> Iterator[np.ndarray]:
    """The speech over and over, from its beginning at every mark (seconds); pieces of at most a second."""
    edges = [round(m * SAMPLE_RATE) for m in marks] + [round(seconds * SAMPLE_RATE)]
    for start, end in zip(edges, edges[1:]):
        for at in range(start, end, SAMPLE_RATE):
            yield speech[(np.arange(at, min(at + SAMPLE_RATE, end)) - start) % len(speech)]


def resident() -> float:
    """MB of this process and its children."""
    own = psutil.Process()
    return sum(p.memory_info().rss for p in (own, *own.children(recursive=True))) / 1e6


async def stream(config: configs.Config, portrait: Path, marks: list[float], seconds: float, passed: Callable) -> None:
    """passed: called at every mark with the wanted pictures by number so far and the log of all marks."""
    speech, wanted, log = np.concatenate(list(read_audio(SPEECH))), {}, []
    numbers = {round((m + a) * FPS) for m in marks for a in AFTER}
    engine = await Engine.start(config)
    session = await engine.open(load_picture(portrait), prompt=config.prompt, seed=config.seed)

    async def speak():
        for pcm in sound(speech, marks, seconds):
            await session.push_audio(pcm, rate=SAMPLE_RATE)
        await session.end_audio()

    speaking, began, shown = asyncio.create_task(speak()), time.monotonic(), 0
    async for out in session:
        wanted |= {shown + i: picture.copy() for i, picture in enumerate(out.pictures) if shown + i in numbers}
        for mark in (m for m in marks if shown <= round((m + AFTER[-1]) * FPS) < shown + len(out.pictures)):
            elapsed = time.monotonic() - began
            log.append({"minute": float(mark / 60), "wall_seconds": round(elapsed, 1), "fps": round(shown / elapsed, 1),
                        "resident_mb": round(resident(), 1)})
            passed(wanted, log)
        shown += len(out.pictures)
    await speaking
    await engine.aclose()


def looked_up(video: Path, marks: list[float]) -> dict[int, np.ndarray]:
    """The pictures after each mark of a video that is there."""
    numbers = {round((m + a) * FPS) for m in marks for a in AFTER}
    seen = ((round(at * FPS), picture) for m in marks for at, picture in VideoFile(video).frames(m, m + AFTER[-1] + 0.5))
    return {number: picture for number, picture in seen if number in numbers}


def sheet(wanted: dict[int, np.ndarray], marks: list[float]) -> Image.Image:
    """One row a mark, its minute written beside."""
    rows = [np.concatenate([wanted[round((m + a) * FPS)] for a in AFTER], axis=1) for m in marks]
    made = Image.new("RGB", (rows[0].shape[1] + 60, sum(r.shape[0] for r in rows)), "white")
    draw = ImageDraw.Draw(made)
    for i, (mark, row) in enumerate(zip(marks, rows)):
        made.paste(Image.fromarray(row), (60, i * row.shape[0]))
        draw.text((6, i * row.shape[0] + row.shape[0] // 2), f"{mark / 60:g} min", fill="black")
    return made


def with_colours(wanted: dict[int, np.ndarray], marks: list[float], log: list[dict]) -> list[dict]:
    """The log, a row a mark, with mean colours (0..255) and their mean distance to those of the first mark."""
    colours = [np.mean([wanted[round((m + a) * FPS)].mean((0, 1)) for a in AFTER], axis=0) for m in marks]
    return [{**row, "mean_rgb": [round(float(v), 2) for v in colour], "colour_change": round(float(np.abs(colour - colours[0]).mean()), 2)}
            for row, colour in zip(log, colours)]


def main() -> None:
    parser = parser_of(__doc__, "hour.json", compare=False)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=10, help="minutes between marks")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--portrait", type=Path, default=PORTRAIT)
    parser.add_argument("--video", type=Path, help="look at this one, instead of making one")
    args = parser.parse_args()
    marks = [60 * m for m in np.arange(0, args.minutes + 1e-6, args.every)]
    if args.video:
        wanted, log = looked_up(args.video, marks), [{"minute": float(mark / 60)} for mark in marks]
        write(args.out, video=str(args.video), minutes=args.minutes, marks=with_colours(wanted, marks, log))
        return sheet(wanted, marks).save(args.out.with_suffix(".jpg"), quality=88)
    base = configs.load(args.config)
    launcher = "inproc" if args.ranks == 1 else "local"
    config = replace(base, stages=cut(base.chain, args.ranks), runtime=replace(base.runtime, sessions=1, launcher=launcher))
    seconds = 60 * args.minutes + AFTER[-1] + 0.5

    def passed(wanted: dict[int, np.ndarray], log: list[dict]) -> None:
        reached = marks[: len(log)]
        write(args.out, complete=reached == marks, ranks=args.ranks, minutes=args.minutes, marks=with_colours(wanted, reached, log))
        sheet(wanted, reached).save(args.out.with_suffix(".jpg"), quality=88)
        print(log[-1], flush=True)

    asyncio.run(stream(config, args.portrait, marks, seconds, passed))


if __name__ == "__main__":
    main()
