"""The kernel distance between two sets of features, one row a picture or clip (evaluation.md 2.8); the Frechet distance is
models/probe.py's.

The arithmetic alone. Which network made the features, and whether the result may be called FID or FVD, is weighted.py's.
"""

from __future__ import annotations

import numpy as np


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, that of KID; near 0 for two samples of one distribution, however small."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d, n, m = a.shape[1], len(a), len(b)
    within = [(x @ x.T / d + 1) ** 3 for x in (a, b)]
    mean_a, mean_b = ((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within)
    return float(mean_a + mean_b - 2 * ((a @ b.T / d + 1) ** 3).sum() / (n * m))
