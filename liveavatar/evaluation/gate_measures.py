"""Numbers from what the probe reads: correlation, slope and lag of a mouth, closures, blinks, head motion, stillness.

All are over several clips and *within* them: every clip is centred on its own mean first, so that two people with
different mouths make no correlation. A list argument has one array per clip.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from liveavatar.conditioning.audio_features import AudioFrontEnd
from liveavatar.conditioning.clipfiles import Clip
from liveavatar.conditioning.phones import LIPS_MEET, Phone, Utterance
from liveavatar.conditioning.visemes import ARTICULATORS, CLOSE, JAW, ROUND, WIDE, articulate, viseme_table
from liveavatar.core import FPS
from liveavatar.evaluation.quality import psnr

LAGS = range(-10, 11)  # pictures: +-400 ms
CLOSED = 0.03  # lips' gap in eye distances below which a mouth is shut (evaluation.md 2.4)
CLOSURE_SECONDS = 0.06  # around the middle of a phone
BLINK = 0.55  # of the usual opening: an eye below it is in a blink
BLINK_GAP = 3  # pictures between two blinks; below it they are one
STILL = 0.5  # grey levels: a pixel of the truth that varies less is background
NO_MOTION = 0.004  # standard deviation of the gap, eye distances: below it there is only the probe's jitter

Arrays = Sequence[np.ndarray]


# ---------------------------------------------------------------- a mouth and its truth


def moments(told: Arrays, truth: Arrays) -> np.ndarray:
    """float64 [n,3] per clip: sums of xy, xx (truth), yy (told) around the clip's means."""
    rows = []
    for y, x in zip(told, truth, strict=True):
        x, y = x.astype(np.float64) - x.mean(), y.astype(np.float64) - y.mean()
        rows.append((x @ y, x @ x, y @ y))
    return np.array(rows)


def correlation(rows: np.ndarray) -> float:
    """r of moments [n,3]; 0 where nothing moves."""
    xy, xx, yy = rows.sum(0)
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else 0.0


def slope(rows: np.ndarray) -> float:
    """Slope of what is told on the truth, of moments [n,3]; 0 where the truth stands still."""
    xy, xx, _ = rows.sum(0)
    return float(xy / xx) if xx > 0 else 0.0


def shifted(told: Arrays, truth: Arrays, lag: int) -> np.ndarray:
    """Moments of told[t + lag] on truth[t]: positive lags for a mouth that comes late."""
    late = [t[lag:] if lag >= 0 else t[:lag] for t in told]
    early = [t[: len(t) - lag] if lag >= 0 else t[-lag:] for t in truth]
    return moments(late, early)


def best_lag(told: Arrays, truth: Arrays) -> tuple[int, float]:
    """(pictures by which the mouth is late, r there)."""
    found = {lag: correlation(shifted(told, truth, lag)) for lag in LAGS}
    lag = max(found, key=found.get)
    return lag, found[lag]


def crossed(told: Arrays, truth: Arrays) -> np.ndarray:
    """Moments of every clip's mouth on every other clip's truth: what wrong speech gives. [n(n-1),3]."""
    pairs = [(i, j) for i in range(len(told)) for j in range(len(truth)) if i != j]
    rows = []
    for i, j in pairs:
        count = min(len(told[i]), len(truth[j]))
        rows.append(moments([told[i][:count]], [truth[j][:count]])[0])
    return np.array(rows).reshape(-1, 3)


def sync_index(told: Arrays, truth: Arrays) -> float:
    """One number that falls with wrong speech and with an offset: r at the best lag times max(0, 1 - |lag| / 400 ms).

    0 without motion: the correlation of jitter is no synchrony. Inside the gates' own ranking alone: not AVCorr's of sync.py, which judges
    files and has another formula.
    """
    if np.sqrt(np.mean([t.var() for t in told])) < NO_MOTION:
        return 0.0
    lag, r = best_lag(told, truth)
    return max(0.0, r) * max(0.0, 1.0 - abs(lag) * 1000 / FPS / 400)


def heard(front_end: AudioFrontEnd, clips: Sequence[Clip]) -> dict[str, float]:
    """r of the articulators that a front end hears of clips on those that are said, of the four of training.md 6.3."""
    rate, pairs = viseme_table()["rate_hz"], {k: ([], []) for k in (JAW, CLOSE, WIDE, ROUND)}
    for clip in clips:
        count = len(clip.frames)
        spoken = Utterance(clip.sound, tuple(Phone(*row) for row in clip.card["phones"]), "", "")
        said = articulate(spoken, np.arange(count * rate // FPS) / rate)[:: rate // FPS]
        features = front_end.features_of(clip.sound, count)[0].numpy()
        for k, (told, truth) in pairs.items():
            told.append(features[k]), truth.append(said[:, k])
    return {ARTICULATORS[k]: correlation(moments(*pair)) for k, pair in pairs.items()}


def sanity(told: Arrays, truth: Arrays) -> dict[str, float]:
    """sync_index of a good reading as it is, 200 ms late, of other speech, and of a still face (evaluation.md section 3)."""
    others = [truth[(i + 1) % len(truth)] for i in range(len(truth))]
    count = min(map(len, truth))
    late = [np.concatenate([np.full(5, t[0]), t[:-5]]) for t in told]
    still = [np.full_like(t, t.mean()) for t in told]
    return {"true": sync_index(told, truth), "shifted": sync_index(late, truth),
            "shuffled": sync_index([t[:count] for t in told], [t[:count] for t in others]), "static": sync_index(still, truth)}


# ---------------------------------------------------------------- closures


def phone_gaps(gaps: Arrays, clips: Sequence[Clip], phones: Collection[str]) -> np.ndarray:
    """Smallest gap within CLOSURE_SECONDS of the middle of every such phone, float [n]; one without a picture there is left out."""
    found = []
    for gap, clip in zip(gaps, clips, strict=True):
        for name, start, end in clip.card["phones"]:
            middle = (start + end) / 2
            first, last = np.ceil((middle - CLOSURE_SECONDS) * FPS), np.floor((middle + CLOSURE_SECONDS) * FPS)
            near = gap[max(0, int(first)) : max(0, int(last) + 1)]
            if name in phones and len(near):
                found.append(near.min())
    return np.array(found)


def closure(gaps: Arrays, clips: Sequence[Clip], phones: Collection[str] = LIPS_MEET) -> tuple[np.ndarray, float]:
    """(bool [n] shut at each such phone, share of them; not-a-number without any)."""
    shut = phone_gaps(gaps, clips, phones) < CLOSED
    return shut, float(shut.mean()) if len(shut) else float("nan")


# ---------------------------------------------------------------- eyes and head


def blinks(lid: np.ndarray) -> int:
    """Blinks in the opening of one person's eyes [T]: dips below BLINK of the usual."""
    shut = np.flatnonzero(lid < BLINK * np.median(lid))
    return int(len(shut) > 0) + int((np.diff(shut) > BLINK_GAP).sum())


def blink_rate(lids: Arrays) -> tuple[float, int]:
    """(per minute, count)."""
    count, pictures = sum(map(blinks, lids)), sum(map(len, lids))
    return count / (pictures / FPS / 60), count


def spread_within(series: Arrays) -> float:
    """Root of the mean variance within pieces: how much a head moves in so much time."""
    return float(np.sqrt(np.mean([piece.astype(np.float64).var() for piece in series])))


def windows(series: np.ndarray, length: int) -> list[np.ndarray]:
    """Whole pieces of `length`; the series itself when it is shorter."""
    return [series[i : i + length] for i in range(0, len(series) - length + 1, length)] or [series]


# ---------------------------------------------------------------- pictures


def box_psnr(made: np.ndarray, truth: np.ndarray, boxes: np.ndarray) -> float:
    """dB over pictures [T,S,S,3] inside boxes [T,4] x0 y0 x1 y1."""
    side, inside = made.shape[1], []
    for a, b, (x0, y0, x1, y1) in zip(made, truth, boxes):
        rows, columns = (slice(max(0, int(np.floor(low))), min(side, int(np.ceil(high)))) for low, high in ((y0, y1), (x0, x1)))
        inside.append((a[rows, columns].reshape(-1), b[rows, columns].reshape(-1)))
    return psnr(*(np.concatenate(column) for column in zip(*inside)))


def background_flicker(made: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean over background pixels of their standard deviation in time, grey levels; None where the truth has no still pixel."""
    still = truth.std(axis=0).max(-1) < STILL
    return float(made.std(axis=0)[still].mean()) if still.any() else None


def seam_ratio(change: np.ndarray, per_block: int) -> float:
    """Change [T-1] across borders of blocks over change inside them; element t is picture t to t + 1."""
    border = np.arange(len(change)) % per_block == per_block - 1
    return float(change[border].mean() / max(change[~border].mean(), 1e-9))
