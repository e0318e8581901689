"""Stage `data`: a corpus of rendered heads that speak (training.md section 5).

Clip k of a split is a function of (seed, split, k) alone, so rendering resumes where it stopped and
two machines make the same bytes with the same back end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liveavatar.conditioning.phones import align
from liveavatar.core import FPS, SAMPLE_RATE, ConfigError
from liveavatar.training.progress import counted
from liveavatar.training.shards import GENERATOR_VERSION, Clip, clip_path, clip_paths, missing, read_arrays, write_arrays, write_clip
from liveavatar.training.synth import director, speech
from liveavatar.training.synth.head import HeadRenderer
from liveavatar.training.synth.people import DRESS as DRESS_PARTS
from liveavatar.training.synth.people import Identity

DRESS, PORTRAITS, TURNED = 1, 2, 3  # what a generator beside a clip's own is for
SPLITS = ("train", "held", "default")  # default: the avatar that ships, with words and voices it was not trained on


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus. size: picture side in pixels; height, width: sides that differ, of clips of videos. pictures: 1 + 4n per clip."""

    folder: str
    size: int = 128
    height: int | None = None  # None: size
    width: int | None = None
    supersample: int = 2
    pictures: int = 93
    clips: int = 384
    identities: int = 64
    first_identity: int = 0
    keep_identities: int | None = None  # only clips of so many of the identities are rendered; None: all
    default_identity: int = 0  # the avatar that ships
    default_share: float = 0.1  # of the clips show it
    held_clips: int = 12
    held_identities: int = 4
    real_share: float = 0.15  # clips spoken by the LibriVox readers
    silent_share: float = 0.12  # listening clips
    dress_share: float = 0.0  # of the clips show their person in other clothes before another backdrop than usual
    turned_share: float = 0.0  # of the training clips, and their portraits, show their person from aside
    turned: float = 22.0  # by up to so many degrees to either side
    portraits: int = 0  # per clip, of its person dressed otherwise: where prompt and portrait differ, the prompt must win
    partial_portraits: int = 0  # per clip, in another shirt alone, and as many before another backdrop alone
    default_clips: int = 0  # of the default split: the held-out voice
    default_readings: tuple[str, ...] = ()  # LibriVox clips that the default split ends with, cut into windows; never trained on
    readings: tuple[str, ...] = ()  # LibriVox clips to train on; those in assets/speech.wav must not be here

    def __post_init__(self):
        if self.pictures < 13 or (self.pictures - 1) % 4:
            raise ConfigError(f"data.pictures={self.pictures}: must be 1 + 4n, at least 13")
        for name in ("size", "height", "width"):
            if (side := getattr(self, name)) is not None and (side % 16 or side <= 0):
                raise ConfigError(f"data.{name}={side}: must be a positive multiple of 16 pixels")
        for name, most in (("dress_share", 1), ("turned_share", 1), ("turned", 45)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"data.{name}={getattr(self, name):g}: must be in 0..{most}")
        for name, least in (("clips", 1), ("identities", 1), ("held_clips", 0), ("held_identities", 1), ("default_clips", 0), ("portraits", 0),
                            ("partial_portraits", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be at least {least}")
        if heard := set(self.readings) & set(self.default_readings):
            raise ConfigError(f"data.default_readings: {sorted(heard)[0]!r} is trained on (data.readings)")

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of a picture."""
        return self.height or self.size, self.width or self.size


def window_of(utterance: speech.Utterance, start: float, seconds: float) -> speech.Utterance:
    """The piece [start, start + seconds) with its phones; silence where the recording has ended."""
    first, count = round(start * SAMPLE_RATE), round(seconds * SAMPLE_RATE)
    pcm = np.zeros(count, np.float32)
    piece = utterance.pcm[first : first + count]
    pcm[: len(piece)] = piece
    phones, at = [], 0.0
    for phone in utterance.phones:
        a, b = max(phone.start - start, 0.0), min(phone.end - start, seconds)
        if b > a:
            phones.append(speech.Phone(phone.name, a, b))
            at = b
    if at < seconds:
        phones.append(speech.Phone("pau", at, seconds))
    return replace(utterance, pcm=pcm, phones=tuple(phones))


def windows_of(utterance: speech.Utterance, config: DataConfig) -> list[speech.Utterance]:
    """The utterance cut into pieces of a clip's length, a rest of less than half of one left out."""
    seconds = config.pictures / FPS
    return [window_of(utterance, k * seconds, seconds + speech.LOOKAHEAD_SECONDS) for k in range(max(1, round(utterance.seconds / seconds)))]


def load_readings(names: tuple[str, ...]) -> list[speech.Utterance]:
    """The named LibriVox clips with their phones. Raises ConfigError when one is not installed."""
    listing = speech.TEXTS / "transcription"
    if names and not listing.exists():
        raise ConfigError(f"data.readings: {listing} is missing: apt install pocketsphinx-testdata, or name no readings")
    lines = re.findall(r"<s>\s*(.*?)\s*</s>\s*\((.+)\)", listing.read_text()) if names else []
    texts = {name: text for text, name in lines}
    unknown = [name for name in names if name not in texts]
    if unknown:
        raise ConfigError(f"data.readings: {unknown[0]!r} is not one of {', '.join(sorted(texts))}")
    return [align(speech.read_wav(speech.TEXTS / f"{name}.wav"), texts[name], voice=name) for name in names]


def choose_identity(config: DataConfig, split: str, index: int, rng: np.random.Generator) -> int:
    """Identity seed of clip `index`: round robin, with an extra share for the avatar that ships."""
    if split == "held":
        return 1_000_000 + index % config.held_identities
    if split == "default" or rng.random() < config.default_share:
        return config.default_identity
    return config.first_identity + index % config.identities


def choose_speech(config: DataConfig, split: str, index: int, seed: int, rng: np.random.Generator,
                  recordings: list[speech.Utterance]) -> speech.Utterance:
    """What is said in a clip: silence, a window of a real reading, or a synthetic voice."""
    if split == "default" and index >= config.default_clips:
        return recordings[index - config.default_clips]
    seconds = config.pictures / FPS + speech.LOOKAHEAD_SECONDS
    kind = rng.random()
    if split != "train":
        return speech.synthesize(seed, seconds, (speech.HELD_OUT_VOICE,))
    if kind < config.silent_share:
        return speech.silence(seconds, seed)
    if kind < config.silent_share + config.real_share and recordings:
        reader = recordings[int(rng.integers(len(recordings)))]
        return window_of(reader, float(rng.uniform(0, max(0.0, reader.seconds - 0.8 * seconds))), seconds)
    return speech.synthesize(seed, seconds, speech.TRAIN_VOICES)


def make_clip(config: DataConfig, split: str, index: int, base_seed: int, renderer: HeadRenderer,
              recordings: list[speech.Utterance]) -> Clip:
    """Render clip `index` of a split; see the module text."""
    rng, seed = clip_draws(split, index, base_seed)
    identity = Identity.sample(choose_identity(config, split, index, rng))
    dress = np.random.default_rng([DRESS, seed])
    if split == "train" and dress.random() < config.dress_share:
        identity = identity.dressed(dress)
    utterance = choose_speech(config, split, index, seed, rng, recordings)
    track, yaw = director.direct(utterance, config.pictures, seed), turned_by(config, split, seed)
    track.pose[:, 0] += yaw
    pictures = renderer.render_clip(identity, track.units, track.pose, track.translation, track.gaze)
    card = {"generator": GENERATOR_VERSION, "seed": seed, "split": split, "index": index, "caption": identity.caption,
            "identity": identity.record(), "voice": utterance.voice, "text": utterance.text, "fps": FPS,
            "phones": [[p.name, round(p.start, 4), round(p.end, 4)] for p in utterance.phones]} | ({"turned": yaw} if yaw else {})

    def stack(name: str) -> np.ndarray:
        return np.array([getattr(p, name) for p in pictures], np.float32)

    return Clip(frames=np.stack([p.rgb for p in pictures]), reference=renderer.neutral(identity, yaw),
                pcm=np.clip(np.round(utterance.pcm * 32767), -32768, 32767).astype(np.int16),
                mouth=stack("mouth_box"), eyes=stack("eye_boxes"), aperture=stack("aperture"), width=stack("width"),
                lid=stack("lid"), units=track.units, pose=track.pose, card=card)


def turned_by(config: DataConfig, split: str, seed: int) -> float:
    """Degrees of yaw that the person of a clip, and its portrait, are turned by."""
    rng = np.random.default_rng([TURNED, seed])
    return round(float(rng.uniform(-config.turned, config.turned)), 2) if split == "train" and rng.random() < config.turned_share else 0.0


def is_kept(config: DataConfig, split: str, index: int, base_seed: int) -> bool:
    """Whether clip `index` shows one of the identities that are kept; the clips kept are the same bytes as without."""
    if split != "train" or config.keep_identities is None:
        return True
    rng = clip_draws(split, index, base_seed)[0]
    identity = choose_identity(config, split, index, rng)
    return identity == config.default_identity or identity - config.first_identity < config.keep_identities


def clip_draws(split: str, index: int, base_seed: int) -> tuple[np.random.Generator, int]:
    """The generator of a clip, and its seed for what others draw."""
    rng = np.random.default_rng([base_seed, SPLITS.index(split), index])
    return rng, int(rng.integers(2**31))


def render_corpus(config: DataConfig, seed: int) -> int:
    """Render every clip that is not there yet; returns how many were made. Held-out clips come early."""
    jobs = [("held", i) for i in range(config.held_clips)]
    jobs = [("train", i) for i in range(min(24, config.clips))] + jobs
    jobs += [("train", i) for i in range(24, config.clips)]
    windows = [w for reading in load_readings(config.default_readings) for w in windows_of(reading, config)]
    jobs += [("default", i) for i in range(config.default_clips + len(windows))]
    jobs = [job for job in jobs if is_kept(config, *job, seed) and not clip_path(config.folder, *job).exists()]
    if not jobs:
        return 0
    renderer = HeadRenderer(config.size, config.supersample)
    recordings = load_readings(config.readings)
    for split, index in counted(jobs, "clips"):
        clip = make_clip(config, split, index, seed, renderer, windows if split == "default" else recordings)
        write_clip(clip_path(config.folder, split, index), clip)
    return len(jobs)


# ---------------------------------------------------------------- portraits that differ from their clips


def portraits_path(clip: Path) -> Path:
    """Where the portraits of a clip file lie: beside its split, SPLIT_portraits/NAME."""
    return clip.parent.with_name(f"{clip.parent.name}_portraits") / clip.name


def exchanged(config: DataConfig) -> list[tuple[str, ...]]:
    """What is other than in the clip, portrait by portrait."""
    return [DRESS_PARTS] * config.portraits + [(part,) for part in DRESS_PARTS] * config.partial_portraits


def render_portraits(config: DataConfig, seed: int) -> int:
    """Render the portraits that are not there yet of every clip that is; returns for how many clips."""
    kinds = exchanged(config)
    todo = missing(clip_paths(config.folder, "train"), portraits_path) if kinds else []
    renderer = HeadRenderer(config.size, config.supersample) if todo else None
    for path in counted(todo, "clips with portraits"):
        card = read_arrays(path, "card")[0]
        rng = np.random.default_rng([PORTRAITS, seed, card["seed"]])
        others = [Identity(**card["identity"]).dressed(rng, parts) for parts in kinds]
        write_arrays(portraits_path(path), {"captions": [other.caption for other in others], "exchanged": kinds},
                     portraits=np.stack([renderer.neutral(other, card.get("turned", 0.0)) for other in others]))
    return len(todo)


@dataclass(frozen=True)
class Portraits:
    """A clip's person dressed otherwise: pictures uint8 [n,S,S,3]; exchanged: which of shirt and background are other than in the clip."""

    pictures: np.ndarray
    exchanged: list[list[str]]


def read_portraits(clip: Path) -> Portraits | None:
    """The portraits of a clip file; None where none were rendered."""
    path = portraits_path(clip)
    if not path.exists():
        return None
    card, arrays = read_arrays(path)
    pictures = arrays["portraits"]
    return Portraits(pictures, card.get("exchanged", [list(DRESS_PARTS)] * len(pictures)))  # of before, when always both were
