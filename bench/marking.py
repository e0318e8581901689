"""The watermark measured: what it costs, how visible it is, what it survives, and what it says of unmarked video.

    PYTHONPATH=. .venv/bin/python bench/marking.py --video out/demo.mp4

The video: one of ours, unmarked. Each case marks pictures, lets the server's own encoder (x264, constrained baseline,
veryfast) and what the case names work on them, and reads every 25 pictures by themselves. A second clip, the
embedded portrait swaying before a noisy camera, is harder than anything the avatar shows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image
from measured import parser_of, write

from liveavatar.generate import PORTRAIT
from liveavatar.serving import spread, watermark
from liveavatar.serving.encoder import VideoEncoder
from liveavatar.serving.packets import TICK_SAMPLES, Tick
from liveavatar.serving.settings import MediaConfig
from liveavatar.serving.watermark import Detector, Watermark

KEY, PAYLOAD = hashlib.sha256(b"bench").digest(), 0xDEADBEEF
WINDOW = 25  # pictures to a reading
Pictures = list[np.ndarray]


@dataclass(frozen=True)
class Case:
    """size: of the pictures when they are marked. rate: bit/s. scale: media.scale. then: what happens to the decoded pictures. deep: every size is tried."""

    name: str
    clip: str
    size: int
    rate: int
    scale: int = 1
    then: Callable[[Pictures], Pictures] = lambda pictures: pictures
    deep: bool = False


def sized(width: int, height: int) -> Callable[[Pictures], Pictures]:
    return lambda pictures: [np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC)) for p in pictures]


def cropped(share: float) -> Callable[[Pictures], Pictures]:
    """The middle of the picture, moved by an odd number of pixels."""
    def cut(pictures: Pictures) -> Pictures:
        size = len(pictures[0])
        edge, kept = round(size * (1 - share) / 2), round(size * share)
        return [p[edge + 3 :, max(0, edge - 5) :][: kept - 3, :kept] for p in pictures]

    return cut


def turned(degrees: float) -> Callable[[Pictures], Pictures]:
    return lambda pictures: [np.asarray(Image.fromarray(p).rotate(degrees, Image.Resampling.BICUBIC)) for p in pictures]


def coded(pictures: Pictures, rate: int, scale: int = 1) -> Pictures:
    """What a viewer of the server's H.264 sees."""
    height, width = pictures[0].shape[:2]
    encoder, decoder = VideoEncoder(width, height, MediaConfig(encoder="libx264", bitrate=rate, scale=scale)), av.CodecContext.create("h264", "r")
    sound, seen, size = np.zeros(TICK_SAMPLES, np.int16), [], 0
    for index, picture in enumerate(pictures):
        for packet in encoder.encode(Tick(index, 0, "speech", picture, sound), 0.0):
            size += len(packet.data)
            seen += decoder.decode(av.Packet(packet.data))
    coded.rate = size * 8 * 25 / len(pictures)  # bit/s that were really used
    return [frame.to_ndarray(format="rgb24") for frame in (*seen, *decoder.decode(None))]


CASES = (
    *(Case(f"avatar 512, {r / 1e6:g} Mb/s", "avatar", 512, int(r)) for r in (1.5e6, 0.8e6, 0.4e6)),
    *(Case(f"avatar 512, {r / 1e6:g} Mb/s, then to 384", "avatar", 512, int(r), then=sized(384, 384)) for r in (1.5e6, 0.8e6, 0.4e6)),
    *(Case(f"avatar 128, {r / 1e6:g} Mb/s", "avatar", 128, int(r)) for r in (0.8e6, 0.4e6, 0.1e6, 0.05e6)),
    *(Case(f"avatar 128, media.scale 4, {r / 1e6:g} Mb/s", "avatar", 128, int(r), 4) for r in (1.5e6, 0.8e6, 0.4e6, 0.1e6)),
    Case("avatar 128, media.scale 4, 0.4 Mb/s, then to 384", "avatar", 128, 400_000, 4, sized(384, 384)),
    *(Case(f"camera 512, {r / 1e6:g} Mb/s", "camera", 512, int(r)) for r in (1.5e6, 0.8e6, 0.4e6)),
    Case("camera 512, 0.4 Mb/s, then to 384", "camera", 512, 400_000, then=sized(384, 384)),
    Case("camera 128, 0.1 Mb/s", "camera", 128, 100_000),
    Case("camera 512, 0.8 Mb/s, coded again at 0.4", "camera", 512, 800_000, then=lambda p: coded(p, 400_000)),
    *(Case(f"avatar 512, 0.8 Mb/s, {share:.0%} cut out of it", "avatar", 512, 800_000, then=cropped(share)) for share in (0.9, 0.5, 0.25)),
    Case("avatar 128, 0.4 Mb/s, 75% cut out of it", "avatar", 128, 400_000, then=cropped(0.75)),
    Case("avatar 512, 0.8 Mb/s, shifted by 13 and 37", "avatar", 512, 800_000, then=lambda pictures: [np.roll(p, (13, 37), (0, 1)) for p in pictures]),
    Case("avatar 512, 0.8 Mb/s, 90% cut out, then to 512", "avatar", 512, 800_000, then=lambda p: sized(512, 512)(cropped(0.9)(p))),
    Case("the same, read with --deep", "avatar", 512, 800_000, then=lambda p: sized(512, 512)(cropped(0.9)(p)), deep=True),
    Case("avatar 512, 0.4 Mb/s, 70% cut out, then to 480, read with --deep", "avatar", 512, 400_000, then=lambda p: sized(480, 480)(cropped(0.7)(p)), deep=True),
    Case("avatar 512, 0.8 Mb/s, wider by 10%", "avatar", 512, 800_000, then=sized(563, 512)),
    Case("avatar 512, 0.8 Mb/s, turned by 0.5 degrees", "avatar", 512, 800_000, then=turned(0.5)),
    Case("avatar 512, 0.8 Mb/s, turned by 2 degrees", "avatar", 512, 800_000, then=turned(2)),
    Case("avatar 512, 0.8 Mb/s, mirrored", "avatar", 512, 800_000, then=lambda pictures: [np.ascontiguousarray(p[:, ::-1]) for p in pictures]),
)  # fmt: skip


def avatar(video: Path, count: int) -> Pictures:
    with av.open(str(video)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return pictures[: min(count, len(pictures)) // WINDOW * WINDOW]


def camera(count: int) -> Pictures:
    """uint8 [512, 512, 3]: the portrait turns and moves a few pixels; noise of 3 levels."""
    rng, image = np.random.default_rng(0), Image.open(PORTRAIT).convert("RGB").resize((512, 512))
    made = []
    for t in range(count):
        moved = image.rotate(1.5 * np.sin(t / 9), Image.Resampling.BICUBIC, translate=(3 * np.sin(t / 7), 2 * np.cos(t / 5)))
        made.append(np.clip(np.asarray(moved) + rng.normal(0, 3, (512, 512, 3)), 0, 255).astype(np.uint8))
    return made


def readings(pictures: Pictures, detect: Callable[[], Detector]) -> list[watermark.Reading]:
    found = []
    for at in range(0, len(pictures) - WINDOW + 1, WINDOW):
        detector = detect()
        for picture in pictures[at : at + WINDOW]:
            detector.add(picture)
        found.append(detector.read())
    return found


def psnr(one: Pictures, other: Pictures) -> float:
    return float(np.mean([10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)) for a, b in zip(one, other)]))


def survival(case: Case, clips: dict[str, Pictures]) -> dict:
    """One row of the table."""
    plain = sized(case.size, case.size)(clips[case.clip])
    mark = Watermark(KEY, PAYLOAD, case.size, case.size)
    marked = [mark.mark(picture) for picture in plain]
    seen = coded(marked, case.rate, case.scale)
    used = coded.rate
    then = case.then(seen)
    if case.deep:
        got = readings(then[: 2 * WINDOW], lambda: Detector(KEY, watermark.deep_heights(len(then[0]))))
    else:
        got = readings(then, lambda: Detector(KEY))
    right = np.mean([32 - (r.payload ^ PAYLOAD).bit_count() for r in got]) / 32
    return {"case": case.name, "mark_psnr_db": round(psnr(plain[:25], marked[:25]), 2), "used_mbps": round(used / 1e6, 3), "readings": len(got),
            "found": sum(r.found for r in got), "payload_right": sum(r.found and r.payload == PAYLOAD for r in got), "bits_right": round(float(right), 4),
            "z_least": round(min(r.z for r in got), 1), "z_needed": round(got[0].needed, 1)}  # fmt: skip


def unmarked(clips: dict[str, Pictures], keys: int) -> dict:
    """The largest correlation over keys, on video without a mark."""
    z = []
    for pictures in (clips["avatar"][:WINDOW], coded(sized(512, 512)(clips["avatar"][:WINDOW]), 800_000), clips["camera"][:WINDOW]):
        detector = Detector(KEY)
        for picture in pictures:
            detector.add(picture)
        needed = detector.read().needed
        for n in range(keys):
            detector._chips = spread.Chips.of(hashlib.sha256(b"other %d" % n).digest())  # what was seen does not depend on the key
            z.append(detector.read().z)
    return {"readings": len(z), "z_mean": round(float(np.mean(z)), 2), "z_most": round(max(z), 2), "z_needed": round(needed, 2), "found": sum(v >= needed for v in z)}


def milliseconds(work: Callable[[], object], times: int = 30) -> float:
    """The median of `times` calls."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return round(float(np.median(took)) * 1e3, 2)


def cost(clips: dict[str, Pictures]) -> dict:
    """ms on one core: marking a picture, reading 25."""
    rows = {}
    for size in (128, 512):
        pictures, mark = sized(size, size)(clips["avatar"][:WINDOW]), Watermark(KEY, PAYLOAD, size, size)
        rows[str(size)] = {"mark_ms": milliseconds(lambda: mark.mark(pictures[0])), "read_25_ms": milliseconds(lambda: readings(pictures, lambda: Detector(KEY)), 3)}
    return rows


def main() -> None:
    parser = parser_of(__doc__, "watermark.json", compare=False)
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--keys", type=int, default=200)
    args = parser.parse_args()
    clips = {"avatar": avatar(args.video, args.pictures), "camera": camera(args.pictures // WINDOW * WINDOW)}
    config = {name: getattr(watermark, name) for name in ("FALSE_ALARM", "STRENGTH", "FLAT", "BUSY", "USUAL", "GROUP", "HEIGHTS")}
    result = {"video": args.video.name, "video_sha256": hashlib.sha256(args.video.read_bytes()).hexdigest(),
              "config": config, "cost": cost(clips), "survival": [], "unmarked": None}  # fmt: skip
    for case in CASES:
        result["survival"].append(survival(case, clips))
        print(json.dumps(result["survival"][-1]), flush=True)
    result["unmarked"] = unmarked(clips, args.keys)
    print(result["unmarked"], result["cost"])
    write(args.out, **result)


if __name__ == "__main__":
    main()
