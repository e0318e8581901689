"""Steps of the 14B recipe with random weights: does the memory hold, does the loss move, how long does a step take?

    python bench/train_step.py                  # 20 iterations of Stage 2 at 384x256, one GPU of about 80 GB or more
    python bench/train_step.py --stage forcing --steps 20
    python bench/train_step.py --tiny           # the same code on a CPU in seconds, to show that it runs

Everything is the recipe's own (configs/train_s2v14b.yaml: adapters over one base, blocks computed again, losses, rollouts)
but for the weights and the clips, which are random numbers, and the learning rate, which does not warm up. Writes JSON beside
the plan's figures, row by row. Losses of an iteration are of other levels each, so Stage 1 is also judged before and after on
the same clips, noise and levels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from liveavatar.models.s2v import CausalS2V, S2VConfig
from liveavatar.training import dmd, recipe, shards, stored
from liveavatar.training.adapters import Base
from liveavatar.training.casting import Adapters
from liveavatar.training.forcing import EncodedReader, stage_loss
from liveavatar.training.groups import device_of
from liveavatar.training.loop import Draws, Trainer, draws_of
from liveavatar.training.memory import Load, sizes_of, stage_plan

from measured import HERE, RESULTS, write

TINY = S2VConfig(dim=96, ffn_dim=256, freq_dim=32, text_dim=32, text_len=32, num_heads=2, num_layers=3, audio_dim=64, audio_layers=2, audio_inject_layers=(0, 2))


def random_base(model: S2VConfig, rank: int, device: torch.device, dtype: torch.dtype) -> Base:
    """Weights of the right spread, made where they stay: a 14B model never exists twice."""
    with torch.device("meta"):
        module = CausalS2V(model).cast(dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            spread = 0.5 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.02
            p.normal_(0, spread, generator=generator)
            if ".norm" in name and name.endswith("weight"):
                p.fill_(1)
    return Base(module, rank, rank / 2)


def random_clips(folder: Path, model: S2VConfig, height: int, width: int, latents: int, count: int) -> None:
    """Encoded clips and conditions of noise, as stage `latents` leaves them; latents: with the context in front."""
    rng, h, w = np.random.default_rng(0), height // 8, width // 8
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    for i in range(count):
        arrays = {"latents": draw(16, latents, h, w), "reference": draw(16, 1, h, w), "motion": draw(16, 19, h, w), "weight": np.ones((latents, h, w), np.float32),
                  "features": draw(1, model.audio_layers, model.audio_dim, 4 * latents - 3), "portraits": np.zeros((0, 16, 19, h, w), np.float32)}
        shards.write_arrays(shards.clip_path(folder / "latents", "train", i), {"caption": "noise", "identity": {"seed": i}}, **arrays)
    conditions = folder / "latents" / "conditions"
    stored.write_rows(conditions / "silence.npz", torch.from_numpy(draw(model.audio_layers, model.audio_dim, 1)), {})
    for caption in ("", "noise"):
        stored.write_rows(stored.caption_path(conditions, caption), torch.from_numpy(draw(min(40, model.text_len), model.text_dim)), {"caption": caption})


class Timed:
    """Wraps the trainer's steps: seconds and peak memory of each. wrote: told of every row; judged: the loss on the same clips."""

    def __init__(self, trainer: Trainer, step, judged=lambda: None):
        self.trainer, self.step, self.judged, self.rows, self.wrote = trainer, step, judged, [], lambda: None

    def __call__(self) -> dict:
        cuda = self.trainer.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        row = self.step()
        if cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if cuda else None
        self.rows.append({"seconds": round(time.monotonic() - began, 3), "peak_bytes": peak, **{k: float(v) for k, v in row.items()}})
        print(json.dumps(self.rows[-1]), flush=True)
        self.wrote()
        return row


def stage_of(made: recipe.Recipe, name: str, cast: Adapters, run: Path, reader: EncodedReader) -> Timed:
    """The stage's own iteration over the given transformer."""
    if name == "dmd":
        cast.averaged = lambda stage, role: (cast.fresh(role), 0)  # there is no Stage 1 to go on from
        work = dmd.Distillation(made.dmd, made.forcing, made.export.sigmas, run, made.seed, reader, cast)
        return Timed(work.trainer, work.step)
    role = cast.fresh("student")
    trainer = Trainer("forcing", role, made.forcing.loop, run, made.seed)

    def loss_of(draws: Draws):
        return stage_loss(role, made.forcing, reader, draws, trainer.device)

    @torch.no_grad()
    def judged() -> float:
        with trainer.autocast():
            return sum(float(loss_of(draws_of(made.seed, "judge", i))[0]) for i in range(4)) / 4

    return Timed(trainer, lambda: trainer.step(loss_of), judged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("forcing", "dmd"), default="dmd")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--latents", type=int, default=21)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.height, args.width, args.latents = 64, 64, 6
    strategy = [f"{args.stage}.loop.{key}" for key in (f"iterations={args.steps}", "strategy=single", "log_every=1", "checkpoint_seconds=1.0e+9", "threads=1", "warmup=0")]
    made = recipe.read_recipe(HERE.parent / "configs" / "train_s2v14b.yaml", [*strategy, "forcing.minimum_clips=1", "dmd.critic_warmup=0", "dmd.ratio=2",
                              f"clip={{height: {args.height}, width: {args.width}, latents: {args.latents}}}"])
    model, rank = (TINY, 8) if args.tiny else (S2VConfig(), made.forcing.base.rank)
    section = getattr(made, args.stage)
    device, dtype = device_of(section.loop.device), torch.float32 if args.tiny else torch.bfloat16
    load = Load(model=model, clip=made.clip, block_latents=3, window_blocks=4, batch=section.loop.batch)
    plan = stage_plan(args.stage, section.loop, load, sizes_of(model, rank, dtype), 1, roles=1 + (args.stage == "dmd"), graphs=1 + (args.stage == "dmd"))
    print(f"planned {plan.total / 1e9:.2f} GB: {plan.parts}")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        random_clips(run, model, args.height, args.width, args.latents + made.forcing.context_latents, 4)
        cast = Adapters(made.forcing, run, made.seed, random_base(model, rank, device, dtype))
        timed = stage_of(made, args.stage, cast, run, EncodedReader(run, made.forcing, stored.StoredConditions(run), -1))
        timed.trainer.save = lambda: None  # 20 GB that nobody wants
        out = args.out or RESULTS / f"train-{args.stage}-{'tiny-' if args.tiny else ''}{device.type}.json"

        def row_written(complete: bool = False) -> None:
            peak = max((row["peak_bytes"] or 0 for row in timed.rows), default=0)
            write(out, complete=complete, stage=args.stage, tiny=args.tiny, clip=dataclasses.asdict(made.clip), planned_bytes=plan.parts,
                  planned_total=plan.total, peak_bytes=peak or "not measured: no GPU", same_clips=same, steps=timed.rows)

        timed.wrote, same = row_written, [timed.judged()]
        timed.trainer.run_steps(timed)
        same.append(timed.judged())
        row_written(complete=True)


if __name__ == "__main__":
    main()
