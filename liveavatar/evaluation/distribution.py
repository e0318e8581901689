"""Distances between two sets of features, one row a picture or clip: Frechet and kernel (evaluation.md 2.8).

The arithmetic alone. Which network made the features, and whether the result may be called FID or FVD, is weighted.py's.
"""

from __future__ import annotations

import numpy as np

RANGE = 1e-3  # relative: an eigenvalue more negative than this is no rounding


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to a [n, d] and b [m, d]: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).

    The root's trace is that of the eigenvalues of S1^1/2 S2 S1^1/2, which is symmetric: no complex numbers to drop.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    one, two = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ two @ root)
    assert inner.min() > -RANGE * max(inner.max(), 1e-12), "a covariance that is none"
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * np.sqrt(np.clip(inner, 0, None)).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, that of KID; near 0 for two samples of one distribution, however small."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d, n, m = a.shape[1], len(a), len(b)
    within = [(x @ x.T / d + 1) ** 3 for x in (a, b)]
    mean_a, mean_b = ((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within)
    return float(mean_a + mean_b - 2 * ((a @ b.T / d + 1) ** 3).sum() / (n * m))
