"""The chain end to end: frames per second, loading and time to first frame for each number of ranks.

    python bench/pipeline.py --ranks 1 5 --launcher local --seconds 8 [--compare bench/results/pipeline-old.json]

Runs `liveavatar.generate` (the same code as the demo) on the embedded avatar or --config, once per number of
ranks after one warm-up, prints a table and writes JSON with machine, commit and config.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from liveavatar import config as configs
from liveavatar.generate import Job, generate
from liveavatar.runtime.placement import cut

from measured import HERE, commit, machine


def measure(base: configs.Config, ranks: int, launcher: str, seconds: float) -> dict:
    """One generation with `ranks` ranks: rates and waits."""
    launcher = "inproc" if ranks == 1 else launcher
    run = replace(base, stages=cut(base.chain, ranks), runtime=replace(base.runtime, launcher=launcher))
    with tempfile.TemporaryDirectory() as folder:
        done = generate(run, Job(out=Path(folder) / "bench.mp4", length=seconds))
    return {"ranks": ranks, "launcher": launcher, "frames": done.pictures, "size": [done.width, done.height],
            "fps": round(done.rate, 2), "first_frame_seconds": round(done.wait, 3), "loading_seconds": round(done.loading, 2)}


def show(rows: list[dict], old: list[dict] | None) -> None:
    """The table; old: rows of an earlier run to compare the rate with."""
    before = {(r["ranks"], r["launcher"]): r["fps"] for r in old or []}
    print(f"{'ranks':>5} {'launcher':>9} {'fps':>7} {'first frame s':>13} {'loading s':>9}" + (f" {'before':>7}" if old else ""))
    for r in rows:
        earlier = before.get((r["ranks"], r["launcher"]))
        print(f"{r['ranks']:>5} {r['launcher']:>9} {r['fps']:>7.1f} {r['first_frame_seconds']:>13.2f} {r['loading_seconds']:>9.1f}"
              + (f" {earlier:>7.1f}" if earlier else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "pipeline.json")
    parser.add_argument("--compare", type=Path)
    args = parser.parse_args()
    base = configs.load(args.config)
    old = json.loads(args.compare.read_text())["rows"] if args.compare else None
    measure(base, 1, "inproc", 0.5)  # page cache and kernels warm
    rows = [measure(base, n, args.launcher, args.seconds) for n in args.ranks]
    show(rows, old)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "commit": commit(), "config": asdict(base), "rows": rows}, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
