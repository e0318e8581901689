"""Voices that do not tell when they say what, of programs that read English aloud and of people: pocketsphinx finds the phones
(conditioning/phones.align).

What it finds of a voice of flite, whose phones are known, moves the lips as the truth does with r .96 to .99.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from liveavatar.conditioning.media import read_audio
from liveavatar.conditioning.phones import AlignmentError, SpeechError, Utterance, align
from liveavatar.core import SAMPLE_RATE, InputError
from liveavatar.training.progress import LOG
from liveavatar.training.synth import speech

PATIENCE = 20  # texts in a row that cannot be aligned


class NarratorMissing(SpeechError):
    """The program or the package of a voice is not installed."""


def _rhvoice(voice: str, text: str, out: Path, rng: np.random.Generator) -> None:
    """The rate and the pitch are in percent of the voice's own."""
    _run(["RHVoice-test", "-p", voice, "-r", f"{rng.uniform(85, 130):.0f}", "-t", f"{rng.uniform(85, 120):.0f}", "-o", out], text)


def _pico(voice: str, text: str, out: Path, rng: np.random.Generator) -> None:
    asked = f'<speed level="{rng.uniform(80, 120):.0f}"><pitch level="{rng.uniform(80, 125):.0f}">{text}</pitch></speed>'
    _run(["pico2wave", "-l", voice, "-w", out, asked])


@functools.cache
def _hibari_voice(voice: str):
    try:
        from hibari import Hibari
    except ImportError:
        raise NarratorMissing("hibari-tts is not installed") from None
    return Hibari(voice=voice)


def _hibari(voice: str, text: str, out: Path, rng: np.random.Generator) -> None:
    _hibari_voice(voice).save(text, str(out), speed=float(rng.uniform(0.8, 1.25)))


def _run(command: list[str | os.PathLike], text: str | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise NarratorMissing(f"{command[0]} is not installed")
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise SpeechError(f"{command[0]} took more than {error.timeout:.0f} s") from error
    if done.returncode:
        raise SpeechError(f"{command[0]} failed: {done.stderr.strip()[-200:]}")


class Narrator(NamedTuple):
    """say: writes an audio file in which `voice` says a text; the rng draws its pace and pitch. package, origin: where it comes from; licence:
    of the voice, of which nothing but what it said goes into weights."""

    say: Callable[[str, str, Path, np.random.Generator], None]
    voice: str
    package: str
    licence: str
    origin: str = "Debian non-free"


NARRATORS = {
    "bdl": Narrator(_rhvoice, "bdl", "rhvoice, rhvoice-english", "LGPL-2.1+; made from CMU ARCTIC, BSD-style"),
    "clb": Narrator(_rhvoice, "clb", "rhvoice, rhvoice-english", "LGPL-2.1+; made from CMU ARCTIC, BSD-style"),
    "pico_us": Narrator(_pico, "en-US", "libttspico-utils", "Apache-2.0, without its source"),
    "pico_gb": Narrator(_pico, "en-GB", "libttspico-utils", "Apache-2.0, without its source"),
    "heart": Narrator(_hibari, "heart", "hibari-tts", "Apache-2.0", "PyPI"),
}


def utterances(voice: str, count: int, rng: np.random.Generator, read: Callable[[np.random.Generator], str]) -> Iterator[Utterance]:
    """`count` by one of NARRATORS, of two texts that `read` draws. Raises NarratorMissing, SpeechError."""
    who, vain = NARRATORS[voice], 0
    while count and vain < PATIENCE:
        text = f"{read(rng)} {read(rng)}"
        with tempfile.TemporaryDirectory(prefix="narrator") as folder:
            out = Path(folder) / "said.wav"
            try:
                who.say(who.voice, text, out, rng)
            except NarratorMissing as error:
                raise NarratorMissing(f"{error}: install {who.package} ({who.origin}), or take {voice} out of visemes.voices") from None
            pcm = _sound_of(out)
        try:
            said = align(pcm, text.replace(".", " "), voice)
        except AlignmentError:
            vain += 1
            continue
        count, vain = count - 1, 0
        yield speech.trimmed(said)
    if count:
        raise SpeechError(f"{voice}: {PATIENCE} texts in a row could not be aligned")


def recordings(folder: str | Path, known: Collection[str] = ()) -> Iterator[tuple[str, Utterance]]:
    """What people said: for every SPEAKER__NAME.txt in `folder`, English words, but those `known`, its name and the sound of the file SPEAKER__NAME.*
    beside it, aligned. What cannot be is left out, and said so. Raises InputError without a text or without the sound of one."""
    texts = sorted(Path(folder).glob("*.txt"))
    if not texts:
        raise InputError(f"{folder}: no SPEAKER__NAME.txt beside a sound file of that name")
    for path in texts:
        sound = next((other for other in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*")) if other != path), None)
        if sound is None:
            raise InputError(f"{path}: no sound file {path.stem}.* beside it")
        if path.name in known:
            continue
        words = re.sub(r"[^a-z' ]", " ", path.read_text(encoding="utf-8").lower().replace("\n", " "))
        try:
            yield path.name, speech.trimmed(align(_sound_of(sound), words, path.stem.partition("__")[0]))
        except AlignmentError as error:
            LOG.warning("%s: left out: %s", path, error)


def _sound_of(path: Path) -> np.ndarray:
    """A file as float32 [n], 16 kHz, as loud as all others, with a tenth of a second of silence around."""
    return np.pad(speech.levelled(np.concatenate(list(read_audio(path)))), round(0.1 * SAMPLE_RATE))
