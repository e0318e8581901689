"""The kernel distance between two sets of features, one row a picture or clip (evaluation.md 2.8); the Frechet distance is
models/probe.py's.

The arithmetic alone. Which network made the features, and whether the result may be called FID or FVD, is weighted.py's.
"""

from __future__ import annotations

import numpy as np

ROWS = 1024

def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, that of KID; near 0 for two samples of one distribution, however small."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d, n, m = a.shape[1], len(a), len(b)
    mean_a, mean_b = ((_total(x, x) - (((x * x).sum(1) / d + 1) ** 3).sum()) / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(mean_a + mean_b - 2 * _total(a, b) / (n * m))


def _total(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of the kernel over all pairs, some rows at a time: all pairs of a suite's pictures do not fit into memory."""
    return sum(float(((a[k : k + ROWS] @ b.T / a.shape[1] + 1) ** 3).sum()) for k in range(0, len(a), ROWS))
