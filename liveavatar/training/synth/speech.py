"""Speech whose phones are known in time.

Two sources: `synthesize` (the `flite` program, which prints every phone with its end time under
`-psdur`) and recordings with their text (conditioning/phones.py): `read_aloud`, of the one that ships.
All audio is 16 kHz mono float32 in -1..1; times are seconds from the first sample.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from liveavatar.conditioning.phones import PHONES, Phone, SpeechError, Utterance, align, merge_pauses
from liveavatar.core import SAMPLE_RATE

RATE = SAMPLE_RATE
LOOKAHEAD_SECONDS = 0.16  # of sound kept beyond the last picture: the front end looks 0.125 s ahead
LOUDEST = 0.5
TRAIN_VOICES = ("slt", "rms", "kal16")
HELD_OUT_VOICE = "awb"
TEXTS = Path("/usr/share/pocketsphinx/test/data/librivox")
RECORDING, READER = Path(__file__).parents[2] / "assets" / "speech.wav", "reading"
READ = ((47_840, "he was not an ill disposed young man"),  # samples of it, and the words
        (84_800, "unless to be rather cold hearted and rather selfish is to be ill disposed"))  # fmt: skip


class FliteMissing(SpeechError):
    """The `flite` program is not installed (Debian: apt install flite)."""


# --------------------------------------------------------------------------- sentences

_NAMES = "my mother,the baby,Bob,a famous chef,the farmer,her brother,our team,Sophie,the pilot,Joy,a young boy,the boss,everybody,George,Pam,the old judge".split(",")
_VERBS = "bought,found,painted,moved,brought,measured,watched,carried,loved,picked up,gave away,showed us,pushed,remembered,put down,forgot".split(",")
_ADJ = "five,purple,big,fresh,warm,beautiful,thin,heavy,tiny,yellow,cheap,smooth,brown,valuable,few,huge".split(",")
_NOUNS = "maps,boats,apples,books,shoes,photographs,mushrooms,leaves,toys,cups,puppies,vegetables,oysters,trees,pumps,chairs".split(",")
_PLACES = "from the farm,by the window,in the big room,above the bathtub,after breakfast,before the movie,on the beach,with both thumbs,near the old house,for a while,at the top of the hill,under the bridge".split(",")
_SHORT = "maybe not,I suppose so,good evening,what a view,please help me,of course,that is enough,come back soon,five more,thank you,I hope so,move over,perhaps we may,why not,go home".split(",")
_LINKS = "and,but,because,while,so".split(",")
_QUEST = "why did,how would,where did,when would".split(",")
_BASE = "buy,find,paint,move,bring,measure,watch,carry,love,pick up,give away,choose,push,remember,put down,forget".split(",")


def sentence(rng: np.random.Generator, budget: float = 1e9) -> str:
    """One sentence of at most about `budget` seconds at normal rate (14 letters a second)."""
    def pick(words):
        return words[int(rng.integers(len(words)))]

    def clause():
        return f"{pick(_NAMES)} {pick(_VERBS)} {pick(_ADJ)} {pick(_NOUNS)}"

    forms = (
        lambda: pick(_SHORT),
        clause,
        lambda: f"{pick(_NAMES)} will {pick(_BASE)} the {pick(_NOUNS)}",
        lambda: f"{clause()} {pick(_PLACES)}",
        lambda: f"{pick(_QUEST)} {pick(_NAMES)} {pick(_BASE)} {pick(_ADJ)} {pick(_NOUNS)}",
        lambda: f"{clause()} {pick(_LINKS)} {pick(_NAMES)} {pick(_VERBS)} the {pick(_NOUNS)} {pick(_PLACES)}",
    )
    weights = np.array([1, 3, 2, 4, 2, 2.0])
    text = pick(_SHORT)
    for _ in range(6):
        candidate = forms[int(rng.choice(len(forms), p=weights / weights.sum()))]()
        if len(candidate) / 14 <= budget:
            text = candidate
            break
    return text[0].upper() + text[1:] + "."


# --------------------------------------------------------------------------- flite

PITCH = {"slt": 170.0, "rms": 95.0, "kal16": 105.0, "kal": 105.0, "awb": 125.0}


def read_wav(path: str | Path) -> np.ndarray:
    """float32 [n] of a 16 kHz mono 16-bit file, sample for sample. Raises SpeechError on any other."""
    with wave.open(str(path), "rb") as w:
        if (w.getframerate(), w.getnchannels(), w.getsampwidth()) != (RATE, 1, 2):
            raise SpeechError(f"{path}: expected 16 kHz mono 16-bit")
        return np.frombuffer(w.readframes(w.getnframes()), "<i2").astype(np.float32) / 32768.0


def flite(text: str, voice: str, pitch: float, stretch: float) -> Utterance:
    """One utterance, about `pitch` Hz, its phones `stretch` times as long as the voice's own. Raises FliteMissing, SpeechError."""
    exe = shutil.which("flite")
    if exe is None:
        raise FliteMissing("flite is not installed: apt install flite")
    with tempfile.TemporaryDirectory(prefix="flite") as d:
        out = Path(d) / "a.wav"
        cmd = [exe, "-voice", voice, "-psdur", "--setf", f"int_f0_target_mean={pitch:.1f}",
               "--setf", f"duration_stretch={stretch:.3f}", "-t", text, "-o", str(out)]
        try:
            done = subprocess.run(cmd, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired as e:
            raise SpeechError(f"flite took more than {e.timeout:.0f} s") from e
        if done.returncode or not out.exists():
            raise SpeechError(f"flite failed for voice {voice}: {done.stderr.strip()[:200]}")
        pcm = read_wav(out)
    marks = re.findall(r"([a-z@#_]+):(\d+\.\d+)", done.stdout)
    total = len(pcm) / RATE
    phones = one_after_another(((name if name in PHONES else "pau", float(end)) for name, end in marks), total)
    if len(phones) < 3 or total - phones[-1].end > 0.2:
        raise SpeechError(f"flite -psdur gave no usable phone times: {done.stdout[:200]!r}")
    phones[-1] = replace(phones[-1], end=total)
    return Utterance(pcm, tuple(phones), text, voice)


def one_after_another(ends: Iterable[tuple[str, float]], total: float) -> list[Phone]:
    """Phones by name and end in seconds, in order, from 0; at most to `total`: a diphone voice ends in the middle of its last pause, and the
    audio is the authority."""
    start, phones = 0.0, []
    for name, end in ends:
        end = min(end, total)
        if end > start:
            phones.append(Phone(name, start, end))
            start = end
    return phones


def levelled(pcm: np.ndarray) -> np.ndarray:
    """float32 [n] in -1..1 as loud as all others: its largest sample is LOUDEST."""
    return (pcm * (LOUDEST / max(1e-3, float(np.abs(pcm).max())))).astype(np.float32)


def _cut(u: Utterance, a: float, b: float) -> Utterance:
    i, j = round(a * RATE), round(b * RATE)
    a, b = i / RATE, j / RATE
    kept = tuple(Phone(p.name, max(p.start, a) - a, min(p.end, b) - a)
                 for p in u.phones if min(p.end, b) - max(p.start, a) > 1e-6)
    return replace(u, pcm=u.pcm[i:j], phones=kept)


def silence(seconds: float, seed: int = 0) -> Utterance:
    """A listening clip: faint noise and one long pause."""
    n = round(seconds * RATE)
    pcm = np.random.default_rng([seed, 17]).normal(0, 3e-4, n).astype(np.float32)
    return Utterance(pcm, (Phone("pau", 0.0, n / RATE),), "", "silence")


def synthesize(seed: int, seconds: float, voices=TRAIN_VOICES, pace: float = 1.0) -> Utterance:
    """Grammar sentences, joined by pauses, exactly `seconds` long. The same seed, the same bytes. pace: of every phone's duration."""
    rng = np.random.default_rng([int(seed), 5])
    voice = str(voices[int(rng.integers(len(voices)))])
    pitch = PITCH.get(voice, 120.0) * float(rng.uniform(0.82, 1.22))
    stretch = pace * float(rng.uniform(0.88, 1.22))
    n = round(seconds * RATE)
    parts: list[Utterance] = []
    left, tries = seconds, 0
    while left > 0.7 and tries < 5:
        u = trimmed(flite(sentence(rng, (left - 0.1) / stretch), voice, pitch, stretch))
        if u.seconds <= left:
            parts.append(u)
            left -= u.seconds + 0.05
        else:
            tries += 1
    if not parts:  # shorter than any sentence: the beginning of one
        u = flite(sentence(rng, 0.0), voice, pitch, stretch)
        parts = [_cut(u, 0.0, min(u.seconds, n / RATE))]
    return joined(parts, n, rng, voice)


def trimmed(u: Utterance) -> Utterance:
    """With a tenth of a second of silence around."""
    first, last = u.phones[0], u.phones[-1]
    a = max(0.0, first.end - 0.10) if first.name == "pau" else 0.0
    b = min(u.seconds, last.start + 0.12) if last.name == "pau" else u.seconds
    return _cut(u, a, b)


def joined(parts: list[Utterance], n: int, rng: np.random.Generator, voice: str) -> Utterance:
    """n samples: the parts in order, what is left of the time between and around them."""
    spare = n - sum(len(p.pcm) for p in parts)
    share = rng.dirichlet(np.full(len(parts) + 1, 2.0))
    gaps = np.floor(share * spare).astype(int)
    gaps[-1] += spare - gaps.sum()
    gaps = gaps.tolist()
    pcm, phones, at = [], [], 0
    for k, gap in enumerate(gaps):
        if gap:
            pcm.append(np.zeros(gap, np.float32))
            phones.append(Phone("pau", at / RATE, (at + gap) / RATE))
            at += gap
        if k < len(parts):
            pcm.append(parts[k].pcm)
            phones += [Phone(p.name, p.start + at / RATE, p.end + at / RATE) for p in parts[k].phones]
            at += len(parts[k].pcm)
    return Utterance(np.concatenate(pcm)[:n], merge_pauses(phones), " ".join(p.text for p in parts), voice)


# --------------------------------------------------------------------------- read by a person


@functools.cache
def readings() -> tuple[Utterance, ...]:
    """The sentences of the recording that ships, which no avatar of ours was trained on."""
    pcm, at, found = read_wav(RECORDING), 0, []
    for samples, text in READ:
        found.append(trimmed(align(pcm[at : at + samples], text, voice=READER)))
        at += samples
    return tuple(found)


def read_aloud(seed: int, seconds: float) -> Utterance:
    """Sentences of `readings` in an order and with pauses drawn from the seed, whole ones, as many as there is time for."""
    rng, parts = np.random.default_rng([int(seed), 23]), []
    for k in rng.permutation(len(READ)).tolist() * 3:
        if sum(p.seconds + 0.05 for p in (*parts, readings()[k])) <= seconds:
            parts.append(readings()[k])
    return joined(parts, round(seconds * RATE), rng, READER)


# --------------------------------------------------------------------------- augmentation

def _warp_formants(pcm: np.ndarray, ratio: float) -> np.ndarray:
    """Move the spectral envelope by `ratio`, keep pitch and timing (cepstral envelope, 32 ms frames)."""
    n, hop = 512, 128
    x = np.pad(pcm, (n, 2 * n))
    frames = np.lib.stride_tricks.sliding_window_view(x, n)[::hop]
    win = np.hanning(n + 1)[:n].astype(np.float32)
    spec = np.fft.rfft(frames * win, axis=1)
    cep = np.fft.irfft(np.log(np.abs(spec) + 1e-5), axis=1)
    cep[:, 31:-30] = 0
    env = np.fft.rfft(cep, axis=1).real
    k = np.arange(env.shape[1]) / ratio
    i = np.minimum(k.astype(int), env.shape[1] - 2)
    f = np.clip(k - i, 0, 1)
    gain = np.exp(np.clip(env[:, i] * (1 - f) + env[:, i + 1] * f - env, -3, 3))
    back = np.fft.irfft(spec * gain, axis=1) * win
    y, w = np.zeros(len(x)), np.zeros(len(x))
    for o in range(0, n, hop):  # frames that share an offset do not overlap
        part = back[o // hop::n // hop]
        y[o:o + part.size] += part.ravel()
        w[o:o + part.size] += np.tile(win**2, len(part))
    return (y / np.maximum(w, 0.1))[n:n + len(pcm)].astype(np.float32)


def augment(pcm: np.ndarray, seed: int) -> np.ndarray:
    """Formants, tilt, room, noise, mu-law and level; every phone stays where it was."""
    rng = np.random.default_rng([int(seed), 11])
    y = np.asarray(pcm, np.float32)
    n = len(y)
    if n == 0:
        return y.copy()
    if rng.random() < 0.6:
        y = _warp_formants(y, float(rng.uniform(0.9, 1.12)))
    size = 1 << int(n + RATE // 2 - 1).bit_length()
    freq = np.fft.rfftfreq(size, 1 / RATE)
    filt = (np.maximum(freq, 60.0) / 1000.0) ** (rng.uniform(-4, 4) / 6.02)  # dB per octave
    filt = filt / np.sqrt(np.mean(filt**2))
    if rng.random() < 0.5:  # the direct sound stays at sample 0
        t = np.arange(int(0.3 * RATE)) / RATE
        tail = rng.normal(size=len(t)) * np.exp(-6.9 * t / rng.uniform(0.12, 0.4))
        tail[:48] = 0
        ir = tail * (rng.uniform(0.1, 0.35) / np.sqrt((tail**2).sum()))
        ir[0] = 1.0
        filt = filt * np.fft.rfft(ir, size)
    y = np.fft.irfft(np.fft.rfft(y, size) * filt, size)[:n]
    loud = np.sqrt(np.mean(y**2)) + 1e-9
    if loud > 1e-4:
        y = y / loud * 10 ** (rng.uniform(-29, -17) / 20)
        loud = np.sqrt(np.mean(y**2))
    noise = rng.normal(size=n)
    if rng.random() < 0.5:
        spec = np.fft.rfft(noise) / np.sqrt(np.arange(n // 2 + 1) + 1.0)
        noise = np.fft.irfft(spec, n)
    y = y + noise / (noise.std() + 1e-9) * loud * 10 ** (-rng.uniform(18, 45) / 20)
    y = np.clip(y, -1, 1)
    if rng.random() < 0.15:
        code = np.round(np.sign(y) * np.log1p(255 * np.abs(y)) / np.log(256) * 127) / 127
        y = np.sign(code) * np.expm1(np.abs(code) * np.log(256)) / 255
    return y.astype(np.float32)
