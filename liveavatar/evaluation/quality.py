"""Quality of single pictures: against a paired reference (PSNR, SSIM), and alone (sharpness, blockiness, colour)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from liveavatar.conditioning.face import INSTALL, Face
from liveavatar.core import InputError
from liveavatar.evaluation import series
from liveavatar.evaluation.landmarks import LIPS
from liveavatar.evaluation.report import Measure, absent

MOST_PSNR = 60.0  # dB: of equal pictures, where it would be infinite
EYES = (33, 133, 159, 145, 362, 263, 386, 374)
REGIONS = ("full", "face", "mouth", "eyes")
EVERY = 0.2  # seconds between judged pictures: neighbours say the same
PAD = 0.15  # of a box's sides, added around lips and eyes
MIN_SIDE = 8  # pixels: SSIM looks through windows of 7
UNFITTED = "no package that is permissive and kept up has its procedure with its fitted parameters"  # docs/evaluation.md
GRID = 8  # pixels: the blocks of H.264's and JPEG's transforms
UNPAIRED = {"sharpness": ("levels^2", "target"), "blockiness": ("", "lower"),
            "lab_L": ("", "target"), "lab_a": ("", "target"), "lab_b": ("", "target")}  # fmt: skip


def boxes(face: Face, shape: Sequence[int]) -> dict[str, tuple[slice, slice]]:
    """Rows and columns of each of REGIONS in a picture of shape [H, W, ...]."""
    height, width = shape[:2]
    regions = {"face": np.asarray(face.box), "mouth": _padded(face.landmarks[list(LIPS)]), "eyes": _padded(face.landmarks[list(EYES)])}
    cut = {"full": (slice(0, height), slice(0, width))}
    for name, (x0, y0, x1, y1) in regions.items():
        cut[name] = (slice(max(0, int(y0)), min(height, int(np.ceil(y1)))), slice(max(0, int(x0)), min(width, int(np.ceil(x1)))))
    return cut


def _padded(points: np.ndarray) -> np.ndarray:
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    pad = PAD * (high - low).max()
    return np.concatenate([low - pad, high + pad])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between uint8 arrays of one shape."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return MOST_PSNR if error == 0 else float(min(MOST_PSNR, 10 * np.log10(255**2 / error)))


def blockiness(frame: np.ndarray) -> float:
    """Step across the encoder's block edges over the step elsewhere, of the luma of uint8 [H, W, 3]; 1: no blocks."""
    luma = frame @ np.array([0.299, 0.587, 0.114])
    ratios = []
    for axis in (0, 1):
        steps = np.abs(np.diff(luma, axis=axis)).mean(1 - axis)
        edge = np.arange(len(steps)) % GRID == GRID - 1
        ratios.append(steps[edge].mean() / max(steps[~edge].mean(), 1e-6))
    return float(np.mean(ratios))


class Quality:
    """Looks at a picture every EVERY seconds."""

    def __init__(self):
        self._next = -np.inf
        self._alone: list[tuple[float, dict[str, float]]] = []
        self._paired: list[tuple[float, dict[str, float]]] = []

    def see(self, at: float, frame: np.ndarray, faces: list[Face], reference: np.ndarray | None = None, shown: list[Face] | None = None) -> None:
        """at seconds; frame uint8 [H, W, 3]; reference, shown: the same moment of the reference video, and its faces."""
        if at < self._next:
            return
        self._next = at + EVERY - 1e-6
        if faces:
            self._alone.append((at, _alone(frame, boxes(faces[0], frame.shape)["face"])))
        if reference is not None and reference.shape == frame.shape and shown:
            self._paired.append((at, _paired(frame, reference, boxes(shown[0], frame.shape))))

    def measures(self, paired: bool) -> list[Measure]:
        """The unpaired measures, and, where a reference was promised, the paired ones; what nobody fitted for us says so."""
        made = [_mean(name, self._alone, unit, better, "OpenCV", "no face in any picture") for name, (unit, better) in UNPAIRED.items()]
        if paired:
            names = [(f"psnr_{region}", "dB") for region in REGIONS] + [(f"ssim_{region}", "") for region in REGIONS]
            made += [_mean(name, self._paired, unit, "higher", "scikit-image" if name.startswith("ssim") else "own",
                           "no paired picture of the same size with a face") for name, unit in names]  # fmt: skip
        return made + [absent(name, UNFITTED, better="lower") for name in ("NIQE", "BRISQUE")]


def _mean(name: str, rows: list[tuple[float, Mapping[str, float]]], unit: str, better: str, backend: str, missing: str) -> Measure:
    found = [(at, row[name]) for at, row in rows if np.isfinite(row.get(name, np.nan))]
    if not found:
        return absent(name, missing, unit=unit, better=better, backend=backend)
    times, values = np.array(found).T
    return Measure(name=name, value=float(values.mean()), unit=unit, better=better, n=len(values), backend=backend,
                   interval=series.mean_interval(times, values))  # fmt: skip


def _alone(frame: np.ndarray, face: tuple[slice, slice]) -> dict[str, float]:
    try:
        import cv2
    except ImportError:
        raise InputError(f"picture quality needs opencv-python-headless, which is not installed: {INSTALL}") from None
    grey = cv2.cvtColor(frame[face], cv2.COLOR_RGB2GRAY)
    lab = cv2.cvtColor((frame / 255).astype(np.float32), cv2.COLOR_RGB2LAB).mean((0, 1))
    return {"sharpness": float(cv2.Laplacian(grey, cv2.CV_64F).var()), "blockiness": blockiness(frame),
            "lab_L": float(lab[0]), "lab_a": float(lab[1]), "lab_b": float(lab[2])}  # fmt: skip


def _paired(frame: np.ndarray, reference: np.ndarray, regions: Mapping[str, tuple[slice, slice]]) -> dict[str, float]:
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise InputError(f"SSIM needs scikit-image, which is not installed: {INSTALL}") from None
    made = {}
    for name, cut in regions.items():
        a, b = frame[cut], reference[cut]
        if min(a.shape[:2]) >= MIN_SIDE:
            made[f"psnr_{name}"] = psnr(a, b)
            made[f"ssim_{name}"] = float(structural_similarity(a, b, channel_axis=2, data_range=255))
    return made
