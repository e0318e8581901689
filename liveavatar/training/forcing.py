"""Stages `latents` and `forcing`: every clip encoded once, then the causal transformer trained on it.

Diffusion forcing (training.md 2.1): each block of a clip has a noise level of its own, history is as
noisy as it is at inference, and the loss is the plain velocity error, heavier on mouth and eyes. What the frame packer
is given is the portrait standing still, as serving gives it, or in this stage alone the clip's own past, noised.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from liveavatar.conditioning.audio_features import AudioFrontEnd
from liveavatar.conditioning.behaviour import closure_of
from liveavatar.config import one_of
from liveavatar.core import FRAMES_PER_LATENT, ConfigError, latents_of
from liveavatar.diffusion.rollout import ClipCondition
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.vae import StreamingVAE
from liveavatar.models.weights import load_text_encoder, load_transformer, load_vae
from liveavatar.training import data, losses, shards, stored
from liveavatar.training.adapters import BaseConfig
from liveavatar.training.casting import Transformer, cast_of
from liveavatar.training.codec import to_float
from liveavatar.training.levels import clip_levels, mix
from liveavatar.training.loop import Draws, LoopConfig, Trainer
from liveavatar.training.progress import counted
from liveavatar.training.synth import speech
from liveavatar.training.synth.people import DRESS, Identity
from liveavatar.training.wording import worded

TEXTS_KEPT = 1024  # rows of so many captions stay in memory, 20 kB each


@dataclass(frozen=True, kw_only=True)
class ForcingConfig:
    """Training of the transformer. model: an S2VConfig mapping; or base: a frozen one that adapters are trained on."""

    loop: LoopConfig
    model: dict | None = None
    base: BaseConfig | None = None
    block_latents: int = 3
    context_latents: int = 3  # of a clip, in front: history of the codec only, not trained on
    window_blocks: int = 4
    blocks: int | None = None  # so many of a clip's, a piece drawn anew each time: clothes need no more; None: all of them
    motion_frames: int = 9
    motion: str = "portrait"  # what they show in this stage: it standing still, as in all others and in serving, or "past": the clip's own
    audio_variants: int = 3  # features of the clean sound and of so many - 1 augmented copies
    levels: tuple[float, ...] = (1.0, 0.9375, 0.8577, 0.8333, 0.75, 0.625, 0.5, 0.25)
    same_share: float = 0.7  # of the clips with one level in all blocks, as at inference
    table_share: float = 0.5  # of those, the ones whose level is in `levels`
    shift: float = 3.0
    silence_share: float = 0.05  # condition dropout: features of silence
    no_text_share: float = 0.3
    wording_share: float = 0.0  # of the texts say the same in other words, or name no more than what the portrait does not show
    default_share: float = 0.25  # of the clips drawn show the avatar that ships
    portrait_share: float = 0.35  # of the clips with text are given a portrait dressed otherwise, where the data has some
    far_share: float = 0.5  # of the batches that stand deep in a stream
    far_blocks: int = 20_000
    mouth: float = 4.0  # extra loss weight of mouth cells
    eyes: float = 1.5
    shirt: float = 0.0  # of the lowest row of cells, where a head's shirt shows: a sixteenth of the picture that prompts are judged by
    minimum_clips: int = 1
    learn: str = "all"  # or "text": only what reads the prompt moves; a finished student learns new words so and keeps the rest
    start: str = ""  # whose averages it begins from: "teacher", or another checkpoint RUN/START.pt; "": random numbers
    keep: str = ""  # folder of a finished avatar ("default": the embedded) that says how the face moves: clips would train its mouth to their mean

    def __post_init__(self):
        if (self.model is None) == (self.base is None):
            raise ConfigError("forcing: give either model (sizes, trained from nothing) or base (a folder, with adapters)")
        one_of("forcing.learn", self.learn, ("all", "text"))
        one_of("forcing.motion", self.motion, ("portrait", "past"))
        if self.learn == "text" and self.base:
            raise ConfigError("forcing.learn='text': not for adapters over a base, which are what learns there")
        if self.keep and self.base:
            raise ConfigError("forcing.keep: not for adapters over a base: their start is the base, whose face they keep by themselves")
        if self.context_latents < 1:
            raise ConfigError(f"forcing.context_latents={self.context_latents}: the first latent of a clip covers one picture only")
        if self.past_latents > self.context_latents:
            raise ConfigError(f"forcing.motion='past': {self.motion_frames} motion_frames are {self.past_latents} latents before what is trained "
                              f"on, forcing.context_latents={self.context_latents} leaves fewer: raise it, in clips as much longer")
        if self.blocks is not None and self.blocks < 1:
            raise ConfigError(f"forcing.blocks={self.blocks}: must be at least 1")
        if not 0 <= self.wording_share <= 1:
            raise ConfigError(f"forcing.wording_share={self.wording_share}: must be in 0..1")
        if not self.levels or not all(0 < s <= 1 for s in self.levels):
            raise ConfigError(f"forcing.levels={self.levels}: must lie in (0, 1]")

    @property
    def block_pictures(self) -> int:
        """Pictures of a block."""
        return FRAMES_PER_LATENT * self.block_latents

    @property
    def past_latents(self) -> int:
        """Latents of a clip that stage `forcing` gives as motion frames; 0: the portrait's."""
        return latents_of(self.motion_frames) if self.motion == "past" else 0


# ---------------------------------------------------------------- latents


@dataclass(frozen=True)
class Encoded:
    """What training reads of a clip: latents float16 [z,F,h,w] (normalised), reference [z,1,h,w], motion
    [z,M,h,w], features float32 [V,L,Ca,T], weight float32 [F,h,w] covering mouth and eyes; portraits
    [n,z,M,h,w], motion of the same person dressed otherwise; card: the clip's, with what is other there under "exchanged". Not in files
    of before there were controls: closure float32 [F,4] of the lids, of the first latent 0, and eyes bool [F,h,w], the cells they are in; not
    of before lips were read: lips float32 [F,4,2], the gap and the width of them in eye distances, of the first latent its one picture's; only
    of rendered clips: head float32 [F,4,3], yaw, pitch and roll in degrees from how the portrait holds it, likewise."""

    latents: np.ndarray
    reference: np.ndarray
    motion: np.ndarray
    features: np.ndarray
    weight: np.ndarray
    portraits: np.ndarray
    card: dict
    closure: np.ndarray | None = None
    eyes: np.ndarray | None = None
    lips: np.ndarray | None = None
    head: np.ndarray | None = None


def held_portrait(vae: StreamingVAE, picture: np.ndarray, config: ForcingConfig) -> torch.Tensor:
    """Latents [z,M,h,w] of a portrait uint8 [H,W,3] that stands still, as the runtime makes them; the first is the reference."""
    return vae.encode(to_float(np.repeat(picture[None], config.motion_frames, axis=0)))


def encode_clip(vae: StreamingVAE, clip: shards.Clip, config: ForcingConfig, front_end: AudioFrontEnd,
                others: data.Portraits | None = None) -> Encoded:
    """Latents, portrait latents as the runtime makes them, audio features and loss weights of a clip.
    others: of its person dressed otherwise."""
    latents, held = vae.encode(to_float(clip.frames)), held_portrait(vae, clip.reference, config)
    portraits = [held_portrait(vae, picture, config) for picture in others.pictures] if others else []
    card = clip.card | ({"exchanged": others.exchanged} if others else {})
    count = len(clip.frames)
    voices = [clip.sound] + [speech.augment(clip.sound, clip.card["seed"] + k) for k in range(1, config.audio_variants)]
    features = torch.stack([front_end.features_of(voice, count) for voice in voices])
    weight = losses.cell_weight(clip.mouth, clip.eyes, clip.frames.shape[1:3], vae.spatial_stride, config.mouth, config.eyes)
    eyes = losses.cell_weight(clip.mouth, clip.eyes, clip.frames.shape[1:3], vae.spatial_stride, 0.0, 1.0) > 1
    return Encoded(latents.half().numpy(), held[:, :1].half().numpy(), held.half().numpy(), features.numpy(), weight.numpy(),
                   torch.stack(portraits).half().numpy() if portraits else np.zeros((0, *held.shape), np.float16),
                   card, closure_by_latent(clip.lid), eyes.numpy(),
                   by_latent(np.stack([clip.aperture, clip.width], axis=-1)),
                   None if clip.pose is None else by_latent(clip.pose - [clip.turned, 0.0, 0.0]))


def closure_by_latent(lid: np.ndarray) -> np.ndarray:
    """Opening [1 + 4n] of the lids of a clip -> closure float32 [1 + n, 4] of the pictures of its latents; 0 of the first one's."""
    later = closure_of(lid)[1:].reshape(-1, FRAMES_PER_LATENT)
    return np.concatenate([np.zeros_like(later[:1]), later])


def pictures_of(latents: slice) -> slice:
    """Those of a clip that these of its latents cover; the first latent covers one."""
    return slice(*(1 + FRAMES_PER_LATENT * (end - 1) for end in (latents.start, latents.stop)))


def by_latent(labels: np.ndarray) -> np.ndarray:
    """Labels [1 + 4n, k] of pictures -> float32 [1 + n, 4, k] of the pictures of latents; the first one's is there four times."""
    first, later = labels[:1, None], labels[1:].reshape(-1, FRAMES_PER_LATENT, labels.shape[-1])
    return np.concatenate([np.repeat(first, FRAMES_PER_LATENT, 1), later]).astype(np.float32)


def encoded_path(run: str | Path, clip: Path) -> Path:
    """Where the encoded form of a clip file lies: RUN/latents/SPLIT/NAME."""
    return Path(run) / "latents" / clip.parent.name / clip.name


def encode_corpus(config: ForcingConfig, data_folder: str, run: str | Path, part: int = 0, parts: int = 1) -> int:
    """Encode every clip that is not yet encoded (this part of them); returns how many were. Over a base by its codec and
    its speech encoder, and its text encoder reads the captions."""
    base = config.base.folder if config.base else None
    vae = load_vae(base) if base else StreamingVAE.from_folder(Path(run) / "vae")
    front_end = stored.front_end_of(base) if base else stored.front_end_of_run(config.model, run)
    paths = [p for split in ("held", "train") for p in shards.clip_paths(data_folder, split)]
    todo = shards.missing(paths[part::parts], functools.partial(encoded_path, run))
    for path in counted(todo, "encoded clips"):
        made = encode_clip(vae, shards.read_clip(path), config, front_end, data.read_portraits(path))
        arrays = {f.name: getattr(made, f.name) for f in fields(Encoded) if f.name != "card"}
        shards.write_arrays(encoded_path(run, path), made.card, **{name: array for name, array in arrays.items() if array is not None})
    if base and part == 0:
        stored.store_conditions(base, run, (shards.read_arrays(p, "card")[0]["caption"] for p in paths), front_end)
    return len(todo)


def read_encoded(path: str | Path) -> Encoded:
    """An encoded clip. Raises InputError when the file is not one."""
    card, arrays = shards.read_arrays(path)
    return Encoded(card=card, **arrays)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """latents [B,z,F,h,w] of the trained blocks, features [B,L,Ca,4F], context: text rows per clip, reference
    [B,z,1,h,w], motion [B,z,M,h,w], weight [B,1,F,h,w]; all float32."""

    latents: torch.Tensor
    features: torch.Tensor
    context: list[torch.Tensor]
    reference: torch.Tensor
    motion: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device; text rows stay, they are copied where they are read."""
        moved = ("latents", "features", "reference", "motion", "weight")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in moved})


def curated(clips: Mapping[Path, Encoded], share: float) -> list[Path]:
    """The share of the spoken clips whose latents move most, sorted by path."""
    motion = {}
    for path, clip in clips.items():
        if any(name != "pau" for name, *_ in clip.card["phones"]):
            motion[path] = float(np.abs(np.diff(clip.latents.astype(np.float32), axis=1)).mean())
    chosen = sorted(motion, key=lambda p: (-motion[p], p))[: max(1, round(share * len(motion)))]
    return sorted(chosen)


class Folder(Mapping):
    """Encoded clips of a folder by path: cards in memory, arrays (0.6 MB a clip) read from their files each time, which the
    system keeps at hand as far as it has room. The list grows while encoding goes on."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.cards: dict[Path, dict] = {}

    def refresh(self) -> None:
        """Look for clips that were encoded since."""
        for path in shards.clip_paths(self.folder, self.split):
            if path not in self.cards:
                self.cards[path] = shards.read_arrays(path, "card")[0]

    def __getitem__(self, path: Path) -> Encoded:
        return read_encoded(path)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.cards)

    def __len__(self) -> int:
        return len(self.cards)


class EncodedReader:
    """Batches of encoded clips: files, re-listed while encoding goes on, and tar shards; both are read from where they lie.

    curated_share: below 1, only this share of the spoken clips, those whose latents move most, is drawn from.
    """

    def __init__(self, run: str | Path, config: ForcingConfig, text: TextEncoder, default_identity: int, curated_share: float = 1.0):
        self.curated_share = curated_share
        self.folder, self.config, self.text, self.default = Path(run) / "latents", config, text, default_identity
        self.clips, self.packed = Folder(self.folder, "train"), shards.Packed(self.folder, "train")
        self.order: list[Path] = []
        self.shipped: list[Path] = []
        self.rows_of = functools.lru_cache(maxsize=TEXTS_KEPT)(self._encode)
        self.silence = stored.silence_of(text, None if config.base else stored.front_end_of_run(config.model, run))  # [L,Ca,1]

    def look_again(self, draws: Draws) -> None:
        """Refresh at the first batch and every 50 iterations."""
        if not self.order or draws.iteration % 50 == 0:
            self.refresh()

    def refresh(self) -> None:
        """Look for clips that were encoded since."""
        known = len(self.clips)
        self.clips.refresh()
        if self.order and len(self.clips) == known:
            return
        if self.packed.cards and self.curated_share < 1:
            raise ConfigError(f"{self.folder}: clips in shards cannot be curated: pack the ones to train on")
        self.order = sorted([*self.clips, *self.packed.cards]) if self.curated_share == 1 else curated(self.clips, self.curated_share)
        self.shipped = [p for p in self.order if self._card(p)["identity"]["seed"] == self.default]
        if len(self.order) < self.config.minimum_clips:
            raise ConfigError(f"{self.folder}: {len(self.order)} encoded clips, at least {self.config.minimum_clips} are needed; run the latents stage")

    def _card(self, path: Path) -> dict:
        return self.clips.cards[path] if path in self.clips.cards else self.packed.cards[path]

    def _clip(self, path: Path) -> Encoded:
        return self.clips[path] if path in self.clips.cards else Encoded(card=self.packed.cards[path], **self.packed.arrays(path))

    def _encode(self, caption: str) -> torch.Tensor:
        """Text rows [n, text_dim] of a caption."""
        return self.text.encode(caption).float().clone()

    def batch(self, draws: Draws, count: int, past: int = 0) -> Batch:
        """`count` random clips with random audio variant, text and silence dropout. past: so many latents before the trained ones are
        the motion; 0: the portrait's are."""
        self.look_again(draws)
        rng, rows = draws.numpy, []
        for _ in range(count):
            rows.append(self._row(self._draw_clip(rng), rng, past=past))
        return self.stacked(rows)

    @staticmethod
    def stacked(rows: list[tuple]) -> Batch:
        """Rows of _row as a batch."""
        latents, features, context, reference, motion, weight = zip(*rows)
        return Batch(*(torch.stack(x) for x in (latents, features)), list(context),
                     *(torch.stack(x) for x in (reference, motion, weight)))

    def _draw_clip(self, rng: np.random.Generator) -> Encoded:
        pool = self.shipped if self.shipped and rng.random() < self.config.default_share else self.order
        return self._clip(pool[int(rng.integers(len(pool)))])

    def _row(self, clip: Encoded, rng: np.random.Generator, piece: slice | None = None, past: int = 0):
        latents = piece or self._piece(clip.latents.shape[1], rng)
        features = torch.from_numpy(clip.features[int(rng.integers(len(clip.features)))])[..., pictures_of(latents)]
        if rng.random() < self.config.silence_share:
            features = self.silence.expand_as(features)
        text, portrait = self._text_and_portrait(clip, rng)
        motion = clip.latents[:, latents.start - past : latents.start] if past else portrait
        weight = clip.weight[None, latents].copy()
        weight[..., -1, :] += self.config.shirt
        as_tensor = [torch.from_numpy(a).float() for a in (clip.latents[:, latents], portrait[:, :1], motion, weight)]
        return as_tensor[0], features, self.rows_of(text), *as_tensor[1:]

    def _piece(self, count: int, rng: np.random.Generator) -> slice:
        """Which of a clip's latents are trained on: those behind the context, or `blocks` blocks of them."""
        c = self.config
        whole = (count - c.context_latents) // c.block_latents
        if c.blocks is None or c.blocks >= whole:
            return slice(c.context_latents, count)
        first = c.context_latents + c.block_latents * int(rng.integers(whole - c.blocks + 1))
        return slice(first, first + c.blocks * c.block_latents)

    def _text_and_portrait(self, clip: Encoded, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        """(caption or none, motion [z,M,h,w]). A portrait dressed otherwise comes with a text that says what the clip shows instead."""
        if rng.random() < self.config.no_text_share:
            return "", clip.motion
        motion, exchanged = clip.motion, ()
        if len(clip.portraits) and rng.random() < self.config.portrait_share:
            k = int(rng.integers(len(clip.portraits)))
            motion, exchanged = clip.portraits[k], clip.card.get("exchanged", {k: DRESS})[k]
        if rng.random() >= self.config.wording_share:
            return clip.card["caption"], motion
        return worded(Identity(**clip.card["identity"]), [part for part in DRESS if part in exchanged or rng.random() < 0.5], rng), motion


# ---------------------------------------------------------------- the stage


def draw_position(config: ForcingConfig, rng: np.random.Generator) -> tuple[int, int]:
    """(sink distance 4..30, number of the clip's first block): half of the batches stand deep in a stream,
    so that the distance to the motion tokens, which never move, is nothing new after a minute."""
    far = int(np.exp(rng.uniform(0, np.log(config.far_blocks)))) if rng.random() < config.far_share else 0
    return int(rng.integers(4, 31)), far


def forcing_levels(config: ForcingConfig, batch: Batch, draws: Draws) -> torch.Tensor:
    """Levels [B,N] of the blocks of a batch by the stage's law."""
    return clip_levels(draws.numpy, len(batch.latents), batch.latents.shape[2] // config.block_latents, levels=config.levels,
                       same_share=config.same_share, table_share=config.table_share, shift=config.shift)


@dataclass(frozen=True)
class Kept:
    """A finished avatar, frozen: its transformer and the rows [n, text_dim] that its own encoder makes of no prompt."""

    model: Transformer
    silent_prompt: torch.Tensor

    @classmethod
    def load(cls, folder: str, device: torch.device | str = "cpu") -> Kept:
        """Raises WeightsError."""
        return cls(load_transformer(folder, device=device).requires_grad_(False), load_text_encoder(folder).encode("").float())


def noisy_past(motion: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Motion latents [B,z,M,h,w], each at a level of its own, uniform in [0, 1] (training.md 2.1): what a stream has behind it is never
    as clean as a clip."""
    sigma = torch.rand(motion.shape[0], motion.shape[2], generator=generator).to(motion)
    return mix(motion, torch.randn(motion.shape, generator=generator).to(motion), sigma)


def stage_loss(model: Transformer, config: ForcingConfig, reader: EncodedReader, draws: Draws, device: torch.device,
               kept: Kept | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """Of one iteration of the stage: clip_loss of a batch at the stage's levels, its motion frames as `config.motion` says."""
    batch = reader.batch(draws, config.loop.batch, config.past_latents).to(device)
    if config.past_latents:
        batch = replace(batch, motion=noisy_past(batch.motion, draws.torch))
    return clip_loss(model, config, batch, draws, forcing_levels(config, batch, draws), kept=kept)


def clip_loss(model: Transformer, config: ForcingConfig, batch: Batch, draws: Draws, sigma: torch.Tensor,
              causal: bool = True, kept: Kept | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """Flow-matching loss of a batch at levels sigma [B,N], and metrics. causal: False for the bidirectional teacher.
    kept: a finished avatar, whose velocity without a prompt is the truth in the cells of the face."""
    noise = torch.randn(batch.latents.shape, generator=draws.torch).to(batch.latents)
    distance, first = draw_position(config, draws.numpy)
    condition = ClipCondition(batch.features, batch.context, batch.reference, batch.motion, config.window_blocks, distance, first, causal=causal)
    noisy, truth = mix(batch.latents, noise, sigma), batch.latents
    velocity = condition.velocity(model)(noisy, sigma)
    if kept is not None:
        with torch.no_grad():
            known = replace(condition, context=[kept.silent_prompt] * len(noise)).velocity(kept.model)(noisy, sigma)
        truth = torch.where(losses.face_cells(batch.weight), noise - known, truth)
    loss = losses.forcing_loss(velocity, truth, noise, batch.weight)
    per_clip = (velocity.detach() - (noise - truth)).square().mean(dim=(1, 2, 3, 4))
    high = sigma.mean(1) > 0.7
    metrics = {name: float(per_clip[rows].mean()) for name, rows in (("high", high), ("low", ~high)) if rows.any()}
    return loss, metrics


def only_text(model: torch.nn.Module) -> None:
    """Leave trainable what reads the prompt: its embedding and the attention to it in every block."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("text_embedding.") or ".cross_attn." in name)


def train_forcing(config: ForcingConfig, run: str | Path, seed: int, text: TextEncoder, default_identity: int,
                  stop_after: int | None = None) -> list[float]:
    """Train (or go on training) the transformer; returns the losses of this call."""
    model = cast_of(config, run, seed).started("forcing", config.start)
    if config.learn == "text":
        only_text(model)
    reader = EncodedReader(run, config, text, default_identity)
    trainer = Trainer("forcing", model, config.loop, run, seed)
    kept = Kept.load(config.keep, trainer.device) if config.keep else None

    return trainer.run(lambda draws: stage_loss(model, config, reader, draws, trainer.device, kept), stop_after)
