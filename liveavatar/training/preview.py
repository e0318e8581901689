"""Look at a checkpoint: generated pictures beside rendered truth, and how well the mouth follows the speech.

The judge of the mouth is the probe, where the run has one. Its numbers compare checkpoints and samplers of ours with each
other, nothing else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from liveavatar.conditioning.audio_features import AudioFrontEnd
from liveavatar.core import FPS
from liveavatar.diffusion.denoise import noise
from liveavatar.diffusion.rollout import ClipCondition, Course, cached_rollout
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.probe import Probe
from liveavatar.models.s2v import CausalS2V
from liveavatar.models.vae import DecoderState, StreamingVAE
from liveavatar.training import data as corpus
from liveavatar.training import forcing, shards
from liveavatar.training.casting import averaged_model
from liveavatar.training.codec import to_bytes
from liveavatar.training.progress import counted
from liveavatar.training.probing import agreement, best_lag
from liveavatar.training.stored import front_end_of_run, silence_of
from liveavatar.training.synth import director, speech
from liveavatar.training.synth.head import HeadRenderer
from liveavatar.training.synth.people import Identity
from liveavatar.training.teacher import TeacherConfig, sample

BLOCK = 12  # pictures, .48 s: what lengths of speech are counted in
CLIP_BLOCKS = 7  # as many as a training clip has: a teacher makes no more at once


@dataclass(frozen=True)
class Scene:
    """What is to be said by whom, and the truth. truth uint8 [T,S,S,3]; aperture float32 [T]; pcm float32 [n] 16 kHz."""

    reference: np.ndarray
    truth: np.ndarray
    aperture: np.ndarray
    pcm: np.ndarray
    caption: str


def spoken(blocks: int, seed: int) -> speech.Utterance:
    """So many BLOCKs of the held-out voice, with what is looked ahead to."""
    return speech.synthesize(seed, BLOCK * blocks / FPS + speech.LOOKAHEAD_SECONDS, (speech.HELD_OUT_VOICE,))


def make_scene(renderer: HeadRenderer, identity: int, utterance: speech.Utterance, blocks: int, seed: int) -> Scene:
    """Render `identity` saying `utterance` for so many BLOCKs."""
    who = Identity.sample(identity)
    track = director.direct(utterance, BLOCK * blocks, seed)
    pictures = renderer.render_clip(who, track.units, track.pose, track.translation, track.gaze)
    return Scene(renderer.neutral(who), np.stack([p.rgb for p in pictures]), np.array([p.aperture for p in pictures], np.float32),
                 utterance.pcm, who.caption)


def _prepared(vae: StreamingVAE, config: forcing.ForcingConfig, front_end: AudioFrontEnd, scene: Scene,
              seed: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], DecoderState]:
    """Of the whole blocks of a scene: portrait latents [z,M,h,w], features [L,Ca,T], noise of each, a decoder that has seen the portrait."""
    held, blocks, state = forcing.held_portrait(vae, scene.reference, config), len(scene.truth) // config.block_pictures, vae.new_state()
    features = front_end.features_of(scene.pcm.astype(np.float32), config.block_pictures * blocks)
    shape = (vae.z_dim, config.block_latents, *held.shape[-2:])
    vae.decode(held, state)
    return held, features, [noise(seed, "preview", b, shape) for b in range(blocks)], state


def generate(model: CausalS2V, vae: StreamingVAE, rows: torch.Tensor, config: forcing.ForcingConfig, front_end: AudioFrontEnd, scene: Scene,
             sigmas: Sequence[float], seed: int, **how) -> np.ndarray:
    """Pictures uint8 [T,S,S,3] of the scene, through the cached rollout and the streaming decoder: what a user gets.
    how: fields of the rollout's Course."""
    held, features, noises, state = _prepared(vae, config, front_end, scene, seed)
    blocks = cached_rollout(model, sigmas, noises, features.split(config.block_pictures, dim=-1), rows, held[:, :1], held,
                            Course(ring_blocks=config.window_blocks, **how), seed)
    return np.concatenate([to_bytes(vae.decode(block, state)) for block in blocks])


def generate_whole(model: CausalS2V, vae: StreamingVAE, text: TextEncoder, config: forcing.ForcingConfig, front_end: AudioFrontEnd,
                   teach: TeacherConfig, scene: Scene, seed: int) -> np.ndarray:
    """As generate, by the bidirectional teacher: the whole scene at once, guided, with its sampler."""
    held, features, noises, state = _prepared(vae, config, front_end, scene, seed)
    condition = ClipCondition(features[None], [text.encode(scene.caption)], held[None, :, :1], held[None], config.window_blocks, causal=False)
    velocity = teach.guidance.velocity(model, condition, silence_of(text, front_end), text.encode(""))
    latents = sample(velocity, torch.cat(noises, dim=1)[None], len(noises), teach.sampler)[0]
    return to_bytes(vae.decode(latents, state))


def taught_path(run: str | Path, clip: Path) -> Path:
    """Where a held-out clip file as the teacher makes it lies."""
    return shards.clip_path(Path(run) / "teacher_clips", clip.parent.name, shards.number_of(clip))


@torch.no_grad()
def teacher_clips(config: forcing.ForcingConfig, teach: TeacherConfig, data_folder: str, run: str | Path, seed: int, text: TextEncoder) -> int:
    """What the teacher makes of the held-out clips, as clip files under RUN/teacher_clips: same labels and card, its own pictures.
    Those that are there stay; returns how many were made."""
    paths = [p for split in ("held", "default") for p in shards.clip_paths(data_folder, split)]
    todo = shards.missing(paths, functools.partial(taught_path, run))
    if not todo:
        return 0
    model, vae = load_model(config, run, seed, "teacher")[0], StreamingVAE.from_folder(Path(run) / "vae")
    front_end = front_end_of_run(config.model, run)
    for path in counted(todo, "clips by the teacher"):
        clip = shards.read_clip(path)
        clip = clip.cut(len(clip.frames) // config.block_pictures * config.block_pictures)
        scene = Scene(clip.reference, clip.frames, clip.aperture, clip.sound, clip.caption)
        frames = generate_whole(model, vae, text, config, front_end, teach, scene, seed)
        shards.write_clip(taught_path(run, path), replace(clip, frames=frames))
    return len(todo)


# ---------------------------------------------------------------- the judge


def follow(judged: np.ndarray, aperture: np.ndarray) -> dict[str, float | None]:
    """Correlation, slope and error of judged [T] on true aperture [T], best lag in pictures, correlation with the truth shuffled."""
    other = np.roll(aperture, len(aperture) // 2)
    return agreement(judged, aperture) | {"lag": best_lag([judged], [aperture]), "shuffled": agreement(judged, other)["r"]}


# ---------------------------------------------------------------- the stage


def sheet(rows: Sequence[np.ndarray], columns: int) -> Image.Image:
    """Rows of pictures uint8 [T,S,S,3], `columns` of each, evenly spaced in time."""
    picked = [r[np.linspace(0, len(r) - 1, columns).round().astype(int)] for r in rows]
    return Image.fromarray(np.concatenate([np.concatenate(list(r), axis=1) for r in picked]))


def load_model(config: forcing.ForcingConfig, run: str | Path, seed: int, stage: str = "forcing") -> tuple[CausalS2V, int]:
    """The averaged transformer of a stage's last checkpoint, and its iteration."""
    model, iteration = averaged_model(config, run, stage, seed)
    return model.eval().requires_grad_(False), iteration


def preview(config: forcing.ForcingConfig, data: corpus.DataConfig, run: str | Path, seed: int, sigmas: Sequence[float],
            text: TextEncoder, stage: str = "forcing", blocks: int = 12, teach: TeacherConfig | None = None, probe: Probe | None = None) -> dict:
    """Sheet (truth above, generated below, for three people) and numbers, into RUN/preview/STAGE_ITERATION.{png,json}. probe: the
    judge of the mouth; None: without figures of it. teach: how the stage `teacher` is sampled, which makes CLIP_BLOCKS."""
    blocks = CLIP_BLOCKS if stage == "teacher" else blocks
    model, iteration = load_model(config, run, seed, stage)
    vae, front_end = StreamingVAE.from_folder(Path(run) / "vae"), front_end_of_run(config.model, run)
    renderer = HeadRenderer(data.size, data.supersample)
    utterance = spoken(blocks, seed + 7)
    rows, report = [], {"stage": stage, "iteration": iteration, "sigmas": list(sigmas), "blocks": blocks}
    for name, identity in (("default", data.default_identity), ("trained", data.first_identity + 4), ("held", 1_000_000)):
        scene = make_scene(renderer, identity, utterance, blocks, seed)
        if stage == "teacher":
            made = generate_whole(model, vae, text, config, front_end, teach, scene, seed)
        else:
            made = generate(model, vae, text.encode(scene.caption), config, front_end, scene, sigmas, seed)
        rows += [scene.truth, made]
        if probe is not None and name == "default":
            for label, pictures in (("mouth", made), ("mouth of the truth", scene.truth)):
                report[label] = follow(probe.look(pictures).aperture, scene.aperture)
        report[f"colour error {name}"] = float(np.abs(made.mean(0) - scene.truth.mean(0)).mean())
    folder = Path(run) / "preview"
    folder.mkdir(exist_ok=True)
    sheet(rows, 12).save(folder / f"{stage}_{iteration:06d}.png")
    (folder / f"{stage}_{iteration:06d}.json").write_text(json.dumps(report, indent=1))
    return report
