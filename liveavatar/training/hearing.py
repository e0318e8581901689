"""Stage `visemes`: the speech encoder of the embedded avatar, taught by hours of speech without a picture.

Avatars that hear the spectrum know the sentences they were trained on by heart: lips follow r .94 there, .82 elsewhere, .73 with a strange
voice (bench/results/training-v5). Pictures are dear and speech is not, so what sound says of lips is learned from speech alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from liveavatar.conditioning.audio_features import (
    MELS, TICK, TICKS_PER_FRAME, WINDOW, VisemeFrontEnd, log_mels,
)  # fmt: skip
from liveavatar.conditioning.phones import Utterance
from liveavatar.conditioning.visemes import ROUND, WIDE, arkit, articulate, lip_gap, viseme_table
from liveavatar.core import FPS, SAMPLE_RATE, ConfigError, InputError
from liveavatar.models.viseme_encoder import VisemeEncoder, VisemeSizes
from liveavatar.models.weights import save_viseme_encoder
from liveavatar.training import shards
from liveavatar.training.checkpoints import checkpoint_path, load_average
from liveavatar.training.loop import Draws, LoopConfig, Trainer
from liveavatar.training.probing import agreement
from liveavatar.training.progress import counted
from liveavatar.training.synth import speakers, speech

TICKS_PER_SECOND = SAMPLE_RATE // TICK
HELD = 12  # utterances of the held-out voice that `worth` is measured on


@dataclass(frozen=True, kw_only=True)
class VisemesConfig:
    """folder: of the spoken corpus. voices: utterances of each (training/synth/speakers.py). seconds: of a piece that is trained on.
    changed: share of pieces whose sound is changed (speech.augment). warp: mel bands are moved by up to so much of their number, a voice of
    another size. tilt: standard deviation of a random curve over the mel bands, of their own: another microphone."""

    loop: LoopConfig
    folder: str
    voices: dict[str, int] = field(default_factory=lambda: {voice: 1000 if voice in speech.TRAIN_VOICES else 400 for voice in speakers.VOICES})
    sizes: VisemeSizes = VisemeSizes()
    seconds: float = 4.0
    changed: float = 0.8
    warp: float = 0.15
    tilt: float = 0.25

    def __post_init__(self):
        if unknown := sorted(self.voices.keys() - set(speakers.VOICES)):
            raise ConfigError(f"visemes.voices: {', '.join(unknown)}: unknown; known: {', '.join(speakers.VOICES)}")
        if not self.voices or min(self.voices.values()) < 1:
            raise ConfigError(f"visemes.voices={self.voices}: at least one voice, and one utterance of each")
        if self.seconds <= 0 or not 0 <= self.changed <= 1 or not 0 <= self.warp < 1 or self.tilt < 0:
            raise ConfigError(f"visemes: seconds={self.seconds}: positive; changed={self.changed}, warp={self.warp}: in 0..1; tilt={self.tilt}: not negative")


# ---------------------------------------------------------------- the corpus


def articulators_of(said: Utterance) -> np.ndarray:
    """What a mouth does that says it, at every tick of 10 ms: float32 [T,8]."""
    assert viseme_table()["rate_hz"] == TICKS_PER_SECOND
    return articulate(said, np.arange(int(said.seconds * TICKS_PER_SECOND)) / TICKS_PER_SECOND).astype(np.float32)


def speak(config: VisemesConfig, seed: int) -> int:
    """Write what is missing of the spoken corpus; returns how many utterances were."""
    made = 0
    for voice, count in config.voices.items():
        if all(shards.clip_path(config.folder, voice, number).exists() for number in range(count)):
            continue
        spoken = speakers.utterances(voice, count, seed)
        for number in counted(range(count), f"utterances by {voice}"):
            said = next(spoken)
            pcm = np.clip(np.round(said.pcm * 32768), -32768, 32767).astype(np.int16)
            shards.write_arrays(shards.clip_path(config.folder, voice, number), {"voice": voice, "text": said.text}, pcm=pcm,
                                articulators=articulators_of(said).astype(np.float16))  # fmt: skip
            made += 1
    return made


class Spoken:
    """The corpus in memory, 30 kB a second."""

    def __init__(self, config: VisemesConfig):
        self.config, self.ticks = config, round(config.seconds * TICKS_PER_SECOND)
        self.said = [shards.read_arrays(path)[1] for voice in config.voices for path in shards.clip_paths(config.folder, voice)]
        if not self.said:
            raise InputError(f"{config.folder}: no speech; `speak` makes it")
        spread = np.concatenate([said["articulators"] for said in self.said[:: max(1, len(self.said) // 200)]]).astype(np.float32).std(0)
        self.weight = torch.from_numpy(1 / (spread + 0.05) ** 2)[:, None]

    def batch(self, rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """mels float32 [B,40,reach+T] and articulators [B,8,T] of pieces drawn at random, their sound changed."""
        return tuple(torch.from_numpy(np.stack(part)) for part in zip(*(self._piece(rng) for _ in range(count))))

    def _piece(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        said, c = self.said[int(rng.integers(len(self.said)))], self.config
        wanted = said["articulators"]
        start = int(rng.integers(max(1, len(wanted) - self.ticks)))
        wanted = wanted[start : start + self.ticks].astype(np.float32)
        wanted = np.pad(wanted, [(0, self.ticks - len(wanted)), (0, 0)], mode="edge")
        first = TICK * (start - c.sizes.reach + c.sizes.ahead) - WINDOW // 2
        pcm = padded(said["pcm"], first, first + TICK * (self.ticks + c.sizes.reach - 1) + WINDOW)
        if rng.random() < c.changed:
            pcm = speech.augment(pcm, int(rng.integers(2**31)))
        return strange(log_mels(pcm), c, rng).T.astype(np.float32), wanted.T.copy()


def padded(pcm: np.ndarray, first: int, last: int) -> np.ndarray:
    """Samples [first, last) of int16 pcm as float32 in -1..1; silence where there are none."""
    window = np.zeros(last - first, np.float32)
    low, high = max(first, 0), min(last, len(pcm))
    window[low - first : high - first] = pcm[low:high].astype(np.float32) / 32768
    return window


def strange(mels: np.ndarray, config: VisemesConfig, rng: np.random.Generator) -> np.ndarray:
    """Mels [T,40] as of a throat of another size and through another microphone, each half of the time or more."""
    bands = np.arange(MELS)
    if rng.random() < 0.5:
        at = np.clip(bands / (1 + config.warp * float(rng.uniform(-1, 1))), 0, MELS - 1)
        low = np.minimum(at.astype(int), MELS - 2)
        mels = mels[:, low] * (1 - (at - low)) + mels[:, low + 1] * (at - low)
    if rng.random() < 0.7:
        mels = mels + np.interp(bands, np.linspace(0, MELS - 1, 7), config.tilt * rng.normal(size=7))
    return mels


# ---------------------------------------------------------------- the stage


def new_encoder(config: VisemesConfig, seed: int) -> VisemeEncoder:
    """A fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisemeEncoder(config.sizes)


def hearing_loss(encoder: VisemeEncoder, mels: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error of the articulators and half of that of their change over 40 ms, in units of their spread; and the first as a metric."""
    error = (encoder(mels).float() - wanted) * weight.sqrt()
    still, change = error.square().mean(), (error[..., TICKS_PER_FRAME:] - error[..., :-TICKS_PER_FRAME]).square().mean()
    return still + 0.5 * change, {"still": float(still.detach())}


def train_visemes(config: VisemesConfig, run: str | Path, seed: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) the encoder; returns the losses of this call. Writes RUN/visemes and RUN/visemes.json when it is done."""
    encoder, corpus = new_encoder(config, seed), Spoken(config)
    trainer = Trainer("visemes", encoder, config.loop, run, seed)
    weight = corpus.weight.to(trainer.device)

    def loss_of(draws: Draws):
        mels, wanted = (t.to(trainer.device) for t in corpus.batch(draws.numpy, config.loop.batch))
        return hearing_loss(encoder, mels, wanted, weight)

    losses = trainer.run(loss_of, stop_after)
    if trainer.iteration == config.loop.iterations and not trainer.rank:
        encoder = new_encoder(config, seed)
        iteration = load_average(encoder, checkpoint_path(run, "visemes"))
        save_viseme_encoder(Path(run) / "visemes", encoder)
        worth = {name: follows(VisemeFrontEnd(encoder), said) for name, said in held_out(seed).items()}
        (Path(run) / "visemes.json").write_text(json.dumps({"iteration": iteration, "sizes": asdict(config.sizes), **worth}, indent=1))
    return losses


def held_out(seed: int) -> dict[str, list[Utterance]]:
    """Speech that no encoder of ours was trained on: by the held-out voice of the generator, and read by a person."""
    return {speech.HELD_OUT_VOICE: [speech.synthesize(seed + k, 4.0, (speech.HELD_OUT_VOICE,)) for k in range(HELD)],
            speech.READER: list(speech.readings())}


def follows(front_end: VisemeFrontEnd, utterances: Iterable[Utterance]) -> dict[str, float]:
    """Means over utterances of correlation and slope of the lips' gap and width at every picture, as heard against as said."""
    found = {f"{what} {how}": [] for what in ("gap", "width") for how in ("r", "slope")}
    for said in utterances:
        frames = int(said.seconds * FPS)
        heard, true = front_end.features_of(said.pcm, frames)[0].T.numpy(), articulators_of(said)[::TICKS_PER_FRAME][:frames]
        for what, read in (("gap", lambda a: lip_gap(arkit(np.clip(a, 0, 1)))), ("width", lambda a: a[:, WIDE] - a[:, ROUND])):
            agreed = agreement(read(heard), read(true))
            found[f"{what} r"].append(agreed["r"])
            found[f"{what} slope"].append(agreed["slope"])
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}

