"""The latents of a block as small pictures: what each denoising step has made of it so far, without a decoder.

A latent cell's colour is close to a linear function of its channels. The function is fitted by least squares to the very
block that is shown: its clean latents and its decoded pictures, which the head has anyway.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np

from liveavatar.runtime.observing import Observation


def fit_colours(latents: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """float [C + 1, 3] that maps channels (and 1) to RGB in 0..1. latents: clean, [C, T, h, w]; pictures: uint8 [n, H, W, 3]."""
    _, frames, height, width = latents.shape
    n, high, wide, _ = pictures.shape
    cells = pictures.reshape(frames, n // frames, height, high // height, width, wide // width, 3).mean((1, 3, 5)) / 255
    return np.linalg.lstsq(_rows(latents), cells.reshape(-1, 3), rcond=None)[0]


def colours(latents: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """uint8 [T, h, w, 3] of latents [C, T, h, w]."""
    return ((_rows(latents) @ fitted).clip(0, 1) * 255).round().astype(np.uint8).reshape(*latents.shape[1:], 3)


def _rows(latents: np.ndarray) -> np.ndarray:
    flat = latents.reshape(latents.shape[0], -1).T.astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], 1)


def previews(seen: Observation) -> Iterator[tuple[int | None, np.ndarray]]:
    """Each step in order with its picture, uint8 [h, w, 3], of the block's middle; last None with the decoded one."""
    steps = {step: latents.numpy() for step, latents in sorted(seen.latents.items())}
    pictures = seen.pictures.numpy()
    fitted = fit_colours(steps[max(steps)], pictures)
    for step, latents in steps.items():
        yield step, colours(latents, fitted)[latents.shape[1] // 2]
    yield None, pictures[len(pictures) // 2]


def data_url(picture: np.ndarray) -> str:
    """PNG of uint8 [h, w, 3], for a page."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
