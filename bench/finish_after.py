"""What ending the denoising early changes (sampler.finish_after, pipeline.md section 4): all steps against the first few.

    python bench/finish_after.py --blocks 125                 # a minute of the embedded avatar, the last of its steps left out
    python bench/finish_after.py --config run.yaml --after 3 --videos out   # any checkpoint; the two streams as videos

The portrait says the recording (over and over) twice, from the same noise over the same levels: to the end, and jumping to 0 after
--after steps. Per block: PSNR of the latents and of the pictures, full against truncated, and the sharpness of both; and how all
that moves along the stream. With --videos the pair lies there for `liveavatar evaluate video`, whose two tables are the rest of the
answer: identity, sync, quality. Before finish_after becomes a default, 60 s at least of the model in use (model.md section 13).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from liveavatar import config as configs
from liveavatar.conditioning.identity import fit_picture, load_picture
from liveavatar.conditioning.media import VideoWriter, read_audio
from liveavatar.core import FPS, SAMPLE_RATE
from liveavatar.diffusion.denoise import noise, sink_distance
from liveavatar.diffusion.rollout import Course, cached_rollout, exit_table
from liveavatar.generate import PORTRAIT, SPEECH
from liveavatar.runtime.roles import PRIMING_LATENTS, to_bytes
from liveavatar.runtime.sources import FolderSource, sized

from measured import parser_of, show, write

COLUMNS = {"seconds": "", "latent_psnr": ".1f", "picture_psnr": ".1f", "sharpness": ".3f"}


class Avatar:
    """The checkpoint of a config, its portrait encoded and its recording at hand."""

    def __init__(self, config: configs.Config, device: torch.device):
        picture = load_picture(PORTRAIT)
        self.source = source = FolderSource(sized(config, picture))
        self.device, self.dtype, g = device, source.dtype(device), source.geometry
        self.model, self.vae = source.transformer(self.dtype, device), source.vae(self.dtype, device)
        still = (fit_picture(picture, g.height, g.width).to(device).float() / 127.5 - 1.0)[:, None]
        self.reference = self.vae.encode(still).to(self.dtype)
        self.motion = self.vae.encode(still.expand(-1, g.motion_frames, -1, -1)).to(self.dtype)
        self.rows = source.prompt_encoder(self.dtype, device)(config.prompt).to(device)
        self.pcm, self.seed = np.concatenate(list(read_audio(str(SPEECH)))), config.seed

    def sound(self, blocks: int) -> np.ndarray:
        """float32 PCM of so many blocks and what is looked ahead to, the recording over and over."""
        need = blocks * self.source.geometry.samples_per_block + self.source.lookahead_samples + SAMPLE_RATE
        return np.tile(self.pcm, math.ceil(need / len(self.pcm)))[:need].astype(np.float32)

    def features(self, blocks: int) -> Iterator[torch.Tensor]:
        stream = self.source.front_end(self.device).new_stream()
        stream.push(torch.from_numpy(self.sound(blocks)))
        return (stream.features(b).to(self.device) for b in range(blocks))

    @torch.inference_mode()
    def stream(self, sigmas: list[float], blocks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per block clean latents [16, F, h, w] and pictures uint8 [12, H, W, 3]."""
        g = self.source.geometry
        shape = (self.source.model_config.in_dim, g.block_latents, g.latent_height, g.latent_width)
        noises = (noise(self.seed, "finish-after", b, shape).to(self.device, self.dtype) for b in range(blocks))
        state = self.vae.new_state()
        self.vae.decode(self.motion[:, :PRIMING_LATENTS], state)
        course = Course.of(g, sink_distance(self.source.sink_policy, self.seed, 0), self.source.swap_block)
        for latents in cached_rollout(self.model, sigmas, noises, self.features(blocks), self.rows, self.reference, self.motion, course):
            yield latents.float().cpu(), to_bytes(self.vae.decode(latents, state))


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float) -> float:
    """dB, at most 100."""
    error = float(((a.float() - b.float()) ** 2).mean())
    return min(100.0, 10 * math.log10(peak**2 / error)) if error else 100.0


def sharpness(pictures: torch.Tensor) -> float:
    """Variance of the Laplacian of the grey pictures, mean over the block."""
    grey = pictures.float().mean(-1)
    inner = grey[:, 1:-1, 1:-1]
    laplace = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    return float(laplace.var(dim=(1, 2)).mean())


def compare(avatar: Avatar, full: list[float], short: list[float], blocks: int, videos: Path | None) -> list[dict]:
    """One row per block. The streams run side by side, so memory stays flat."""
    g, rows = avatar.source.geometry, []
    names = ("full.mp4", f"after{len(short) - 1}.mp4")
    writers = [VideoWriter(videos / name, g.width, g.height, fps=FPS, sample_rate=SAMPLE_RATE) for name in names] if videos else []
    sound = avatar.sound(blocks)
    for number, ((a, seen_a), (b, seen_b)) in enumerate(zip(avatar.stream(full, blocks), avatar.stream(short, blocks))):
        rows.append({"block": number, "latent_psnr": psnr(a, b, float(a.max() - a.min())), "picture_psnr": psnr(seen_a, seen_b, 255.0),
                     "sharpness_full": sharpness(seen_a), "sharpness_short": sharpness(seen_b)})  # fmt: skip
        for writer, pictures in zip(writers, (seen_a, seen_b)):
            writer.write(pictures.numpy(), sound[number * g.samples_per_block :][: g.samples_per_block])
    for writer in writers:
        writer.close()
    return rows


def summary(rows: list[dict], block_seconds: float, parts: int = 4) -> list[dict]:
    """Means over equal parts of the stream, the first blocks first: a drift is a row that leaves its neighbours."""
    size = max(1, math.ceil(len(rows) / parts))
    found = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        mean = lambda key: sum(row[key] for row in part) / len(part)  # noqa: E731
        found.append({"seconds": f"{first * block_seconds:.1f}-{(first + len(part)) * block_seconds:.1f}", "latent_psnr": mean("latent_psnr"),
                      "picture_psnr": mean("picture_psnr"), "sharpness": mean("sharpness_short") / mean("sharpness_full")})  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "finish-after.json", compare=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--after", type=int, help="steps that are kept; default: all but the last")
    parser.add_argument("--blocks", type=int, default=125, help="of 0.48 s")
    parser.add_argument("--videos", type=Path, help="folder for the two videos")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configs.load(args.config)
    avatar = Avatar(config, device)
    full = list(avatar.source.sigmas)
    after = args.after or len(full) - 2
    if not 1 <= after < len(full) - 1:
        parser.error(f"--after {after}: of {len(full) - 1} steps keep 1 to {len(full) - 2}")
    if args.videos:
        args.videos.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = compare(avatar, full, list(exit_table(full, after)), args.blocks, args.videos)
    parts = summary(rows, float(avatar.source.geometry.block_seconds))
    show(f"finish_after {after} of {len(full) - 1} steps; sharpness: of the truncated over the full", parts, COLUMNS)
    write(args.out, config={"model": config.model.path, "sigmas": full, "after": after, "blocks": args.blocks, "seed": config.seed, "dtype": str(avatar.dtype)}, rows=rows,
          summary=parts, took=round(time.monotonic() - began, 1))  # fmt: skip


if __name__ == "__main__":
    main()
