"""Stage `probe`: the judge network, trained on single pictures of the corpus and checked on held-out people.

What it must not learn is the corpus' light, its framing or a codec's handwriting: pictures are moved, turned,
mirrored, relit, blurred, and a share of them went through the codec. Around half of the faces the surroundings
are painted over, or identity would be read off the backdrop.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from liveavatar.core import ConfigError
from liveavatar.models.probe import READINGS, Probe, ProbeSizes, Seen, identity_error, save_probe, units_of
from liveavatar.models.vae import StreamingVAE
from liveavatar.training import shards
from liveavatar.training.codec import to_bytes, to_float
from liveavatar.training.data import DataConfig, render_corpus
from liveavatar.training.loop import Draws, LoopConfig, Trainer, load_average, meet, rank_and_world
from liveavatar.training.progress import counted

EXTREME = 0.1  # the share of a clip's pictures that counts as a blink, or as a wide mouth
FACE = (1.9, 2.6)  # half axes of the face, in eye distances, around a point .55 below the eyes
FIRST_STRANGER = 500_000  # identities between those of the corpus and the held-out ones
LAGS = range(-5, 6)  # pictures
CALIBRATION_CLIPS, CALIBRATION_STEP = 64, 6  # clips, and every so many of their pictures


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """also: corpora beside data.folder to train on. strangers: clips of people nothing is trained on that are rendered to set the
    gains of the readings; 0: the clips it was trained on, which flatter it. codec: folder of the codec whose handwriting shall not
    matter, "": RUN/vae; codec_clips: so many clips pass through it (0: none), codec_share of the pictures are taken from them."""

    loop: LoopConfig
    sizes: ProbeSizes = ProbeSizes()
    also: tuple[str, ...] = ()
    strangers: int = 24
    codec: str = ""
    codec_clips: int = 96
    codec_share: float = 0.35
    pictures_per_clip: int = 8
    turn: float = 4.0  # degrees
    scale: float = 0.05
    shift: float = 0.04  # of the picture
    light: float = 0.25
    noise: float = 0.03
    hidden_share: float = 0.5  # of the faces without surroundings
    identity: float = 0.4  # weight of telling people apart
    margin: float = 0.15
    sharpness: float = 16.0

    def __post_init__(self):
        if self.loop.batch % self.pictures_per_clip or self.pictures_per_clip < 3:
            raise ConfigError(f"probe.loop.batch={self.loop.batch}: must be a multiple of pictures_per_clip, which is at least 3")
        for name in ("codec_share", "hidden_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"probe.{name}={getattr(self, name)}: must be in 0..1")


# ---------------------------------------------------------------- pictures and labels


@dataclass(frozen=True)
class Batch:
    """pictures float [-1,1] [B,3,S,S]; labels [B,6] in units of models/probe.py TYPICAL; people int64 [B];
    face [B,3]: centre x, y and eye distance, shares of the side."""

    pictures: torch.Tensor
    labels: torch.Tensor
    people: torch.Tensor
    face: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


def face_places(eyes: np.ndarray, side: int) -> np.ndarray:
    """float32 [T,3]: middle of the face x, y and eye distance as shares of the side, from eye boxes [T,2,4] in pixels."""
    centres = (eyes[:, :, :2] + eyes[:, :, 2:]) / 2 / side
    distance = np.linalg.norm(centres[:, 0] - centres[:, 1], axis=1)
    middle = centres.mean(1)
    return np.stack([middle[:, 0], middle[:, 1] + 0.55 * distance, distance], axis=1).astype(np.float32)


def labels_of(clip: shards.Clip) -> np.ndarray:
    """float32 [T,6] of a clip, in units of TYPICAL."""
    yaw, pitch, roll = clip.pose.T
    return units_of(aperture=clip.aperture, width=clip.width, lid=clip.lid, yaw=yaw, pitch=pitch, roll=roll)


def choose_pictures(rng: np.random.Generator, clip: shards.Clip, count: int) -> np.ndarray:
    """Indices: one of a nearly shut eye, one of a wide mouth, the others anywhere; blinks are rare and must be known."""
    rare = max(1, round(EXTREME * len(clip.frames)))
    blink, wide = np.argsort(clip.lid)[:rare], np.argsort(-clip.aperture)[:rare]
    anywhere = rng.integers(0, len(clip.frames), count - 2)
    return np.array([rng.choice(blink), rng.choice(wide), *anywhere])


class PictureReader:
    """Batches of augmented pictures with their labels."""

    def __init__(self, config: ProbeConfig, folders: list[str], decoded: Path):
        self.config, self.decoded = config, decoded
        self.paths = rendered_clips(folders)
        if not self.paths:
            raise ConfigError(f"{', '.join(folders)}: no rendered clips yet; run the data stage first")
        self.through_codec = [p for p in self.paths if decoded_path(decoded, p).exists()]
        people = [person_of(path) for path in self.paths]
        self.number = {seed: i for i, seed in enumerate(sorted(set(people)))}

    def batch(self, draws: Draws) -> Batch:
        """The batch of an iteration, a function of its draws."""
        c, rng, rows = self.config, draws.numpy, []
        for _ in range(c.loop.batch // c.pictures_per_clip):
            coded = self.through_codec and rng.random() < c.codec_share
            pool = self.through_codec if coded else self.paths
            path = pool[int(rng.integers(len(pool)))]
            clip = shards.read_clip(path)
            frames = shards.read_arrays(decoded_path(self.decoded, path), "frames")[1]["frames"] if coded else clip.frames
            index = choose_pictures(rng, clip, c.pictures_per_clip)
            person = np.full(len(index), self.number[clip.card["identity"]["seed"]])
            rows.append((to_float(frames[index]).transpose(0, 1), labels_of(clip)[index], person,
                         face_places(clip.eyes, clip.frames.shape[1])[index]))
        pictures, *others = zip(*rows)
        labels, people, face = (torch.from_numpy(np.concatenate(x)) for x in others)
        return augment(Batch(torch.cat(pictures), labels, people, face), c, draws)


def rendered_clips(folders: list[str]) -> list[Path]:
    """Training clips of the generator: those of real people have no true pose."""
    return [p for folder in folders for p in shards.clip_paths(folder, "train") if "generator" in shards.read_arrays(p, "lid")[0]]


def person_of(path: Path) -> int:
    """Seed of the identity that a clip shows."""
    return shards.read_arrays(path, "lid")[0]["identity"]["seed"]  # the pictures stay unread


# ---------------------------------------------------------------- augmentation


def augment(batch: Batch, config: ProbeConfig, draws: Draws) -> Batch:
    """Mirrored, turned and moved (labels follow), surroundings hidden, relit, blurred, noisy; at the probe's size."""
    count, g = len(batch.pictures), draws.torch

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(*shape, generator=g) - 1

    mirror = torch.where(torch.rand(count, generator=g) < 0.5, -1.0, 1.0)
    degrees = config.turn * uniform(count)
    pictures = hide_surroundings(batch, config.hidden_share, g)
    pictures = move(pictures, mirror, degrees, 1 + config.scale * uniform(count), 2 * config.shift * uniform(count, 2), config.sizes.size)
    pictures = pictures * (1 + config.light * uniform(count, 1, 1, 1)) + config.light * uniform(count, 3, 1, 1) / 2
    pictures = torch.lerp(pictures, blurred(pictures), torch.rand(count, 1, 1, 1, generator=g).square())
    noise = config.noise * torch.rand(count, 1, 1, 1, generator=g) * torch.randn(pictures.shape, generator=g)
    return Batch((pictures + noise).clamp(-1, 1), turned_labels(batch.labels, mirror, degrees), batch.people, batch.face)


def move(pictures: torch.Tensor, mirror: torch.Tensor, degrees: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, size: int) -> torch.Tensor:
    """[B,3,S,S] -> [B,3,size,size]: mirrored (-1), then turned clockwise, zoomed and moved by shift [B,2] in half pictures."""
    angle = torch.deg2rad(degrees)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack([torch.stack([mirror * cos, mirror * sin, shift[:, 0]], 1), torch.stack([-sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(rows, [len(pictures), 3, size, size], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def turned_labels(labels: torch.Tensor, mirror: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """labels [B,6] after `move`: a mirror turns yaw and roll round, a turn adds to roll."""
    labels, (yaw, roll) = labels.clone(), (READINGS.index(name) for name in ("yaw", "roll"))
    labels[:, yaw] *= mirror
    unit = torch.from_numpy(units_of(**{name: np.ones(1) for name in READINGS}) - units_of(**{name: np.zeros(1) for name in READINGS}))
    labels[:, roll] = mirror * labels[:, roll] + degrees * unit[0, roll]
    return labels


def hide_surroundings(batch: Batch, share: float, generator: torch.Generator) -> torch.Tensor:
    """Pictures of which a share has one random colour outside of an ellipse round the face."""
    count, side = len(batch.pictures), batch.pictures.shape[-1]
    axis = (torch.arange(side) + 0.5) / side
    x, y, distance = (batch.face[:, i, None, None] for i in range(3))
    inside = ((axis[None, None] - x) / (FACE[0] / 2 * distance)).square() + ((axis[None, :, None] - y) / (FACE[1] / 2 * distance)).square() < 1
    keep = inside[:, None] | (torch.rand(count, 1, 1, 1, generator=generator) >= share)
    return torch.where(keep, batch.pictures, 2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    """Two box filters of three pixels [B,3,S,S], a blur of about 1.2 pixels (a depthwise convolution is ten times slower here)."""
    for _ in range(2):
        pictures = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    return pictures


# ---------------------------------------------------------------- the codec's handwriting


def decoded_path(folder: Path, clip: Path) -> Path:
    """Where the pictures of a clip lie after the codec."""
    return folder / clip.parents[1].name / clip.name


def decode_clips(config: ProbeConfig, folders: list[str], run: str | Path, decoded: Path) -> int:
    """Send `codec_clips` clips, evenly spread over the corpora, through the codec, those that are not there yet; ranks share
    them. Returns how many this one did."""
    paths, (rank, world) = rendered_clips(folders), rank_and_world()
    chosen = paths[:: max(1, len(paths) // max(1, config.codec_clips))][: config.codec_clips]
    todo = shards.missing(chosen[rank::world], functools.partial(decoded_path, decoded))
    if todo:
        vae = StreamingVAE.from_folder(config.codec or Path(run) / "vae")
        with torch.autocast("cpu", torch.bfloat16, enabled=config.loop.bf16):
            for path in counted(todo, "clips through the codec"):
                clip = shards.read_clip(path)
                shards.write_arrays(decoded_path(decoded, path), clip.card, frames=round_trip(vae, clip.frames))
    meet()
    return len(todo)


def round_trip(vae: StreamingVAE, frames: np.ndarray) -> np.ndarray:
    """uint8 [1+4n,S,S,3] encoded and decoded."""
    return to_bytes(vae.decode(vae.encode(to_float(frames)), vae.new_state()))


# ---------------------------------------------------------------- the stage


def strangers_folder(run: str | Path) -> Path:
    """Corpus of the people that only the gains are set on."""
    return Path(run) / "probe" / "strangers"


def render_strangers(config: ProbeConfig, data: DataConfig, run: str | Path, seed: int) -> int:
    """Render what is missing of the strangers' clips, in the size and length of `data`; returns how many were made."""
    if not config.strangers:
        return 0
    corpus = replace(data, folder=str(strangers_folder(run)), clips=config.strangers, identities=-(-config.strangers // 2), keep_identities=None,
                     first_identity=FIRST_STRANGER, default_share=0.0, silent_share=0.0, real_share=0.0, readings=(), held_clips=0, default_clips=0,
                     default_readings=())
    return render_corpus(corpus, seed)


class Learning(nn.Module):
    """The probe with the people it learns to tell apart; these stay behind when it is saved."""

    def __init__(self, sizes: ProbeSizes, people: int):
        super().__init__()
        self.probe = Probe(sizes)
        self.people = nn.Parameter(torch.randn(people, sizes.identity) / sizes.identity**0.5)


def probe_loss(module: Learning, config: ProbeConfig, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error of the readings plus cross entropy over cosines to the people, with a margin; and metrics."""
    readings, identity, _ = module.probe(batch.pictures)
    error = (readings - batch.labels).square().mean(0)
    cosine = F.normalize(identity, dim=1) @ F.normalize(module.people.float(), dim=1).T
    logits = config.sharpness * (cosine - config.margin * F.one_hot(batch.people, len(module.people)))
    telling = F.cross_entropy(logits, batch.people)
    metrics = {name: float(value) for name, value in zip(READINGS, error.detach())}
    metrics["identity"] = float((cosine.argmax(1) == batch.people).float().mean())
    return error.mean() + config.identity * telling, metrics


def new_module(config: ProbeConfig, people: int, seed: int) -> Learning:
    """A fresh probe, channels last."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Learning(config.sizes, people).to(memory_format=torch.channels_last)


def train_probe(config: ProbeConfig, data_folder: str, run: str | Path, seed: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) the probe; returns the losses of this call."""
    folders, decoded = [data_folder, *config.also], Path(run) / "probe" / "decoded"
    decode_clips(config, folders, run, decoded)
    reader = PictureReader(config, folders, decoded)
    module = new_module(config, len(reader.number), seed)
    trainer = Trainer("probe", module, config.loop, run, seed)
    return trainer.run(lambda draws: probe_loss(module, config, reader.batch(draws).to(trainer.device)), stop_after)


def finish_probe(config: ProbeConfig, data_folder: str, run: str | Path, seed: int, recipe_sha256: str) -> dict:
    """The averaged weights as RUN/probe/probe.{safetensors,json}, with what the probe reads off held-out clips. Returns the card."""
    folders = [data_folder, *config.also]
    paths = rendered_clips(folders)
    people = {person_of(p) for p in paths}
    module = new_module(config, len(people), seed)
    iterations = load_average(module, Path(run) / "probe.pt")
    probe = module.probe.eval().requires_grad_(False)
    strangers = rendered_clips([str(strangers_folder(run))])
    if config.strangers and (not strangers or people & {person_of(p) for p in strangers}):
        raise ConfigError(f"{strangers_folder(run)}: needs clips of people that were not trained on; the probe stage renders them")
    known = strangers if config.strangers else paths
    gains = calibrate(probe, known[:: -(-len(known) // CALIBRATION_CLIPS)])
    card = {"generator": shards.GENERATOR_VERSION, "recipe_sha256": recipe_sha256, "iterations": iterations, "seed": seed,
            "people": len(people), "clips": len(paths), "strangers": config.strangers, "gains": gains}
    held = [shards.read_clip(path) for path in shards.clip_paths(data_folder, "held")]
    if held:
        card["held"] = check(probe, held)
        if config.codec_clips:
            vae = StreamingVAE.from_folder(config.codec or Path(run) / "vae")
            card["held through the codec"] = check(probe, held, [round_trip(vae, clip.frames) for clip in held])
    save_probe(Path(run) / "probe", probe, card)
    return card


@torch.no_grad()
def calibrate(probe: Probe, paths: list[Path]) -> dict[str, float]:
    """Scale the last layer so that on these clean clips readings have slope 1 on the truth within a clip; returns the gains.

    Trained on blurred and noisy pictures, and judging strangers, the probe hedges: it reads a motion as smaller than it is.
    """
    clips = [shards.read_clip(path) for path in paths]
    told = [units_of(**{name: getattr(seen, name) for name in READINGS}) for seen in (probe.look(clip.frames[::CALIBRATION_STEP]) for clip in clips)]
    truth = [labels_of(clip)[::CALIBRATION_STEP] for clip in clips]
    x, y = (np.concatenate([rows - rows.mean(0) for rows in side]) for side in (truth, told))
    moved = (x * x).sum(0)
    gain = torch.from_numpy(np.where(moved > 0, moved / np.where((x * y).sum(0) > 0, (x * y).sum(0), np.inf), 1.0)).float()
    gain = torch.where(gain > 0, gain, 1.0)
    middle = torch.from_numpy(np.concatenate(told).mean(0))
    offset = torch.from_numpy(np.concatenate(truth).mean(0)) - gain * middle
    probe.readings.weight.mul_(gain[:, None])
    probe.readings.bias.mul_(gain).add_(offset.float())
    return {name: round(float(value), 4) for name, value in zip(READINGS, gain)}


# ---------------------------------------------------------------- what it is worth


def check(probe: Probe, clips: list[shards.Clip], pictures: list[np.ndarray] | None = None) -> dict:
    """Per reading: correlation, slope and mean error of what is read against the labels, over all pictures, and within clips
    (each around its own mean, which is how the gates use it); the lag of the aperture; identity errors to the same person's
    portrait and to others'. pictures: to read instead of the clips' own."""
    seen = [probe.look(frames) for frames in (pictures or [clip.frames for clip in clips])]
    report = {"clips": len(clips), "pictures": sum(map(len, seen))}
    for name in READINGS:
        told, truth = [getattr(s, name) for s in seen], [truth_of(clip, name) for clip in clips]
        within = agreement(*(np.concatenate([row - row.mean() for row in side]) for side in (told, truth)))
        report[name] = agreement(np.concatenate(told), np.concatenate(truth)) | {f"{key} within": within[key] for key in ("r", "slope")}
    report["lag"] = best_lag([s.aperture for s in seen], [clip.aperture for clip in clips])
    return report | identity_report(probe, clips, seen)


def truth_of(clip: shards.Clip, name: str) -> np.ndarray:
    """float32 [T] of one of READINGS."""
    pose = ("yaw", "pitch", "roll")
    return clip.pose[:, pose.index(name)] if name in pose else getattr(clip, name)


def agreement(told: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """r, slope of told on truth, mean absolute error; r and slope are None where the truth stands still."""
    moves = truth.std() > 0 and told.std() > 0
    rows = {"r": np.corrcoef(told, truth)[0, 1] if moves else None, "slope": np.polyfit(truth, told, 1)[0] if moves else None,
            "mae": np.abs(told - truth).mean()}
    return {key: None if value is None else round(float(value), 4) for key, value in rows.items()}


def best_lag(told: list[np.ndarray], truth: list[np.ndarray]) -> int:
    """Pictures by which what is told comes late, where both agree best."""
    def agree(lag: int) -> float:
        late = [t[lag:] if lag >= 0 else t[:lag] for t in told]
        early = [t[: len(t) - lag] if lag >= 0 else t[-lag:] for t in truth]
        return float(np.corrcoef(np.concatenate(late), np.concatenate(early))[0, 1])

    return max(LAGS, key=agree)


def identity_report(probe: Probe, clips: list[shards.Clip], seen: list[Seen]) -> dict:
    """Identity errors of every picture to its own person's portrait and to the others', and how often the own is nearest."""
    people = {clip.card["identity"]["seed"]: clip.reference for clip in clips}
    portraits = probe.look(np.stack(list(people.values()))).identity
    same, other, nearest = [], [], []
    for clip, s in zip(clips, seen):
        errors = np.stack([identity_error(s.identity, portrait) for portrait in portraits], axis=1)
        own = list(people).index(clip.card["identity"]["seed"])
        same.append(errors[:, own]), other.append(np.delete(errors, own, axis=1).ravel()), nearest.append(errors.argmin(1) == own)
    same, other, nearest = (np.concatenate(x) for x in (same, other, nearest))
    report = {"same": float(same.mean()), "same 95 %": float(np.percentile(same, 95)), "nearest is own": float(nearest.mean())}
    if len(people) > 1:
        report |= {"other": float(other.mean()), "other 5 %": float(np.percentile(other, 5))}
    return {"people": len(people), "identity error": json.loads(json.dumps(report), parse_float=lambda x: round(float(x), 4))}
