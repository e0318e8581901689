"""Hours of speech by many voices, its phones known in time: what the viseme encoder hears in training.

The voices of `flite` read words of a dictionary. Those of `festival`, each a Debian package, speak syllables of their own language, or what
`flite` would say as it would: a stranger's voice is learned from other strangers, whatever they say. Programs that do not tell when a phone is
said read aloud too (narrators.py).
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from liveavatar.conditioning.media import read_audio
from liveavatar.conditioning.phones import PAUSE, PHONES, VOWELS, SpeechError, Utterance, dictionary, merge_pauses
from liveavatar.core import SAMPLE_RATE
from liveavatar.training.synth import narrators, speech

SECONDS = 7.0  # at least, of an utterance by flite
AT_ONCE = 50  # utterances of one call of festival


class FestivalMissing(SpeechError):
    """The `festival` program or one of its voices is not installed."""


@dataclass(frozen=True)
class Language:
    """onsets, nuclei, codas: of random syllables; none: English words. encoding: of the text. phones: names that are not ours -> ours, a
    trailing colon or digit aside."""

    onsets: str = ""
    nuclei: str = ""
    codas: str = ""
    encoding: str = "ascii"
    phones: str = ""

    def text(self, rng: np.random.Generator) -> str:
        """4 to 9 words."""
        def pick(of: str) -> str:
            values = of.split()
            return values[int(rng.integers(len(values)))]

        def word() -> str:
            if not self.onsets:
                return dictionary()[int(rng.integers(len(dictionary())))]
            return "".join(pick(self.onsets) + pick(self.nuclei) + (pick(self.codas) if rng.random() < 0.35 else "")
                           for _ in range(int(rng.integers(1, 5))))

        return " ".join(word() for _ in range(int(rng.integers(4, 10))))

    def said(self, rng: np.random.Generator) -> str:
        """An expression that makes festival say something."""
        return f'(SynthText "{self.text(rng)}")'

    def phone(self, name: str) -> str:
        """One of PHONES; a pause for what is none."""
        ours, plain = self._ours, name.rstrip(":*")
        for known in (name, plain, plain.rstrip("0123456789")):
            if known in ours or known in PHONES:
                return ours.get(known, known)
        doubled = len(plain) == 2 and plain[0] == plain[1] and plain[0] in PHONES  # Russian: a soft consonant
        return plain[0] if doubled else PAUSE

    @functools.cached_property
    def _ours(self) -> dict[str, str]:
        return dict(pair.split("=") for pair in self.phones.split())


class Copied(Language):
    """What flite says, phone by phone and as long: the voices' own dictionary of pronunciations is not free, their sounds are."""

    def said(self, rng: np.random.Generator) -> str:
        theirs = {ours: name for name, ours in self._ours.items()}
        model = str(rng.choice(speech.TRAIN_VOICES))
        said = speech.flite(read(rng), model, speech.PITCH[model], float(rng.uniform(0.85, 1.25)))
        pitch, segments = float(rng.uniform(90, 150)), []
        for phone in said.phones:
            target = f" (0 {pitch * (1.1 - 0.2 * phone.start / said.seconds) * rng.uniform(0.9, 1.2):.0f})" if phone.name in VOWELS else ""
            segments.append(f'("{theirs.get(phone.name, phone.name)}" {phone.end - phone.start:.4f}{target})')
        return f"(utt.synth (Utterance Segments ({' '.join(segments)})))"


_VOWELS = "a=aa e=eh E=eh i=iy o=ao O=ao u=uw "
_TONGUE = "r=d rr=d L=y J=y c=s ts=s dz=z x=hh N=ng "  # a rolled r rounds no lips
ENGLISH = Language()
ITALIAN = Language("p b m f v t d s l r n c g z ch sc gl pr tr br st sp", "a e i o u a e o ia io", "n r l s", "ascii",
                   _VOWELS + _TONGUE + "S=sh tS=ch dZ=jh j=y nf=m")
CZECH = Language("p b m f v t d s l r n k h z c j š ž č ř ch pr tr st", "a e i o u á é í ó ú a e", "n r l s k m t", "iso-8859-2",
                 _VOWELS + _TONGUE + "h=hh s~=sh z~=zh c~=ch ch=hh r~=zh n~=n d~=d t~=t dz~=jh j=y n*=ng")
FINNISH = Language("p m v t s l r n k h j pp mm", "a e i o u y ä ö aa ee ii oo uu ai ei oi au", "n r l s t", "latin-1",
                   _VOWELS + _TONGUE + "h=hh y=uw 7=uh @=ae j=y")
CATALAN = Language("p b m f v t d s l r n c g x j pr tr", "a e i o u", "n r l s m", "latin-1", _VOWELS + _TONGUE + "S=sh Z=zh B=b D=d G=g j=y")
RUSSIAN = Language("п б м ф в т д с л р н к г з ж ш ч х", "а о у э и ы я е ё ю", "н р л с т м к", "utf-8",
                   _VOWELS + _TONGUE + "ay=ax ae=eh ur=uh y=ih yy=ih ii=iy ee=eh oo=ao uu=uw sch=sh h=hh j=y")

BRITISH = Copied(phones="uh=ah e=eh a=ae i=ih u=uh ii=iy uu=uw oo=ao @@=er ei=ey ai=ay oi=oy au=aw ou=ow @=ax h=hh #=pau")
WITHOUT_DICTIONARY = '(define (setup_oald_lex) nil) (lex.create "oald") (lex.set.phoneset "mrpa")'


class Installed(NamedTuple):
    """A voice of festival. package, origin: where it comes from; licence: of the voice, of which nothing but what it said goes into weights.
    first: what is told festival before the voice."""

    language: Language
    package: str
    licence: str
    origin: str = "Debian"
    first: str = ""


FESTIVAL = {
    "kal_diphone": Installed(ENGLISH, "festvox-kallpc16k", "BSD-style"),
    "ked_diphone": Installed(ENGLISH, "festvox-kdlpc16k", "BSD-style"),
    "cmu_us_slt_arctic_hts": Installed(ENGLISH, "festvox-us-slt-hts", "BSD-3-Clause"),
    "rab_diphone": Installed(BRITISH, "festvox-rablpc16k", "BSD-style", "Debian contrib", WITHOUT_DICTIONARY),
    "don_diphone": Installed(BRITISH, "festvox-don", "BSD-style", "Debian contrib", WITHOUT_DICTIONARY),
    "lp_diphone": Installed(ITALIAN, "festvox-italp16k", "GPL-2"),
    "pc_diphone": Installed(ITALIAN, "festvox-itapc16k", "GPL-2"),
    "czech_dita": Installed(CZECH, "festvox-czech-dita", "GPL-3"),
    "czech_krb": Installed(CZECH, "festvox-czech-krb", "GPL-3"),
    "czech_machac": Installed(CZECH, "festvox-czech-machac", "GPL-3"),
    "czech_ph": Installed(CZECH, "festvox-czech-ph", "GPL-2"),
    "suo_fi_lj_diphone": Installed(FINNISH, "festvox-suopuhe-lj", "LGPL-2"),
    "hy_fi_mv_diphone": Installed(FINNISH, "festvox-suopuhe-mv", "LGPL-2"),
    "upc_ca_ona_hts": Installed(CATALAN, "festvox-ca-ona-hts", "LGPL-2.1"),
    "msu_ru_nsh_clunits": Installed(RUSSIAN, "festvox-ru", "BSD-style"),
}
INSTALLED = {**FESTIVAL, **narrators.NARRATORS}
VOICES = (*speech.TRAIN_VOICES, *INSTALLED)


def read(rng: np.random.Generator) -> str:
    """A sentence, or words in a row."""
    return speech.sentence(rng) if rng.random() < 0.35 else ENGLISH.text(rng) + "."


def utterances(voice: str, count: int, seed: int) -> Iterator[Utterance]:
    """`count` of them by one of VOICES; the same seed, the same words. Raises FliteMissing, FestivalMissing, NarratorMissing, SpeechError."""
    rng = np.random.default_rng([seed, 31, *voice.encode()])
    if voice in narrators.NARRATORS:
        return narrators.utterances(voice, count, rng, read)
    return _by_festival(voice, count, rng) if voice in FESTIVAL else _by_flite(voice, count, rng)


def _by_flite(voice: str, count: int, rng: np.random.Generator) -> Iterator[Utterance]:
    for _ in range(count):
        pitch, stretch = speech.PITCH[voice] * float(rng.uniform(0.75, 1.35)), float(rng.uniform(0.8, 1.3))
        parts = []
        while sum(part.seconds for part in parts) < SECONDS:
            parts.append(speech.trimmed(speech.flite(read(rng), voice, pitch, stretch)))
        seconds = sum(part.seconds for part in parts) + float(rng.uniform(0.2, 1.5))
        yield speech.joined(parts, round(seconds * SAMPLE_RATE), rng, voice)


def _by_festival(voice: str, count: int, rng: np.random.Generator) -> Iterator[Utterance]:
    program = shutil.which("festival")
    if program is None:
        raise FestivalMissing(f"festival is not installed: apt install festival {FESTIVAL[voice].package}, or take {voice} out of visemes.voices")
    while count > 0:  # it may give up on a word
        with tempfile.TemporaryDirectory(prefix="festival") as folder:
            said = _spoken(program, voice, min(AT_ONCE, count), rng, Path(folder))
        count -= len(said)
        yield from said


def _spoken(program: str, voice: str, count: int, rng: np.random.Generator, folder: Path) -> list[Utterance]:
    """At most `count`, at least one."""
    language, lines = FESTIVAL[voice].language, [FESTIVAL[voice].first, f"(voice_{voice})"]
    for number in range(count):
        lines += [f"(Parameter.set 'Duration_Stretch {rng.uniform(0.85, 1.25):.2f})", f"(set! said {language.said(rng)})",
                  f'(utt.save.wave said "{folder}/{number}.wav" \'riff)', f'(utt.save.segs said "{folder}/{number}.lab")']  # fmt: skip
    script = folder / "say.scm"
    script.write_bytes("\n".join(lines).encode(language.encoding))
    try:
        done = subprocess.run([program, "-b", str(script)], capture_output=True, text=True, errors="replace", timeout=600)
    except subprocess.TimeoutExpired as error:
        raise SpeechError(f"festival took more than {error.timeout:.0f} s with voice {voice}") from error
    pairs = [(folder / f"{number}.wav", folder / f"{number}.lab") for number in range(count)]
    said = [_marked(np.concatenate(list(read_audio(sound))), marks.read_text(encoding="latin-1"), language, voice)
            for sound, marks in pairs if sound.exists() and marks.exists()]
    if not said:
        raise FestivalMissing(f"festival has no voice {voice}: apt install {FESTIVAL[voice].package}, or take it out of visemes.voices: "
                              f"{done.stderr.strip()[-200:]}")
    return said


def _marked(pcm: np.ndarray, marks: str, language: Language, voice: str) -> Utterance:
    """pcm with the lines "end time, colour, phone" of a label file."""
    pcm = speech.levelled(pcm)
    total, lines = len(pcm) / SAMPLE_RATE, re.findall(r"^\s*([\d.]+)\s+\S+\s+(\S+)", marks, re.MULTILINE)
    ends = [(language.phone(name), float(end)) for end, name in lines]
    return Utterance(pcm, merge_pauses(speech.one_after_another([*ends, (PAUSE, total)], total)), "", voice)
