"""A rendered head that says something, with everything an examiner wants to know about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from liveavatar.conditioning.phones import LIPS_MEET, PAUSE, WIDE_OPEN, Phone
from liveavatar.conditioning.visemes import ARKIT_UNITS
from liveavatar.config import one_of
from liveavatar.core import FPS
from liveavatar.training.synth import director, sound, speech
from liveavatar.training.synth.head import HeadRenderer
from liveavatar.training.synth.people import Identity
from liveavatar.training.synth.raster import CLOSE, View
from liveavatar.training.synth.tracked import VERTICES

PARTING = ("jawOpen", "mouthClose", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthUpperUpLeft", "mouthUpperUpRight")
MUMBLE = 0.5  # share of the lips' parting that is left
FRAMINGS: dict[str, tuple[float, View]] = {  # degrees of yaw, the camera; face in 128 pixels: 80 to 90, 65 to 75, 80 to 90, 41 to 48, 50 to 57
    "close": (0.0, CLOSE), "shoulders": (0.0, View(0.82, 0.0, 0.03)), "turned": (15.0, CLOSE),
    "small": (0.0, View(0.52, 0.0, 0.12)),  # as far away as shows no cut of the bust
    "wide": (0.0, View(0.62, -0.14, 0.06)),  # shoulders and room beside them, the person left of the middle
}  # fmt: skip
TRIES = 200  # sentences looked at for one that has something of everything
ENOUGH = 4  # phones of either kind
SPEECH, PAUSES, SILENCE = (4.0, 9.0), (0.5, 3.0), 20.0  # seconds, of a stream: pieces of speech, pauses, the longest silence
LONG_PAUSE, MOST_PAUSE = 0.3, 0.06  # seconds; share of the time that such pauses may take


@dataclass(frozen=True)
class Performance:
    """frames, mumbled uint8 [T, S, S, 3]; portrait uint8 [S, S, 3]; pcm float32 [n] 16 kHz; motion: gap, width in eye distances,
    blink, and yaw, pitch, roll in degrees, each float32 [T]; points: landmark -> float32 [T, 2] pixels. What is only spoken has no
    frames, motion and points."""

    frames: np.ndarray | None
    mumbled: np.ndarray | None
    portrait: np.ndarray
    pcm: np.ndarray
    phones: tuple[Phone, ...]
    text: str
    caption: str
    motion: dict[str, np.ndarray]
    points: dict[int, np.ndarray]


def dense_speech(seed: int, seconds: float, voice: str, pace: float = 1.0) -> speech.Utterance:
    """The first utterance from `seed` on with few pauses, lips that meet and vowels that open. Raises SpeechError."""
    for k in range(TRIES):
        said = speech.synthesize(1000 * seed + k, seconds, (voice,), pace)
        pauses = sum(p.end - p.start for p in said.phones if p.name == PAUSE and p.end - p.start >= LONG_PAUSE)
        names = [p.name for p in said.phones]
        if pauses <= MOST_PAUSE * seconds and all(sum(n in kind for n in names) >= ENOUGH for kind in (LIPS_MEET, WIDE_OPEN)):
            return said
    raise speech.SpeechError(f"no sentence of voice {voice} in {TRIES} has {ENOUGH} closures and open vowels within {seconds:g} s")


def perform(renderer: HeadRenderer, identity: int, said: speech.Utterance, seconds: float, seed: int, framing: str = "close") -> Performance:
    """Render person `identity` saying it in one of FRAMINGS, and the same once more mumbled."""
    who, frames, (yaw, view) = Identity.sample(identity), round(seconds * FPS), FRAMINGS[framing]
    track = director.direct(said, frames, seed)
    track.pose[:, 0] += yaw
    quiet = track.units.copy()
    quiet[:, [ARKIT_UNITS.index(unit) for unit in PARTING]] *= MUMBLE
    clear, mumbled = (renderer.render_clip(who, units, track.pose, track.translation, track.gaze, view) for units in (track.units, quiet))
    motion = {"gap": [p.aperture for p in clear], "width": [p.width for p in clear], "blink": [-p.lid for p in clear],
              "yaw": track.pose[:, 0], "pitch": track.pose[:, 1], "roll": track.pose[:, 2]}  # fmt: skip
    return Performance(
        frames=np.stack([p.rgb for p in clear]), mumbled=np.stack([p.rgb for p in mumbled]),
        portrait=renderer.neutral(who, yaw, view), pcm=said.pcm, phones=said.phones, text=said.text,
        caption=who.caption, motion={name: np.asarray(values, np.float32) for name, values in motion.items()},
        points=dict(zip(VERTICES, np.stack([p.points for p in clear], axis=1), strict=True)),
    )  # fmt: skip


def spoken_stream(seed: int, seconds: float, voice: str) -> speech.Utterance:
    """Sentences with pauses of 0.5 to 3 s between, one in ten a silence of up to 20 s: what a stream hears in minutes or hours."""
    rng, parts, pcm, phones, at = np.random.default_rng([seed, 0x10E6]), [], [], [], 0
    total = round(seconds * speech.RATE)
    while at < total:
        said = speech.synthesize(1_000_003 * seed + len(parts), float(rng.uniform(*SPEECH)), (voice,))
        pause = float(rng.uniform(PAUSES[1], SILENCE) if rng.random() < 0.1 else rng.uniform(*PAUSES))
        begin, end = at / speech.RATE, (at + len(said.pcm)) / speech.RATE
        parts.append(said)
        pcm += [said.pcm, np.zeros(round(pause * speech.RATE), np.float32)]
        phones += [Phone(p.name, begin + p.start, begin + p.end) for p in said.phones] + [Phone(PAUSE, end, end + pause)]
        at += len(pcm[-2]) + len(pcm[-1])
    phones = [replace(p, end=min(p.end, seconds)) for p in speech.merge_pauses(phones) if p.start < seconds]
    return speech.Utterance(np.concatenate(pcm)[:total], tuple(phones), " ".join(part.text for part in parts), voice)


class Stage:
    """Renders what a line asks for: identity, voice, seed, seconds, size, framing (one of FRAMINGS), sound (one of SOUNDS),
    spoken. One GL context per size."""

    def __init__(self) -> None:
        self._renderer: HeadRenderer | None = None

    def __call__(self, line) -> Performance:
        if self._renderer is None or self._renderer.size != line.size:
            self._renderer = HeadRenderer(line.size)
        one_of("framing", line.framing, tuple(FRAMINGS))
        one_of("sound", line.sound, tuple(sound.SOUNDS))
        if line.spoken:
            who, said = Identity.sample(line.identity), spoken_stream(line.seed, line.seconds, line.voice)
            portrait = self._renderer.neutral(who, *FRAMINGS[line.framing])
            return Performance(None, None, portrait, said.pcm, said.phones, said.text, who.caption, {}, {})
        seconds = line.seconds + speech.LOOKAHEAD_SECONDS
        if line.voice == speech.READER:
            assert line.sound != "fast", "a recording has its own pace"
            said = speech.read_aloud(line.seed, seconds)
        else:
            said = dense_speech(line.seed, seconds, line.voice, sound.FAST if line.sound == "fast" else 1.0)
        made = perform(self._renderer, line.identity, said, line.seconds, line.seed, line.framing)
        return replace(made, pcm=sound.heard(made.pcm, line.sound, line.seed))
