"""Stage `visemes`: the speech encoder of the embedded avatar, taught by hours of speech without a picture.

Avatars that hear the spectrum know the sentences they were trained on by heart: lips follow r .94 there, .82 elsewhere, .73 with a strange
voice (bench/results/training-v5). Pictures are dear and speech is not, so what sound says of lips is learned from speech alone. Sixteen voices are
still few: an encoder that begins as the first layers of a recogniser, which has heard people, follows strangers better (bench/results/training-v9),
and best where all whom it hears speak the language (bench/results/training-v11).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from liveavatar.conditioning.audio_features import (
    BLOCK_FRAMES, MELS, SAMPLES_PER_FRAME, TICK, TICKS_PER_FRAME, WINDOW, AudioFrontEnd, log_mels, viseme_front_end,
)  # fmt: skip
from liveavatar.conditioning.phones import Utterance
from liveavatar.conditioning.visemes import ROUND, WIDE, arkit, articulate, lip_gap, viseme_table
from liveavatar.core import FPS, SAMPLE_RATE, ConfigError, InputError
from liveavatar.models.viseme_encoder import MoonshineSizes, MoonshineVisemes, VisemeEncoder, VisemeSizes, load_viseme_encoder
from liveavatar.models.weights import save_viseme_encoder
from liveavatar.training import shards
from liveavatar.training.checkpoints import checkpoint_path, load_average
from liveavatar.training.loop import Draws, LoopConfig, Trainer
from liveavatar.training.moonshine import LICENCE, NOTICE, begin_as_published
from liveavatar.training.probing import agreement
from liveavatar.training.progress import counted
from liveavatar.training.synth import narrators, speakers, speech

TICKS_PER_SECOND = SAMPLE_RATE // TICK
RECORDED = "recorded"  # split of the corpus
HELD = 12  # utterances of the held-out voice that `worth` is measured on


@dataclass(frozen=True, kw_only=True)
class VisemesConfig:
    """folder: of the spoken corpus. voices: utterances of each (training/synth/speakers.py). changed: share of pieces whose sound is changed
    (speech.augment). recordings: a folder of what people said, SPEAKER__NAME.wav and its words in SPEAKER__NAME.txt
    (narrators.recordings); a share `recorded` of the pieces is theirs, of each person as much as of any other.

    Of a VisemeEncoder of `sizes`: seconds of a piece that is trained on; warp: mel bands are moved by up to so much of their number, a voice of
    another size; tilt: standard deviation of a random curve over the mel bands, of their own: another microphone.

    moonshine: the encoder is one of these sizes instead, which begins as the weights in `published` (training/moonshine.py; none: at random).
    Its convolutions are then not trained, and its layers at loop.audio_factor of the rate. Half of its pieces are played up to exp(tempo) times
    as fast or as slow, voice and all; a share `strange` is said by another throat, by `warp` and `tilt` too (another_throat); a share `silent`
    is nothing but faint noise."""

    loop: LoopConfig
    folder: str
    voices: dict[str, int] = field(default_factory=lambda: {voice: 1000 if voice in speech.TRAIN_VOICES else 400 for voice in speakers.VOICES})
    sizes: VisemeSizes = VisemeSizes()
    seconds: float = 4.0
    changed: float = 0.8
    recordings: str = ""
    recorded: float = 0.25
    warp: float = 0.15
    tilt: float = 0.25
    moonshine: MoonshineSizes | None = None
    published: str = ""
    tempo: float = 0.16
    strange: float = 0.6
    silent: float = 0.04

    def __post_init__(self):
        if unknown := sorted(self.voices.keys() - set(speakers.VOICES)):
            raise ConfigError(f"visemes.voices: {', '.join(unknown)}: unknown; known: {', '.join(speakers.VOICES)}")
        if not self.voices or min(self.voices.values()) < 1:
            raise ConfigError(f"visemes.voices={self.voices}: at least one voice, and one utterance of each")
        if self.published and not self.moonshine:
            raise ConfigError(f"visemes.published={self.published!r}: needs visemes.moonshine, the sizes of what begins as it; {{}} has those published")
        if not 0 <= self.recorded <= 1:
            raise ConfigError(f"visemes.recorded={self.recorded}: must be in 0..1")
        if not 0 <= self.tempo < 1 or not 0 <= self.silent <= 1 or not 0 <= self.strange <= 1:
            raise ConfigError(f"visemes: tempo={self.tempo}, silent={self.silent}, strange={self.strange}: in 0..1")
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
            _keep(config, voice, number, next(spoken))
            made += 1
    if config.recordings:
        known = {shards.read_arrays(path, "pcm")[0]["file"] for path in shards.clip_paths(config.folder, RECORDED)}
        for number, (name, said) in enumerate(narrators.recordings(config.recordings, known), len(known)):
            _keep(config, RECORDED, number, said, file=name)
            made += 1
    return made


def _keep(config: VisemesConfig, folder: str, number: int, said: Utterance, **card: str) -> None:
    pcm = np.clip(np.round(said.pcm * 32768), -32768, 32767).astype(np.int16)
    shards.write_arrays(shards.clip_path(config.folder, folder, number), {"voice": said.voice, "text": said.text} | card, pcm=pcm,
                        articulators=articulators_of(said).astype(np.float16))  # fmt: skip


class Spoken:
    """The corpus in memory, 30 kB a second."""

    def __init__(self, config: VisemesConfig):
        self.config, self.ticks = config, round(config.seconds * TICKS_PER_SECOND)
        self.said = [shards.read_arrays(path)[1] for voice in config.voices for path in shards.clip_paths(config.folder, voice)]
        people = defaultdict(list)
        for path in shards.clip_paths(config.folder, RECORDED) if config.recordings else ():
            card, said = shards.read_arrays(path)
            people[card["voice"]].append(said)
        self.recorded = list(people.values())
        if not self.said:
            raise InputError(f"{config.folder}: no speech; `speak` makes it")
        spread = np.concatenate([said["articulators"] for said in self.said[:: max(1, len(self.said) // 200)]]).astype(np.float32).std(0)
        self.weight = torch.from_numpy(1 / (spread + 0.05) ** 2)[:, None]

    def _draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An utterance's pcm and articulators."""
        among = self.said
        if self.recorded and rng.random() < self.config.recorded:
            among = self.recorded[int(rng.integers(len(self.recorded)))]
        return among[int(rng.integers(len(among)))]

    def batch(self, rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """mels float32 [B,40,reach+T] and articulators [B,8,T] of pieces drawn at random, their sound changed."""
        return tuple(torch.from_numpy(np.stack(part)) for part in zip(*(self._piece(rng) for _ in range(count))))

    def _piece(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        said, c = self._draw(rng), self.config
        wanted = said["articulators"]
        start = int(rng.integers(max(1, len(wanted) - self.ticks)))
        wanted = wanted[start : start + self.ticks].astype(np.float32)
        wanted = np.pad(wanted, [(0, self.ticks - len(wanted)), (0, 0)], mode="edge")
        first = TICK * (start - c.sizes.reach + c.sizes.ahead) - WINDOW // 2
        pcm = padded(said["pcm"], first, first + TICK * (self.ticks + c.sizes.reach - 1) + WINDOW)
        if rng.random() < c.changed:
            pcm = speech.augment(pcm, int(rng.integers(2**31)))
        return strange(log_mels(pcm), c, rng).T.astype(np.float32), wanted.T.copy()


class SpokenBlocks(Spoken):
    """The same, as a network on a recogniser hears it: of a batch pcm float32 [B, sum of margins], windows of sound at 16 kHz around a block of
    pictures, and their articulators [B,8,12]."""

    def __init__(self, config: VisemesConfig):
        super().__init__(config)
        self.pause = articulators_of(speech.silence(1.0))[TICKS_PER_SECOND // 2]

    def _piece(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        said, c = self._draw(rng), self.config
        before, after = c.moonshine.margins(BLOCK_FRAMES)
        if rng.random() < c.silent:
            noise = rng.normal(size=before + after) * 10 ** rng.uniform(-5, -2.3)
            return noise.astype(np.float32), np.repeat(self.pause[:, None], BLOCK_FRAMES, axis=1)
        pace = float(np.exp(c.tempo * rng.uniform(-1, 1))) if rng.random() < 0.5 else 1.0
        start = int(rng.integers(-BLOCK_FRAMES * SAMPLES_PER_FRAME, len(said["pcm"])))
        at = start + pace * (np.arange(before + after) - before)
        first = int(np.floor(at[0]))
        source = padded(said["pcm"], first, int(at[-1]) + 2)
        pcm = np.interp(at - first, np.arange(len(source)), source).astype(np.float32)
        if rng.random() < c.strange:
            pcm = another_throat(pcm, c, rng)
        if rng.random() < c.changed:
            pcm = speech.augment(pcm, int(rng.integers(2**31)))
        ticks = (start + pace * SAMPLES_PER_FRAME * np.arange(BLOCK_FRAMES)) / TICK
        wanted = said["articulators"].astype(np.float32)
        return pcm, np.stack([np.interp(ticks, np.arange(len(wanted)), one) for one in wanted.T]).astype(np.float32)


def padded(pcm: np.ndarray, first: int, last: int) -> np.ndarray:
    """Samples [first, last) of int16 pcm as float32 in -1..1; silence where there are none."""
    window = np.zeros(last - first, np.float32)
    low, high = max(first, 0), min(last, len(pcm))
    window[low - first : high - first] = pcm[low:high].astype(np.float32) / 32768
    return window


FRAME, HOP, SMOOTH = 512, 128, 30  # samples; quefrencies of an envelope: above them is pitch


def another_throat(pcm: np.ndarray, config: VisemesConfig, rng: np.random.Generator) -> np.ndarray:
    """pcm float32 [n], 16 kHz, with its formants elsewhere, by up to `warp` of their frequency and each a little differently, and through another
    microphone: a random curve over frequency, of a standard deviation of 2 `tilt` nats; its pitch and time stay. The envelope is the low part of the
    cepstrum, as in the source-filter model of speech."""
    window = np.sqrt(np.hanning(FRAME + 1)[:-1]).astype(np.float32)
    whole = np.pad(pcm, (FRAME, 2 * FRAME))
    spectra = np.fft.rfft(np.lib.stride_tricks.sliding_window_view(whole, FRAME)[::HOP] * window)
    cepstra = np.fft.irfft(np.log(np.abs(spectra) + 1e-4))
    cepstra[:, SMOOTH : FRAME - SMOOTH + 1] = 0
    envelope, bins = np.fft.rfft(cepstra).real, np.arange(FRAME // 2 + 1)
    knots = np.linspace(0, FRAME // 2, 7)
    shift = 1 + config.warp * (float(rng.uniform(-1, 1)) + 0.4 * np.interp(bins, knots, rng.uniform(-1, 1, size=7)))
    at = np.clip(bins / shift, 0, FRAME // 2 - 1e-3)
    low = at.astype(int)
    moved = envelope[:, low] * (1 - (at - low)) + envelope[:, low + 1] * (at - low)
    gain = np.exp(np.clip(moved - envelope + config.tilt * 2 * np.interp(bins, knots, rng.normal(size=7)), -4, 4))
    pieces, made = np.fft.irfft(spectra * gain) * window, np.zeros(len(whole))
    for k in range(FRAME // HOP):
        part = pieces[k :: FRAME // HOP]
        made[k * HOP : k * HOP + part.size] += part.reshape(-1)
    return (made[FRAME : FRAME + len(pcm)] / (FRAME / HOP / 2)).astype(np.float32)


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


def new_encoder(config: VisemesConfig, seed: int) -> VisemeEncoder | MoonshineVisemes:
    """A fresh one, its layers as published where the config says so."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not config.moonshine:
            return VisemeEncoder(config.sizes)
        encoder = MoonshineVisemes(config.moonshine)
    if config.published:
        begin_as_published(encoder, config.published)
        for name, parameter in encoder.encoder.named_parameters():
            parameter.requires_grad_(not name.startswith(("conv", "groupnorm")))
    return encoder


def hearing_loss(encoder: VisemeEncoder | MoonshineVisemes, sound: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error of the articulators and half of that of their change over 40 ms, in units of their spread; and the first as a metric.
    sound, wanted: a batch of Spoken, or of SpokenBlocks, whose articulators are a picture apart."""
    blocks = isinstance(encoder, MoonshineVisemes)
    told, picture = (encoder(sound, BLOCK_FRAMES), 1) if blocks else (encoder(sound), TICKS_PER_FRAME)
    error = (told.float() - wanted) * weight.sqrt()
    still, change = error.square().mean(), (error[..., picture:] - error[..., :-picture]).square().mean()
    return still + 0.5 * change, {"still": float(still.detach())}


def train_visemes(config: VisemesConfig, run: str | Path, seed: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) the encoder; returns the losses of this call. Writes RUN/visemes and RUN/visemes.json when it is done."""
    encoder, corpus = new_encoder(config, seed), (SpokenBlocks if config.moonshine else Spoken)(config)
    trainer = Trainer("visemes", encoder, config.loop, run, seed)
    weight = corpus.weight.to(trainer.device)

    def loss_of(draws: Draws):
        sound, wanted = (t.to(trainer.device) for t in corpus.batch(draws.numpy, config.loop.batch))
        return hearing_loss(encoder, sound, wanted, weight)

    losses = trainer.run(loss_of, stop_after)
    if trainer.iteration == config.loop.iterations and not trainer.rank:
        encoder = new_encoder(config, seed)
        iteration = load_average(encoder, checkpoint_path(run, "visemes"))
        save_viseme_encoder(Path(run) / "visemes", encoder)
        if config.published:
            (Path(run) / "visemes" / NOTICE).write_text(LICENCE, encoding="utf-8")
        front_end = viseme_front_end(load_viseme_encoder(Path(run) / "visemes"))
        worth = {name: follows(front_end, said) for name, said in held_out(seed).items()}
        sizes = asdict(config.moonshine or config.sizes)
        (Path(run) / "visemes.json").write_text(json.dumps({"iteration": iteration, "sizes": sizes, **worth}, indent=1))
    return losses


def held_out(seed: int) -> dict[str, list[Utterance]]:
    """Speech that no encoder of ours was trained on: by the held-out voice of the generator, and read by a person."""
    return {speech.HELD_OUT_VOICE: [speech.synthesize(seed + k, 4.0, (speech.HELD_OUT_VOICE,)) for k in range(HELD)],
            speech.READER: list(speech.readings())}


def follows(front_end: AudioFrontEnd, utterances: Iterable[Utterance]) -> dict[str, float]:
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

