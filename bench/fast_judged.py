"""What a fast path changes that a viewer could notice: `evaluate video`'s measures of the embedded avatar, each fast path against the plain one.

    python bench/fast_judged.py                         # 8 s, three seeds, every path a CPU has but compile
    python bench/fast_judged.py --ways compiled --seeds 0 1 --seconds 7

The portrait says the recording through `liveavatar generate`, once for each way and seed, and every clip is judged by itself. Noise is
what the seed alone does: the widest gap between two plain clips. A measure is "within" where the mean over seeds of what the path
changes is no more than that. FP8 runs by its dequantising reference where there are no FP8 units: the rounding is the same.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from liveavatar import config as configs
from liveavatar.config import Config, FastConfig
from liveavatar.evaluation.judge import judge_video
from liveavatar.generate import PORTRAIT, Job, generate

from measured import parser_of, show, write

WAYS = {"packed": FastConfig(packed_qkv=True), "fp8": FastConfig(fp8=True), "packed fp8": FastConfig(packed_qkv=True, fp8=True),
        "fp8 cache": FastConfig(fp8_cache=True), "fp8 attention": FastConfig(fp8_cache=True, attention="fp8"),
        "compiled": FastConfig(compile=True)}  # fmt: skip
COLUMNS = {"way": "", "measure": "", "plain": ".4g", "value": ".4g", "change": ".2g", "noise": ".2g", "within": ""}


def judged(config: Config, fast: FastConfig, seed: int, seconds: float) -> dict[str, float]:
    """Measures of one clip by name, those that have a value."""
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        generate(replace(config, seed=seed, model=replace(config.model, fast=fast)), Job(out=clip, length=seconds))
        return {m.name: m.value for m in judge_video(clip, portrait=PORTRAIT) if m.measured}


def rows_of(way: str, found: list[dict[str, float]], plain: list[dict[str, float]]) -> list[dict]:
    """A row for each measure that every clip has. found, plain: a clip for each seed, in the same order."""
    rows = []
    for name in sorted(set.intersection(*map(set, [*found, *plain]))):
        values = [clip[name] for clip in plain]
        change, noise = statistics.mean(a[name] - b for a, b in zip(found, values)), max(values) - min(values)
        rows.append({"way": way, "measure": name, "plain": statistics.mean(values), "value": statistics.mean(clip[name] for clip in found),
                     "change": change, "noise": noise, "within": abs(change) <= noise})  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "fast-judged.json", compare=False)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["packed", "fp8", "packed fp8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two at least: without a second there is no noise to compare with")
    parser.add_argument("--seconds", type=float, default=8.0, help="of speech; lip sync needs 5 s of it that are loud")
    parser.add_argument("--config", type=Path)
    args = parser.parse_args(arguments)
    if len(args.seeds) < 2:
        parser.error("--seeds: give two at least")
    config = configs.load(args.config)
    clips = {way: [judged(config, fast, seed, args.seconds) for seed in args.seeds]
             for way, fast in {"plain": config.model.fast, **{way: WAYS[way] for way in args.ways}}.items()}
    rows = [row for way in args.ways for row in rows_of(way, clips[way], clips["plain"])]
    show("the embedded avatar judged", rows, COLUMNS)
    outside = [f"{row['way']}: {row['measure']}" for row in rows if not row["within"]]
    print("beyond the noise of the seed:", ", ".join(outside) or "nothing")
    write(args.out, config={"model": config.model.path, "seeds": args.seeds, "seconds": args.seconds}, rows=rows, clips=clips)


if __name__ == "__main__":
    main()
