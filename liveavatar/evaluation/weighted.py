"""Every measure that needs the user's weights: measured where they are, spelled out as missing where they are not.

A name stands for one procedure with one set of weights; nothing here ever takes another's place (evaluation.md EVA-1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from liveavatar.core import FPS, SAMPLE_RATE, InputError
from liveavatar.evaluation import embeddings
from liveavatar.evaluation.backends import Backends
from liveavatar.evaluation.distribution import kernel_distance
from liveavatar.evaluation.report import Measure, absent, bootstrap
from liveavatar.models.probe import frechet

SECOND = 1.0  # identity and quality are judged on one picture a second
SMALL = {"FID": 2000, "FVD": 256}  # pictures or clips below which the value is unsteady


def judge(frames: Sequence[tuple[float, np.ndarray]], pcm: np.ndarray, backends: Backends, *, portrait: np.ndarray | None = None,
          portrait_points: np.ndarray | None = None, paired: np.ndarray | None = None, points: np.ndarray | None = None,
          boxes: np.ndarray | None = None) -> list[Measure]:
    """One video by all networks there are.

    frames: (seconds, uint8 [H, W, 3]) in order, as many as fit into memory; pcm: float32 [n] 16 kHz from second 0;
    portrait uint8 [H, W, 3] with portrait_points [5, 2]; paired uint8 [T, H, W, 3]: what the video should be, picture by
    picture; points [T, 5, 2]: eyes, nose tip, mouth corners of each picture, NaN where there is no face; boxes [T, 4]: the
    mesh's faces, for the named variant of Sync-C without S3FD. Raises WeightsError on a file that is not what it should be.
    """
    times, pictures = np.array([t for t, _ in frames]), np.stack([p for _, p in frames])
    second = _seconds(times)
    every, seen = pictures[second], None if points is None else points[second]
    return [*_sync(times, pictures, pcm, backends), *_mesh_sync(times, pictures, pcm, boxes, backends),
            *_lpips(pictures, paired, backends), _dino(every, portrait, backends),
            _arcface(every, seen, portrait, portrait_points, backends), *_qalign(every, backends)]


def _seconds(times: np.ndarray) -> np.ndarray:
    """Indices of one picture a second."""
    return np.unique(np.searchsorted(times, np.arange(times[0], times[-1] + 1e-6, SECOND)))


def at_rate(times: np.ndarray, rate: float = FPS) -> np.ndarray:
    """Indices of the pictures on screen at multiples of 1 / rate, from the first picture to the last."""
    slots = np.arange(round((times[-1] - times[0]) * rate) + 1) / rate + times[0]
    return np.maximum(np.searchsorted(times, slots + 0.25 / rate, side="right") - 1, 0)


def _mean(name: str, values, backends: Backends, files: Sequence[str], unit: str = "", better: str = "higher", backend: str = "",
          reason: str = "") -> Measure:
    values = np.asarray(values, float)
    return Measure(name=name, value=float(values.mean()), unit=unit, better=better, n=len(values), interval=bootstrap(values),
                   backend=backend, weights_sha256=backends.sha256(*files), reason=reason)


# ---------------------------------------------------------------- sync

SYNC = (("Sync-C", "", "higher"), ("Sync-D", "", "lower"), ("sync_offset", "ms", "target"))


def _sync(times, pictures, pcm, backends: Backends) -> list[Measure]:
    """Faces by S3FD, followed, cropped and compared: mean over tracks."""
    if not backends.has("syncnet", "s3fd"):
        return [absent(name, backends.needs("syncnet", "s3fd"), unit=unit, better=better, backend="syncnet_v2") for name, unit, better in SYNC]
    from liveavatar.evaluation import s3fd

    shown = at_rate(times)
    found = [s3fd.detect(backends.s3fd, pictures[k]) for k in shown]
    kept, dropped = s3fd.tracks(found)
    left_out = f"{dropped} tracks under 25 pictures or 100 pixels left out" if dropped else ""
    return _compared(kept, shown, times[0], pictures, pcm, backends, "", left_out)


def _mesh_sync(times, pictures, pcm, boxes, backends: Backends) -> list[Measure]:
    """The same network on the mesh tracker's crop: another procedure, so another name. Only instead of the missing S3FD."""
    if not backends.has("syncnet") or backends.has("s3fd") or boxes is None:
        return []
    shown = at_rate(times)
    inside = np.flatnonzero(np.isfinite(boxes[shown]).all(1))
    tracks = [(inside, boxes[shown[inside]])] if len(inside) == len(shown) else []
    return _compared(tracks, shown, times[0], pictures, pcm, backends, " (mesh crop)", "the face was lost: one unbroken track is needed")


def _compared(tracks, shown, start, pictures, pcm, backends: Backends, suffix: str, left_out: str) -> list[Measure]:
    from liveavatar.evaluation import syncnet

    results = []
    for numbers, boxes in tracks:
        begin = round((numbers[0] / FPS + start) * SAMPLE_RATE)
        faces = syncnet.crop_face(pictures[shown[numbers]], boxes)
        results.append(syncnet.compare(backends.syncnet, faces, pcm[max(0, begin):]))
    results = [r for r in results if r is not None]
    names = [(backends.title(f"{name}{suffix}", "syncnet", "s3fd"), unit, better) for name, unit, better in SYNC]
    if not results:
        reason = left_out or "no face was followed for 25 pictures"
        return [absent(name, reason, unit=unit, better=better, backend="syncnet_v2", status="failed") for name, unit, better in names]
    values = [[getattr(r, field) for r in results] for field in ("confidence", "distance", "offset_ms")]
    files = ("syncnet",) if suffix else ("syncnet", "s3fd")
    return [_mean(name, v, backends, files, unit, better, "syncnet_v2", left_out if not suffix else "")
            for (name, unit, better), v in zip(names, values, strict=True)]


# ---------------------------------------------------------------- likeness and quality


def _lpips(pictures, paired, backends: Backends) -> list[Measure]:
    files = ("lpips_backbone", "lpips_heads")
    reason = backends.needs(*files) if not backends.has(*files) else "needs a reference video" if paired is None else None
    if reason:
        return [absent(name, reason, better="lower", backend="lpips alex 0.1") for name in ("LPIPS", "tLPIPS")]
    from liveavatar.evaluation import perceptual

    count, names = min(len(pictures), len(paired)), [backends.title(name, *files) for name in ("LPIPS", "tLPIPS")]
    distances = perceptual.lpips(backends.lpips, pictures[:count], paired[:count])
    changes = perceptual.tlpips(backends.lpips, pictures[:count], paired[:count])
    return [_mean(name, values, backends, files, better="lower", backend="lpips alex 0.1")
            for name, values in zip(names, (distances, changes), strict=True)]


def _dino(every, portrait, backends: Backends) -> Measure:
    """Cosine of the portrait with one picture a second."""
    if not backends.has("dinov2") or portrait is None:
        return absent("Dino-S", "needs the reference portrait" if backends.has("dinov2") else backends.needs("dinov2"), backend="dinov2")
    model = backends.dinov2
    vectors = embeddings.dino(model, [portrait, *every])
    size = f"dinov2, {model.config.num_hidden_layers} layers of {model.config.hidden_size}"
    return _mean("Dino-S", embeddings.cosine(vectors[1:], vectors[0]), backends, ["dinov2"], backend=size)


def _arcface(every, points, portrait, portrait_points, backends: Backends) -> Measure:
    """Cosine of the portrait's face with one a second."""
    if not backends.has("arcface"):
        return absent("ArcFace", backends.needs("arcface"), backend="arcface")
    if portrait_points is None or points is None:
        return absent("ArcFace", "needs the reference portrait and a tracked face", backend="arcface")
    seen = np.flatnonzero(np.isfinite(points).all((1, 2)))
    if not len(seen):
        return absent("ArcFace", "no face", backend="arcface", status="failed")
    own = embeddings.arcface(backends.arcface, [portrait], portrait_points[None])[0]
    values = embeddings.cosine(embeddings.arcface(backends.arcface, every[seen], points[seen]), own)
    lost = f"{len(every) - len(seen)} pictures without a face" if len(seen) < len(every) else ""
    return _mean("ArcFace", values, backends, ["arcface"], backend="arcface", reason=lost)


def _qalign(every, backends: Backends) -> list[Measure]:
    names = (("ASE", "aesthetics"), ("IQA", "quality"))
    if not backends.has("qalign"):
        return [absent(name, backends.needs("qalign"), backend="q-align") for name, _ in names]
    return [_mean(name, embeddings.qalign(backends.qalign, every, task), backends, ["qalign"], backend="q-align") for name, task in names]


# ---------------------------------------------------------------- distributions


class Distribution:
    """FID and FVD over a whole suite: feed it every video, then ask. real: file of features of the real set (write_real)."""

    def __init__(self, backends: Backends, real=None):
        self.backends, self.real = backends, real
        self.found: dict[str, list[np.ndarray]] = {"inception": [], "i3d": []}

    def add(self, pictures: np.ndarray) -> None:
        """pictures uint8 [T, H, W, 3] of one video."""
        for name, extract in self._extractors():
            self.found[name].append(extract(getattr(self.backends, name), pictures))

    def _extractors(self) -> list[tuple[str, Callable]]:
        both = (("inception", embeddings.inception), ("i3d", embeddings.i3d))
        return [(name, extract) for name, extract in both if self.backends.has(name) and self.real is not None]

    def measures(self) -> list[Measure]:
        """FID and FVD, and beside each the kernel distance of the same features, which few samples do not bias."""
        return [*self._measures("FID", "KID", "inception"), *self._measures("FVD", "KVD", "i3d")]

    def _measures(self, name: str, kernel: str, backend: str) -> list[Measure]:
        if not self.backends.has(backend) or self.real is None:
            missing = [] if self.backends.has(backend) else [self.backends.needs(backend).removeprefix("needs ")]
            missing += [] if self.real is not None else ["features of a real set (suite.real)"]
            return [absent(label, f"needs {' and '.join(missing)}", better="lower", backend=backend) for label in (name, kernel)]
        sha = self.backends.sha256(backend)
        mine, theirs = np.concatenate(self.found[backend]), real_features(self.real, backend, sha)
        n = min(len(mine), len(theirs))
        if n < 2:
            return [absent(label, f"too short: {n} samples", better="lower", backend=backend) for label in (name, kernel)]
        small = f"small n: {n} of {SMALL[name]}" if n < SMALL[name] else ""
        return [Measure(name=label, value=distance(mine, theirs), unit="", better="lower", n=n, backend=backend, weights_sha256=sha, reason=small)
                for label, distance in ((name, frechet), (kernel, kernel_distance))]


def write_real(path, backends: Backends, videos: Sequence[np.ndarray], resolution: str, crop: str) -> None:
    """Features of a real set into an npz, with what made them."""
    arrays = {}
    for name, extract in (("inception", embeddings.inception), ("i3d", embeddings.i3d)):
        if backends.has(name):
            arrays[name] = np.concatenate([extract(getattr(backends, name), pictures) for pictures in videos])
            arrays[f"{name}_sha256"] = backends.sha256(name)
    np.savez(path, resolution=resolution, crop=crop, **arrays)


def real_features(path, name: str, expected: str) -> np.ndarray:
    """Features [m, d] of the real set. Raises InputError when they were made by other weights or are not there."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found, features = str(file.get(f"{name}_sha256")), file.get(name)
    except (OSError, ValueError):
        raise InputError(f"{path}: cannot be read as features of a real set (npz)") from None
    if features is None or found != expected:
        raise InputError(f"{path}: no features of the very weights of backends.{name}")
    return features
