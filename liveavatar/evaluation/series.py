"""Arithmetic on signals in time: correlation and slope with intervals from blocks of one second.

Neighbouring pictures depend on each other, so intervals come from resampled blocks, never from single pictures.
"""

from __future__ import annotations

import numpy as np

from liveavatar.evaluation.report import DRAWS, SEED

BLOCK_SECONDS = 1.0
TINY = 1e-12  # of a variance: below it a signal does not move and has no correlation


def moments(x: np.ndarray, y: np.ndarray, block: np.ndarray, count: int) -> np.ndarray:
    """[count, 6] per block: n, sums of x, y, xx, yy, xy. x, y [T], block int [T]; pairs with a NaN do not count."""
    seen = np.isfinite(x) & np.isfinite(y)
    x, y, block = x[seen].astype(float), y[seen].astype(float), block[seen]
    terms = (np.ones_like(x), x, y, x * x, y * y, x * y)
    return np.stack([np.bincount(block, weights=term, minlength=count) for term in terms], axis=1)


def correlation(m: np.ndarray) -> np.ndarray:
    """r of summed moments [..., 6]; NaN where either signal stands still."""
    xx, yy, xy = _centred(m)
    ok = (xx > TINY) & (yy > TINY)
    return np.where(ok, xy / np.sqrt(np.where(ok, xx * yy, 1.0)), np.nan)


def slope(m: np.ndarray) -> np.ndarray:
    """Of y on x, from summed moments [..., 6]; NaN where x stands still."""
    xx, _, xy = _centred(m)
    return np.where(xx > TINY, xy / np.where(xx > TINY, xx, 1.0), np.nan)


def residual(m: np.ndarray) -> np.ndarray:
    """Standard deviation of y about its line on x, from summed moments [..., 6]; NaN where either stands still."""
    _, yy, _ = _centred(m)
    return np.sqrt(yy * np.maximum(0.0, 1 - correlation(m) ** 2))


def _centred(m: np.ndarray) -> tuple[np.ndarray, ...]:
    n, x, y, xx, yy, xy = np.moveaxis(m, -1, 0)
    n = np.maximum(n, 1)
    return xx / n - (x / n) ** 2, yy / n - (y / n) ** 2, xy / n - x * y / n**2


def together(times: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices into both of what is shown at the same time: at most half a step of `others` apart."""
    if not len(times) or len(others) < 2:
        return np.zeros(0, int), np.zeros(0, int)
    near = np.clip(np.searchsorted(others, times), 1, len(others) - 1)
    near -= times - others[near - 1] < others[near] - times
    ok = np.abs(others[near] - times) <= np.median(np.diff(others)) / 2 + 1e-6
    return np.flatnonzero(ok), near[ok]


def block_of(times: np.ndarray) -> tuple[np.ndarray, int]:
    """Which block of a second each time [T] falls into, and how many blocks there are."""
    index = ((times - times[0]) / BLOCK_SECONDS).astype(int) if len(times) else np.zeros(0, int)
    return index, int(index[-1]) + 1 if len(index) else 0


def resampled(per_block: np.ndarray) -> np.ndarray:
    """[DRAWS, ...]: sums over blocks drawn with replacement from per_block [B, ...]."""
    picks = np.random.default_rng(SEED).integers(0, len(per_block), (DRAWS, len(per_block)))
    counts = np.stack([np.bincount(pick, minlength=len(per_block)) for pick in picks])
    return np.tensordot(counts.astype(float), per_block, axes=1)


def interval(draws: np.ndarray) -> tuple[float, float] | None:
    """95 % of resampled values; None where most are not finite."""
    draws = draws[np.isfinite(draws)]
    if len(draws) < DRAWS / 2:
        return None
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(times: np.ndarray, values: np.ndarray) -> tuple[float, float] | None:
    """95 % of the mean of values [T] at times [T], NaN left out; None with fewer than two blocks."""
    seen = np.isfinite(values)
    block, count = block_of(times)
    if count < 2 or not seen.any():
        return None
    sums = np.stack([np.bincount(block[seen], weights=w, minlength=count) for w in (values[seen], np.ones(seen.sum()))], axis=1)
    drawn = resampled(sums)
    return interval(np.divide(drawn[:, 0], drawn[:, 1], out=np.full(len(drawn), np.nan), where=drawn[:, 1] > 0))
