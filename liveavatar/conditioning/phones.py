"""Phones in time: the words of a recording aligned to it, or phones recognised without words.

Both by pocketsphinx with the English model in its package (BSD-2), at 10 ms; needs the extra [train] or [eval].
All audio is 16 kHz mono float32 in -1..1; times are seconds from the first sample.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liveavatar.core import SAMPLE_RATE, LiveAvatarError

PHONES = frozenset(
    "aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p pau r s sh t th uh "
    "uw v w y z zh".split()
)
LIPS_MEET, WIDE_OPEN = frozenset("p b m".split()), frozenset("aa ae ao aw ay".split())
VOWELS = frozenset("aa ae ah ao aw ax ay eh er ey ih iy ow oy uh uw".split())
PAUSE = "pau"
RECOGNISER = {"lw": 2.0, "beam": 1e-20, "pbeam": 1e-20}  # of phones without words: of three settings tried the best on six utterances


class SpeechError(LiveAvatarError):
    """Speech could not be made or aligned."""


class AlignmentError(SpeechError):
    """The recording and its text do not fit together, or a word is unknown."""


@dataclass(frozen=True)
class Phone:
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    pcm: np.ndarray
    phones: tuple[Phone, ...]
    text: str
    voice: str

    @property
    def seconds(self) -> float:
        return len(self.pcm) / SAMPLE_RATE


def merge_pauses(phones: Iterable[Phone]) -> tuple[Phone, ...]:
    """The same phones with neighbouring pauses made one."""
    out: list[Phone] = []
    for p in phones:
        if out and out[-1].name == PAUSE == p.name:
            out[-1] = replace(out[-1], end=p.end)
        else:
            out.append(p)
    return tuple(out)


def align(pcm16k: np.ndarray, text: str, voice: str = "recording") -> Utterance:
    """Phone times of a recording with known words, on pocketsphinx's 10 ms grid.

    pcm16k: int16 or float32 [n]. Raises AlignmentError where text and sound do not fit.
    """
    pcm = _float_pcm(pcm16k)
    raw, words = _raw(pcm), re.findall(r"[a-z']+", text.lower())
    dec = _decoder()
    unknown = [w for w in words if dec.lookup_word(w) is None]
    if unknown or not words:
        raise AlignmentError(f"not in the dictionary: {', '.join(unknown) or '(no words)'}")
    try:
        found = _phone_times(raw, words)
    except (RuntimeError, TypeError) as e:
        raise AlignmentError(f"no alignment of {text!r}: {e}") from e
    return Utterance(pcm, _gapless(found, len(pcm) / SAMPLE_RATE), " ".join(words), voice)


def recognise(pcm16k: np.ndarray, voice: str = "recording") -> Utterance:
    """Phones of English speech with unknown words, text empty; about two of three are right, most others of the same shape of mouth."""
    pcm = _float_pcm(pcm16k)
    dec = _decoder(allphone=True)
    _listen(dec, _raw(pcm))
    found = [(s.word, s.start_frame, s.end_frame + 1 - s.start_frame) for s in dec.seg() or ()]
    return Utterance(pcm, _gapless(found, len(pcm) / SAMPLE_RATE), "", voice)


def _float_pcm(pcm: np.ndarray) -> np.ndarray:
    pcm = np.asarray(pcm)
    return pcm.astype(np.float32) / 32768.0 if pcm.dtype == np.int16 else pcm.astype(np.float32)


def _raw(pcm: np.ndarray) -> bytes:
    return np.clip(np.round(pcm * 32768), -32768, 32767).astype("<i2").tobytes()


def _gapless(found: list[tuple[str, int, int]], total: float) -> tuple[Phone, ...]:
    """(name, first frame, frames) of 10 ms -> phones that fill 0..total seconds; what is no phone is a pause."""
    at, phones = 0.0, []
    for name, start, duration in found:
        start, end = start / 100, min((start + duration) / 100, total)
        if start > at + 1e-6:
            phones.append(Phone(PAUSE, at, start))
        if end > start:
            phones.append(Phone(name.lower() if name.lower() in PHONES else PAUSE, start, end))
            at = end
    if total > at:
        phones.append(Phone(PAUSE, at, total))
    return merge_pauses(phones)


@functools.cache
def model_sha256() -> str:
    """Of the names and bytes of the English model's files. Raises SpeechError without pocketsphinx."""
    get_model_path, digest = _pocketsphinx().get_model_path, hashlib.sha256()
    folder = Path(get_model_path("en-us"))
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def dictionary() -> tuple[str, ...]:
    """The words of the English model, in letters alone. Raises SpeechError without pocketsphinx."""
    path = Path(_pocketsphinx().get_model_path("en-us")) / "cmudict-en-us.dict"
    return tuple(re.findall(r"^([a-z]+) ", path.read_text(encoding="utf-8"), re.MULTILINE))


def _pocketsphinx():
    try:
        import pocketsphinx
    except ImportError as e:
        raise SpeechError("pocketsphinx is not installed: pip install 'liveavatar[eval]'") from e
    return pocketsphinx


def _decoder(allphone: bool = False):
    """A new decoder for every recording: it adapts to what it hears, and times must not depend on that."""
    package, said = _pocketsphinx(), {"samprate": SAMPLE_RATE, "lm": None, "loglevel": "FATAL"}
    if allphone:
        return package.Decoder(**said, allphone=package.get_model_path("en-us/en-us-phone.lm.bin"), **RECOGNISER)
    return package.Decoder(**said)


def _listen(dec, raw: bytes) -> None:
    dec.start_utt()
    dec.process_raw(raw, full_utt=True)
    dec.end_utt()


def _phone_times(raw: bytes, words: list[str]) -> list[tuple[str, int, int]]:
    """(name, first frame, frames) of every phone. A second pass that fails is retried on two parts."""
    dec = _decoder()
    dec.set_align_text(" ".join(words))
    _listen(dec, raw)
    seg = [(s.word, s.start_frame, s.end_frame) for s in dec.seg() or ()]
    try:
        dec.set_alignment()
        _listen(dec, raw)
        return [(p.name, p.start, p.duration) for w in dec.get_alignment() for p in w]
    except RuntimeError:
        spoken = [k for k, s in enumerate(seg) if not s[0].startswith(("<", "["))]
        if len(spoken) != len(words) or len(words) < 2:
            raise
        # Cut at the longest silence between two words.
        gap, n = max((seg[spoken[i]][1] - seg[spoken[i - 1]][2], i) for i in range(1, len(words)))
        if gap < 4:
            raise
        cut = (seg[spoken[n]][1] + seg[spoken[n - 1]][2]) // 2
        at = cut * SAMPLE_RATE // 100 * 2
        right = _phone_times(raw[at:], words[n:])
        return _phone_times(raw[:at], words[:n]) + [(p, k + cut, d) for p, k, d in right]
