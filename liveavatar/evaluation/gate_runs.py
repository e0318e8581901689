"""What the gates judge: clips that an avatar makes for held-out speech, beside the truth, and one long stream.

Clips come through the roles' own conditioning and the cached rollout, the stream through the Engine: there is no
third way of generating.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from liveavatar.conditioning.audio_features import SAMPLES_PER_FRAME
from liveavatar.conditioning.behaviour import closure_of, control_planes, head_pose
from liveavatar.conditioning.clipfiles import Clip, clip_paths, read_clip
from liveavatar.config import Config
from liveavatar.core import FPS, SAMPLE_RATE, Audio, Block, ConfigError, Failed, InputError, Open
from liveavatar.diffusion.rollout import Course, cached_rollout
from liveavatar.models.probe import Probe, Seen, identity_error
from liveavatar.models.vae import StreamingVAE
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.placement import local_devices
from liveavatar.runtime.roles import PRIMING_LATENTS, to_bytes
from liveavatar.runtime.sources import open_source
from liveavatar.runtime.stage_roles import build_stage

SESSION = "gates"  # part of the noise's seed
GROUPS = ("held", "default", "readings")  # unseen people; the avatar that ships; the same with people's recorded voices


# ---------------------------------------------------------------- making


class Avatar:
    """A checkpoint as the config has it run, block after block in the caller's thread."""

    def __init__(self, config: Config):
        """Raises ConfigError, WeightsError."""
        self.source = open_source(config)
        device = torch.device(local_devices(config.model.device, 1)[0].kind)
        dtype = self.source.dtype(device)
        if self.source.sink_policy == "random":
            raise ConfigError("sampler.sink_distance=random: the trainer's rollout has one distance; gates need a number")
        self.geometry = self.source.geometry
        self.conditioner = build_stage(config, ("condition",), device)[0]
        self.model, self.vae = self.source.transformer(dtype, device), self.source.vae(dtype, device)

    @property
    def dtype(self) -> str:
        """torch's name of the type it computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def make(self, portrait: np.ndarray, pcm: np.ndarray, prompt: str, blocks: int, seed: int,
             closure: np.ndarray | None = None) -> tuple[torch.Tensor, np.ndarray]:
        """portrait uint8 [S,S,3], pcm float32 [n] -> latents float32 [z,F,h,w] and pictures uint8 [T,S,S,3] of so many blocks.
        closure float32 [T]: of the lids, in place of the avatar's own blinks; not heard by one that takes none."""
        opened = self._asked(Open(SESSION, seed=seed, prompt=prompt, picture=torch.from_numpy(portrait).permute(2, 0, 1)))
        asked = [self._asked(audio) for audio in audio_messages(pcm, blocks, self.geometry.samples_per_block, self.source.lookahead_samples)]
        if closure is not None and self.source.lids:
            parts = torch.from_numpy(closure).split(self.geometry.frames_per_block)
            asked = [replace(block, lids=part) for block, part in zip(asked, parts)]
        state, latents, pictures = self.vae.new_state(), [], []
        self.vae.decode(opened.motion[:, :PRIMING_LATENTS], state)
        course = Course.of(self.geometry, int(self.source.sink_policy), self.source.swap_block)
        for x in cached_rollout(self.model, self.source.sigmas, [b.latents for b in asked], [b.features for b in asked], opened.context,
                                opened.reference, opened.motion, course, poses=self._poses(asked)):
            latents.append(x.float().cpu())
            pictures.append(to_bytes(self.vae.decode(x, state)).numpy())
        return torch.cat(latents, dim=1), np.concatenate(pictures)

    def _poses(self, asked: list[Block]) -> list[torch.Tensor | None]:
        """What the driving-video input is given of each block; None: nothing."""
        sizes = self.model.config.cond_dim, self.geometry.latent_height, self.geometry.latent_width
        told = [[x if x is None else x.to(self.model.device) for x in (b.lids, b.head_pose)] for b in asked]
        return [control_planes(*controls, *sizes) for controls in told]

    def _asked(self, message):
        (answer,) = self.conditioner(message)
        if isinstance(answer, Failed):
            raise InputError(answer.reason)
        return answer


def audio_messages(pcm: np.ndarray, blocks: int, size: int, lookahead: int) -> Iterator[Audio]:
    """What the head would send for pcm float32 [n]: the first block with its look-ahead, then as much again each time."""
    whole = np.zeros(blocks * size + lookahead, np.float32)
    whole[: len(pcm)] = pcm[: len(whole)]
    cuts = [0, *(size * (b + 1) + lookahead for b in range(blocks))]
    for index, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        yield Audio(SESSION, index=index, start=start, pcm=torch.from_numpy(whole[start:stop].copy()))


def stream(config: Config, portrait: np.ndarray, prompt: str, seed: int, pcm: Iterator[np.ndarray], take: Callable[[np.ndarray], None],
           poses: np.ndarray | None = None) -> None:
    """Play float32 chunks of pcm through the Engine; `take` gets each block's pictures uint8 [T,S,S,3]. Flat memory.

    poses float32 [n,3]: degrees that the head is turned by, pushed first. The portrait is the corpus' own and goes in as it is.
    Raises what the Engine raises.
    """
    config = replace(config, runtime=replace(config.runtime, sessions=1), video=replace(config.video, face_crop="none"))
    asyncio.run(_play(config, portrait, prompt, seed, pcm, take, poses))


async def _play(config, portrait, prompt, seed, pcm, take, poses) -> None:
    engine = await Engine.start(config)
    try:
        picture = torch.from_numpy(portrait).permute(2, 0, 1)
        session = await engine.open(picture, prompt=prompt, seed=seed, name=SESSION)
        if poses is not None:
            session.push_head(poses)
        feeding = asyncio.create_task(_feed(session, pcm))
        async for out in session:
            take(out.pictures)
        await feeding
    finally:
        await engine.aclose()


async def _feed(session, pcm: Iterator[np.ndarray]) -> None:
    for chunk in pcm:
        await session.push_audio(chunk)
    await session.end_audio()


# ---------------------------------------------------------------- beside the truth


@dataclass(frozen=True)
class Take:
    """One held-out clip and what an avatar made of its portrait and its sound, both [T,...] from picture 0 on.

    clip: cut to T pictures. coded: the truth through the codec, uint8 [T,S,S,3]; made: uint8 [T,S,S,3]. latents,
    made_latents: float32 [z,F,h,w] of the truth (without the first, which covers one picture) and as generated. real,
    through, seen: what the probe reads off truth, coded truth and made. portrait: identity embedding of clip.reference.
    """

    group: str
    clip: Clip
    coded: np.ndarray
    made: np.ndarray
    latents: torch.Tensor
    made_latents: torch.Tensor
    real: Seen
    through: Seen
    seen: Seen
    portrait: np.ndarray


def take_clip(avatar: Avatar, probe: Probe, group: str, clip: Clip, seed: int) -> Take:
    """Generate what the clip shows, blinks where they can be commanded, and read all three versions."""
    blocks = len(clip.frames) // avatar.geometry.frames_per_block
    if not blocks:
        raise InputError(f"a clip of {len(clip.frames)} pictures is shorter than a block of {avatar.geometry.frames_per_block}")
    if clip.frames.shape[1:3] != (avatar.geometry.height, avatar.geometry.width):
        raise InputError(f"clips of {clip.frames.shape[1]} pixels, the avatar makes {avatar.geometry.height}: render the held-out clips in its size")
    made_latents, made = avatar.make(clip.reference, clip.sound, clip.caption, blocks, seed, closure_of(clip.lid))
    latents, coded = round_trip(avatar.vae, clip.frames)
    count = len(made)
    return Take(group, clip.cut(count), coded[:count], made, latents[:, 1:], made_latents, probe.look(clip.frames[:count]),
                probe.look(coded[:count]), probe.look(made), probe.look(clip.reference[None]).identity[0])


@torch.inference_mode()
def round_trip(vae: StreamingVAE, frames: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """uint8 [1+4n,S,S,3] -> latents float32 [z,1+n,h,w] and the decoded uint8 pictures."""
    pictures = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0
    latents = vae.encode(pictures)
    return latents.cpu(), to_bytes(vae.decode(latents, vae.new_state())).numpy()


def grouped_clips(folder: Path) -> list[tuple[str, Clip]]:
    """(group, clip) of the splits held and default of a corpus. Raises InputError when there is no held split.

    A clip of the default split is a reading when its voice is none of the held split's.
    """
    held = [read_clip(path) for path in clip_paths(folder, "held")]
    if not held:
        raise InputError(f"{folder}: holds no held/clip_*.npz; render them: liveavatar train data --config configs/train_tiny.yaml")
    own = [read_clip(path) for path in clip_paths(folder, "default")]
    if any(clip.pose is None for clip in (*held, *own)):
        raise InputError(f"{folder}: holds clips without true labels; gates judge on rendered clips")
    voices = {clip.card["voice"] for clip in held}
    return [("held", clip) for clip in held] + [("default" if clip.card["voice"] in voices else "readings", clip) for clip in own]


# ---------------------------------------------------------------- the long stream


class Watch:
    """What is kept of a stream: numbers per picture, and the probe's features of its first and last window only.

    series: identity_error, lid, yaw, pitch, roll; change: mean |difference| to the picture before, one per picture but the
    first. first, last: features float32 [window,P], the last ones up to a multiple of `period`. All in few large buffers:
    small arrays that live on between the large ones of a forward keep the heap from being used again, 0.1 MB a picture.
    """

    def __init__(self, probe: Probe, portrait: np.ndarray, window: int, period: int):
        """portrait: identity embedding [E] that errors are counted from."""
        self.probe, self.portrait, self.window, self.period = probe, portrait, window, period
        self.rows = {name: array("f") for name in ("identity_error", "lid", "yaw", "pitch", "roll", "change")}
        self.pictures, self._before = 0, None
        width = sum(probe.sizes.widths)
        self.first, self.last, self._ring = (np.zeros((window, width), np.float32) for _ in range(3))

    def __call__(self, pictures: np.ndarray) -> None:
        """The next pictures uint8 [n,S,S,3], n at most `window`."""
        seen = self.probe.look(pictures)
        self.rows["identity_error"].extend(identity_error(seen.identity, self.portrait).tolist())
        for name in ("lid", "yaw", "pitch", "roll"):
            self.rows[name].extend(getattr(seen, name).tolist())
        joined = pictures if self._before is None else np.concatenate([self._before, pictures])
        self.rows["change"].extend(np.abs(np.diff(joined.astype(np.int16), axis=0)).mean(axis=(1, 2, 3)).tolist())
        self._before = pictures[-1:].copy()
        self._keep(seen.features)

    def _keep(self, features: np.ndarray) -> None:
        if self.pictures < self.window:
            early = features[: self.window - self.pictures]
            self.first[self.pictures : self.pictures + len(early)] = early
        self._ring[(self.pictures + np.arange(len(features))) % self.window] = features
        self.pictures += len(features)
        if self.pictures % self.period == 0 or self.pictures < self.window + self.period:
            self.last[:] = self._ring  # in any order: only their distribution counts

    def series(self, name: str) -> np.ndarray:
        """One number per picture, float32."""
        return np.array(self.rows[name], np.float32)


def repeated_head(seed: int, spread: tuple[float, float, float], period: int, pictures: int) -> np.ndarray:
    """float32 [pictures,3] degrees: a session's drift, which in the last whole period is that of the first again, with a second before and
    behind in which the one becomes the other."""
    last = (pictures // period - 1) * period
    own, again = (head_pose(seed, SESSION, first, pictures, spread) for first in (0, -last))
    at = np.arange(pictures, dtype=np.float32)[:, None] - last
    return own + np.clip(1 + np.minimum(at, period - 1 - at) / FPS, 0, 1) * (again - own)


def looped(clips: list[Clip], pictures: int, per_block: int) -> tuple[int, Iterator[np.ndarray]]:
    """(period in pictures, chunks of pcm for so many pictures): the clips' sound again and again, so that windows one
    period apart say the same words; a period is a whole number of blocks."""
    sound = [clip.sound[: len(clip.frames) * SAMPLES_PER_FRAME] for clip in clips]
    period = sum(len(clip.frames) for clip in clips) // per_block * per_block
    once = np.concatenate(sound)[: period * SAMPLES_PER_FRAME]

    def chunks() -> Iterator[np.ndarray]:
        left = pictures * SAMPLES_PER_FRAME
        while left > 0:
            for start in range(0, min(left, len(once)), SAMPLE_RATE):
                yield once[start : min(start + SAMPLE_RATE, left)]
            left -= len(once)

    return period, chunks()
