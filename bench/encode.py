"""What encoding costs: milliseconds per picture and per tick of sound, as serving does it (serving.md 7.4).

    PYTHONPATH=. .venv/bin/python bench/encode.py --out bench/results/encode-cpu2.json

The embedded portrait, scaled to each size, sways a little and carries some noise, like a face that speaks.
"""

from __future__ import annotations

import time

import numpy as np
from PIL import Image
from measured import parser_of, write

from liveavatar.core import FPS
from liveavatar.generate import PORTRAIT
from liveavatar.serving.encoder import AacEncoder, OpusEncoder, VideoEncoder
from liveavatar.serving.packets import SOUND_RATE, TICK_SAMPLES, Tick
from liveavatar.serving.settings import MediaConfig

SIZES = ((128, 128, 1), (128, 128, 4), (512, 512, 1), (1280, 720, 1))  # of what goes in, and media.scale
PRESETS = ("ultrafast", "veryfast")
SWAY = 6  # pixels


def pictures(width: int, height: int, count: int) -> list[np.ndarray]:
    """uint8 [height, width, 3] each."""
    rng = np.random.default_rng(0)
    large = np.asarray(Image.open(PORTRAIT).convert("RGB").resize((width + 2 * SWAY, height + 2 * SWAY))).astype(np.int16)
    found = []
    for n in range(count):
        x, y = (SWAY + round(SWAY * f(2 * np.pi * n / period)) for f, period in ((np.sin, 40), (np.cos, 70)))
        found.append((large[y : y + height, x : x + width] + rng.integers(-2, 3, (height, width, 3))).clip(0, 255).astype(np.uint8))
    return found


def milliseconds(work, items) -> dict:
    """Of work(item): p50 and p95 on the wall, which others on this machine share, and p50 of what its thread computed."""
    wall, own = [], []
    for item in items:
        start, cpu = time.perf_counter(), time.thread_time()
        work(item)
        wall.append((time.perf_counter() - start) * 1e3)
        own.append((time.thread_time() - cpu) * 1e3)
    p50, p95 = np.percentile(wall[1:], (50, 95))  # the first opens tables
    return {"p50_ms": round(p50, 3), "p95_ms": round(p95, 3), "cpu_p50_ms": round(float(np.percentile(own[1:], 50)), 3)}


def video(width: int, height: int, scale: int, preset: str, count: int) -> dict:
    """One row: colour conversion (with scaling) alone, and all of encode()."""
    encoder, size = VideoEncoder(width, height, MediaConfig(preset=preset, scale=scale)), 0
    ticks = [Tick(index=n, epoch=0, kind="speech", picture=p, sound=np.zeros(0, np.int16)) for n, p in enumerate(pictures(width, height, count))]

    def encode(tick: Tick) -> None:
        nonlocal size
        size += sum(len(packet.data) for packet in encoder.encode(tick, 0.0))

    row = {"size": [encoder.width, encoder.height], "scale": scale, "encoder": encoder.name, "preset": preset,
           "convert": milliseconds(encoder._frame, [t.picture for t in ticks]), "encode": milliseconds(encode, ticks)}  # fmt: skip
    return row | {"kbit_s": round(size * 8 / 1000 / (count / FPS))}


def sound(make, count: int) -> dict:
    """One row: a tick of sound, which is 40 ms."""
    encoder, rng = make(MediaConfig()), np.random.default_rng(0)
    wave = np.sin(2 * np.pi * 220 * np.arange(count * TICK_SAMPLES) / SOUND_RATE) * 8000 + rng.normal(0, 300, count * TICK_SAMPLES)
    ticks = [Tick(index=n, epoch=0, kind="speech", picture=np.zeros(0, np.uint8), sound=part) for n, part in
             enumerate(wave.astype(np.int16).reshape(count, TICK_SAMPLES))]  # fmt: skip
    return {"codec": encoder.codec, "encode": milliseconds(encoder.encode, ticks)}


def main() -> None:
    parser = parser_of(__doc__, "encode.json", compare=False)
    parser.add_argument("--pictures", type=int, default=150)
    options = parser.parse_args()
    rows = [video(*size, preset, options.pictures) for size in SIZES for preset in PRESETS]
    for r in rows:
        width, height = r["size"]
        print(f"{width:>5}x{height:<4} scale {r['scale']} {r['preset']:>9}: convert {r['convert']['cpu_p50_ms']:6.2f} ms of CPU, all "
              f"{r['encode']['cpu_p50_ms']:6.2f} (wall p50 {r['encode']['p50_ms']:6.2f}, p95 {r['encode']['p95_ms']:6.2f}), {r['kbit_s']} kbit/s")  # fmt: skip
    sounds = [sound(make, options.pictures) for make in (OpusEncoder, AacEncoder)]
    for r in sounds:
        print(f"{r['codec']}: {r['encode']['cpu_p50_ms']:.2f} ms of CPU per 40 ms (wall p95 {r['encode']['p95_ms']:.2f})")
    write(options.out, pictures=options.pictures, video=rows, sound=sounds)


if __name__ == "__main__":
    main()
