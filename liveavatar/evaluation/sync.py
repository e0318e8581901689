"""AVCorr: does the mouth move with the speech, and how late (evaluation.md 2.1).

`sync_index` is conf / (1 + ((lag - 40 ms) / 200 ms)^2). The spec's design value, conf * max(0, 1 - |lag - 40 ms| / 400 ms), is 0 from 440 ms
on: wrong speech, whose lag is any, then ties with a still face, and their order (section 3) fails. Not the `sync_index` of
gate_measures, which the probe's own readings give a checkpoint's gates: other inputs, another formula, never in one table.

The judge of the sound is a phone aligner and a table of mouth shapes: no part of it drives any of our engines. On rendered
heads it is not wholly a stranger, since the same table moved the heads that the engines were trained on.
"""

from __future__ import annotations

import numpy as np

from liveavatar.conditioning.phones import PAUSE, AlignmentError, Phone, Utterance, align, recognise
from liveavatar.conditioning.visemes import expected_mouth
from liveavatar.core import SAMPLE_RATE
from liveavatar.evaluation import series
from liveavatar.evaluation.landmarks import Track
from liveavatar.evaluation.report import Measure, absent

BACKEND = "AVCorr: pocketsphinx phones, visemes.yaml; tracked gap and width"
LAGS = np.arange(-30, 31) * 0.04  # seconds; positive: the sound is late, the picture early
NATURAL_LAG = 0.04  # seconds that sound trails a natural face by; the index is full there
LAG_SCALE = 0.2  # seconds off NATURAL_LAG at which the index is halved; never to zero, so that wrong speech stays above a still face
BESIDE_PEAK = 0.2  # seconds: a second peak farther away than this makes the first one doubtful
GRID_RATE = 100  # Hz of the expected motion
PADDING = 0.2  # seconds
GIVEN = "phones given"
MIN_SPEECH = 5.0  # seconds
PAUSE_IS_SILENCE = 0.3  # seconds; a shorter pause belongs to the speech around it
FIELDS = {"sync_index": ("", "higher"), "r0": ("", "higher"), "peak": ("", "higher"), "conf": ("", "higher"), "margin": ("", "higher"),
          "lag_ms": ("ms", "target")}  # fmt: skip


def heard(pcm: np.ndarray, text: str | None = None, phones: tuple[Phone, ...] | None = None) -> tuple[Utterance, str]:
    """What is said in pcm float32 [n] 16 kHz, and how that is known: given phones; else given words, aligned; else recognised.

    Words that do not fit, as where a file was cut, leave recognition too, and that is said. English only. Raises SpeechError
    without pocketsphinx.
    """
    if phones is not None:
        return Utterance(pcm, tuple(phones), text or "", "given"), GIVEN
    if text:
        try:
            return _aligned(pcm, text), "phones aligned to the words"
        except AlignmentError:
            return recognise(pcm), "phones recognised: the words do not fit the sound"
    return recognise(pcm), "phones recognised"


def _aligned(pcm: np.ndarray, text: str) -> Utterance:
    """Alignment with silence around: without it the aligner loses speech that fills its recording."""
    silence = np.zeros(round(PADDING * SAMPLE_RATE), np.float32)
    found = align(np.concatenate([silence, pcm, silence]), text)
    seconds = len(pcm) / SAMPLE_RATE
    moved = [(p.name, max(0.0, p.start - PADDING), min(seconds, p.end - PADDING)) for p in found.phones]
    return Utterance(pcm, tuple(Phone(*row) for row in moved if row[2] > row[1]), found.text, "aligned")


def silences(utterance: Utterance) -> list[tuple[float, float]]:
    """(start, end) seconds of pauses long enough to be silence."""
    return [(p.start, p.end) for p in utterance.phones if p.name == PAUSE and p.end - p.start >= PAUSE_IS_SILENCE]


def silent_at(utterance: Utterance, times: np.ndarray) -> np.ndarray:
    """bool [T]: nothing is said at each time in seconds, or the sound has ended."""
    quiet = times >= utterance.seconds
    for start, end in silences(utterance):
        quiet |= (times >= start) & (times < end)
    return quiet


def speech_seconds(utterance: Utterance) -> float:
    return utterance.seconds - sum(end - start for start, end in silences(utterance))


def av_corr(track: Track, utterance: Utterance, source: str = "") -> list[Measure]:
    """The fields of AVCorr for one face and one utterance on the same clock, each with its 95 % interval."""
    spoken = speech_seconds(utterance)
    if spoken < MIN_SPEECH:
        return _absent(f"too short: {spoken:.1f} s of speech, {MIN_SPEECH:.0f} needed")
    if track.seen.sum() < MIN_SPEECH * 5:
        return _absent(f"a face in {track.seen.sum()} pictures only")
    if np.nanstd(track.gap) < track.gap_floor:
        return _still(int(track.seen.sum()))
    curves = _moments(track, utterance)  # [2, B, L, 6]
    values = fields(curve(curves.sum(1)))
    drawn = fields(curve(np.stack([series.resampled(m) for m in curves])))
    return [Measure(name=name, value=float(values[name]), unit=FIELDS[name][0], better=FIELDS[name][1], n=int(track.seen.sum()),
                    interval=series.interval(drawn[name]), backend=BACKEND, reason=source) for name in FIELDS]  # fmt: skip


def _absent(reason: str) -> list[Measure]:
    return [absent(name, reason, unit=unit, better=better, backend=BACKEND) for name, (unit, better) in FIELDS.items()]


def _still(n: int) -> list[Measure]:
    """A mouth that does not move: correlation of the tracker's jitter is no sync."""
    made = [Measure(name=name, value=0.0, unit=unit, better=better, n=n, backend=BACKEND, reason="no motion")
            for name, (unit, better) in FIELDS.items() if name != "lag_ms"]  # fmt: skip
    return made + [absent("lag_ms", "no motion", unit="ms", better="target", backend=BACKEND)]


def _moments(track: Track, utterance: Utterance) -> np.ndarray:
    """[2, B, L, 6]: per signal (gap, width), block of a second and lag, the moments of seen (x) and expected (y) motion."""
    block, count = series.block_of(track.times)
    grid = np.arange(round(utterance.seconds * GRID_RATE) + 1) / GRID_RATE
    signals = expected_mouth(utterance, grid)
    made = []
    for lag in LAGS:
        expected = [np.interp(track.times + lag, grid, y, left=np.nan, right=np.nan) for y in signals]
        made.append([series.moments(x, y, block, count) for x, y in zip((track.gap, track.width), expected, strict=True)])
    return np.array(made).transpose(1, 2, 0, 3)


def curve(sums: np.ndarray) -> np.ndarray:
    """C(l): summed moments [2, ..., L, 6] of gap and width -> [..., L]. A signal that stands still counts as uncorrelated."""
    return np.nan_to_num(series.correlation(sums)).mean(0)


def fields(c: np.ndarray) -> dict[str, np.ndarray]:
    """C(l) [..., L] -> the fields, each [...]."""
    best = c.argmax(-1)
    lag, peak = LAGS[best], c.max(-1)
    beside = np.abs(LAGS - lag[..., None]) > BESIDE_PEAK
    conf = peak - np.median(c, axis=-1)
    return {
        "sync_index": conf / (1 + ((lag - NATURAL_LAG) / LAG_SCALE) ** 2),
        "r0": c[..., len(LAGS) // 2],
        "peak": peak,
        "conf": conf,
        "margin": peak - np.where(beside, c, -np.inf).max(-1),
        "lag_ms": 1000 * lag,
    }


def lag_curve(track: Track, utterance: Utterance) -> list[tuple[float, float]]:
    """(lag in ms, C) for a plot."""
    return [(float(1000 * lag), float(c)) for lag, c in zip(LAGS, curve(_moments(track, utterance).sum(1)), strict=True)]


def offset(pcm: np.ndarray, seconds: float) -> np.ndarray:
    """pcm heard `seconds` later (earlier if negative), as long as before."""
    n = round(seconds * SAMPLE_RATE)
    silence = np.zeros(min(abs(n), len(pcm)), np.float32)
    return np.concatenate([silence, pcm[: len(pcm) - len(silence)]] if n >= 0 else [pcm[len(silence):], silence])
