"""Slopes that one odd value does not move, and quantiles with what can be known of them."""

from __future__ import annotations

import numpy as np

from liveavatar.core import ConfigError

MOST_POINTS = 1200  # Theil-Sen looks at every pair: more points are first made into so many medians
FEWEST_POINTS = 5  # with four, chance alone orders them once in twelve: no slope could be called one


def theil_sen(x, y) -> tuple[float, tuple[float, float]] | None:
    """Median of the slopes between all pairs of x, y [n], and its 95 % interval; None below FEWEST_POINTS."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    assert x.shape == y.shape and x.ndim == 1, (x.shape, y.shape)
    if len(np.unique(x)) < FEWEST_POINTS:
        return None
    if len(x) > MOST_POINTS:
        order = np.array_split(np.argsort(x, kind="stable"), MOST_POINTS)
        x, y = (np.array([np.median(values[part]) for part in order]) for values in (x, y))
    if np.ptp(y) == 0:
        return 0.0, (0.0, 0.0)  # scipy's interval is not a number where all are equal
    slope, _, low, high = _scipy_stats().theilslopes(y, x, 0.95)
    return float(slope), (float(low), float(high))


def _scipy_stats():
    try:
        from scipy import stats
    except ImportError:
        raise ConfigError("evaluation needs scipy: pip install 'liveavatar[eval]'") from None
    return stats


def quantile(values, share: float) -> tuple[float, tuple[float, float]]:
    """Quantile of values [n] by linear interpolation, and its 95 % interval from order statistics (binomial ranks)."""
    ordered = np.sort(np.asarray(values, float))
    n = len(ordered)
    reach = 1.96 * np.sqrt(n * share * (1 - share))
    low, high = (int(np.clip(round(n * share + sign * reach), 0, n - 1)) for sign in (-1, 1))
    return float(np.quantile(ordered, share)), (float(ordered[low]), float(ordered[high]))
