"""Every measure that needs the user's weights: measured where they are, spelled out as missing where they are not.

A name stands for one procedure with one set of weights; nothing here ever takes another's place (evaluation.md EVA-1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from liveavatar.core import FPS, SAMPLE_RATE, InputError
from liveavatar.evaluation import embeddings
from liveavatar.evaluation.backends import Backends
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.distribution import kernel_distance
from liveavatar.evaluation.likeness import OWN_SECONDS
from liveavatar.evaluation.provenance import sha256
from liveavatar.evaluation.report import Measure, absent, bootstrap
from liveavatar.evaluation.series import together
from liveavatar.models.probe import frechet

SECOND = 1.0  # identity and quality are judged on one picture a second,
MOST = 120  # of so many pictures at most
SMALL = {"FID": 2000, "FVD": 256}  # pictures or clips below which the value is unsteady


Frames = Sequence[tuple[float, np.ndarray]]  # (seconds, uint8 [H, W, 3]) in order


class Sample:
    """One picture a second of a video of any length; of a longer one than MOST seconds every second of those, and so on."""

    def __init__(self):
        self.every, self.frames, self.points = SECOND, [], []
        self.start: list[tuple[np.ndarray, np.ndarray]] = []  # picture and points of the first OWN_SECONDS
        self._next: float | None = None

    def see(self, at: float, frame: np.ndarray, five: np.ndarray) -> None:
        """five [5, 2]: eyes, tip of the nose, corners of the mouth; NaN without a face."""
        if self._next is not None and at < self._next - 1e-6:
            return
        self._next = (at if self._next is None else self._next) + self.every
        self.frames.append((at, frame))
        self.points.append(five)
        if at < self.frames[0][0] + OWN_SECONDS:
            self.start.append((frame, five))
        if len(self.frames) > MOST:
            self.every, self.frames, self.points = 2 * self.every, self.frames[::2], self.points[::2]
            self._next = self.frames[-1][0] + self.every

    @property
    def remark(self) -> str:
        return f"one picture every {self.every:g} s" if self.every > SECOND else ""


def judge(frames: Frames, pcm: np.ndarray, backends: Backends, sample: Sample, *, portrait: np.ndarray | None = None,
          portrait_points: np.ndarray | None = None, paired: Frames | None = None, boxes: np.ndarray | None = None, cut: str = "",
          own: str = "") -> list[Measure]:
    """One video by all networks there are.

    frames: every picture of as much as fits into memory, cut: how much that is of a longer video, for Sync-C and LPIPS; sample: of
    all of it, for the others; pcm: float32 [n] 16 kHz from second 0; portrait uint8 [H, W, 3] with portrait_points [5, 2]; paired:
    what the video should be at the same times; boxes [T, 4]: the mesh's faces, for the named variant of Sync-C without S3FD;
    own: why likeness to the video's own beginning is not asked for. Raises WeightsError on a file that is not what it should be.
    """
    times, pictures = np.array([t for t, _ in frames]), np.stack([p for _, p in frames])
    of_part = [*sync(times, pictures, pcm, backends), *_mesh_sync(times, pictures, pcm, boxes, backends), *lpips(times, pictures, paired, backends)]
    of_all = [*dino(sample, portrait, backends, own), *arcface(sample, portrait, portrait_points, backends, own), *_qalign(sample, backends)]
    return [*_remarked(of_part, cut), *_remarked(of_all, sample.remark)]


def _remarked(measures: Sequence[Measure], remark: str) -> list[Measure]:
    return [replace(m, reason="; ".join(filter(None, (remark, m.reason)))) if m.measured else m for m in measures]


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


def sync(times, pictures, pcm, backends: Backends) -> list[Measure]:
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


def lpips(times, pictures, paired: Frames | None, backends: Backends) -> list[Measure]:
    """Pictures of both videos at the same times; changes from picture to picture where the one before has its pair too."""
    files = ("lpips_backbone", "lpips_heads")
    reason = backends.needs(*files) if not backends.has(*files) else "needs a reference video" if paired is None else None
    if paired is not None and not reason:
        mine, theirs = together(times, np.array([t for t, _ in paired]))
        sizes = [f"{p.shape[1]}x{p.shape[0]}" for p in (pictures[0], paired[0][1])]
        reason = "" if len(mine) > 1 else "no pictures at the same times"
        reason = f"{sizes[0]} pixels, the reference video {sizes[1]}" if sizes[0] != sizes[1] else reason
    names = [backends.title(name, *files) for name in ("LPIPS", "tLPIPS")]
    if reason:
        return [absent(name, reason, better="lower", backend="lpips alex 0.1") for name in names]
    from liveavatar.evaluation import perceptual

    there, reference = pictures[mine], np.stack([paired[k][1] for k in theirs])
    distances = perceptual.lpips(backends.lpips, there, reference)
    changes = perceptual.tlpips(backends.lpips, there, reference)[np.diff(mine) == 1]
    return [_mean(name, values, backends, files, better="lower", backend="lpips alex 0.1")
            for name, values in zip(names, (distances, changes), strict=True)]


def dino(sample: Sample, portrait, backends: Backends, own: str = "") -> list[Measure]:
    """Cosine with the portrait, and with the video's own beginning."""
    if not backends.has("dinov2"):
        return [absent(name, backends.needs("dinov2"), backend="dinov2") for name in ("Dino-S", "Dino-S_worst", "Dino-S_own")]
    model = backends.dinov2
    label = {"backends": backends, "files": ["dinov2"],
             "backend": f"dinov2, {model.config.num_hidden_layers} layers of {model.config.hidden_size}"}
    vectors = embeddings.dino(model, [p for _, p in sample.frames])
    goal = None if portrait is None else embeddings.dino(model, [portrait])[0]
    start = embeddings.dino(model, [p for p, _ in sample.start])
    return [*_likeness("Dino-S", vectors, goal, **label), _alike("Dino-S_own", vectors, _mean_way(start), own, **label)]


def arcface(sample: Sample, portrait, portrait_points, backends: Backends, own: str = "") -> list[Measure]:
    """Cosine of the face with the portrait's, and with that of the video's own beginning."""
    names, label = ("ArcFace", "ArcFace_worst", "ArcFace_own"), {"backends": backends, "files": ["arcface"], "backend": "arcface"}
    if not backends.has("arcface"):
        return [absent(name, backends.needs("arcface"), backend="arcface") for name in names]
    vectors, start = (_faces(backends, pairs) for pairs in (zip((p for _, p in sample.frames), sample.points, strict=True), sample.start))
    if not len(vectors):
        return [absent(name, "no face", backend="arcface", status="failed") for name in names]
    goal = None if portrait_points is None else embeddings.arcface(backends.arcface, [portrait], portrait_points[None])[0]
    lost = len(sample.frames) - len(vectors)
    label["reason"] = f"{lost} pictures without a face" if lost else ""
    return [*_likeness("ArcFace", vectors, goal, **label), _alike("ArcFace_own", vectors, _mean_way(start), own, **label)]


def _faces(backends: Backends, pairs) -> np.ndarray:
    """Embeddings [n, d] of the pictures of (picture, five points) that show a face."""
    seen = [(p, five) for p, five in pairs if np.isfinite(five).all()]
    return embeddings.arcface(backends.arcface, [p for p, _ in seen], np.stack([five for _, five in seen])) if seen else np.zeros((0, 1))


def _mean_way(vectors: np.ndarray) -> np.ndarray | None:
    """The mean direction [d] of vectors [n, d]; None of none."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0) if len(vectors) else None


def _likeness(name: str, vectors: np.ndarray, goal: np.ndarray | None, **label) -> list[Measure]:
    """To the portrait: the mean, and the worst of twenty."""
    mean = _alike(name, vectors, goal, "needs the reference portrait", **label)
    worst = float(np.percentile(embeddings.cosine(vectors, goal), 5)) if mean.measured else None
    return [mean, replace(mean, name=f"{name}_worst", value=worst, interval=None, reason=mean.reason if worst is None else "5 % quantile")]


def _alike(name: str, vectors: np.ndarray, goal: np.ndarray | None, missing: str, backend: str, **label) -> Measure:
    if goal is None or (name.endswith("_own") and missing):
        return absent(name, missing or "no face at the beginning", backend=backend)
    return _mean(name, embeddings.cosine(vectors, goal), backend=backend, **label)


def _qalign(sample: Sample, backends: Backends) -> list[Measure]:
    names = (("ASE", "aesthetics"), ("IQA", "quality"))
    if not backends.has("qalign"):
        return [absent(name, backends.needs("qalign"), backend="q-align") for name, _ in names]
    every = [p for _, p in sample.frames]
    return [_mean(name, embeddings.qalign(backends.qalign, every, task), backends, ["qalign"], backend="q-align") for name, task in names]


# ---------------------------------------------------------------- distributions


EXTRACTORS = {"inception": embeddings.inception, "i3d": embeddings.i3d}


class Features:
    """What Inception and I3D see in a set of videos of one size, fed one after another and read clip by clip."""

    def __init__(self, backends: Backends):
        self.backends, self.resolution = backends, ""
        self._found: dict[str, list[np.ndarray]] = {name: [] for name in EXTRACTORS if backends.has(name)}

    def add(self, video: VideoFile) -> None:
        """Raises InputError where its pictures are of another size than those before."""
        size = f"{video.width}x{video.height}"
        if size != (self.resolution or size):
            raise InputError(f"{video.path}: {size} pixels, the videos before it {self.resolution}: a set is of one size")
        self.resolution = size
        pictures = (picture for _, picture in video.frames())
        while clip := list(islice(pictures, embeddings.CLIP)):
            for name, rows in self._found.items():
                found = EXTRACTORS[name](getattr(self.backends, name), np.stack(clip))
                rows += [found] if len(found) else []  # the last pictures may be too few for a clip of FVD

    def of(self, name: str) -> np.ndarray:
        """[n, d]; n is 0 where nothing was fed."""
        return np.concatenate(self._found[name]) if self._found[name] else np.zeros((0, 1))


def write_real(path: Path, backends: Backends, videos: Iterable[VideoFile], crop: str) -> str:
    """Statistics of a real set into an npz: features, what made them, size and crop of the pictures. Returns its SHA-256."""
    found = Features(backends)
    for video in videos:
        found.add(video)
    arrays = {key: value for name in EXTRACTORS if backends.has(name) for key, value in (
        (name, found.of(name)), (f"{name}_sha256", backends.sha256(name)))}  # fmt: skip
    with open(path, "wb") as file:  # under the very name: numpy adds .npz to a path
        np.savez(file, resolution=found.resolution, crop=crop, **arrays)
    return sha256(path)


class Real:
    """A file of write_real. Raises InputError where it cannot be read, or its pictures were cropped in another way."""

    def __init__(self, path: Path, crop: str):
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                self._arrays = dict(file)
            found = str(self._arrays["crop"])
            self.resolution = str(self._arrays["resolution"])
        except (OSError, ValueError, KeyError):
            raise InputError(f"{path}: cannot be read as statistics of a real set (`liveavatar evaluate statistics` writes them)") from None
        if found != crop:
            raise InputError(f"{path}: pictures of crop {found!r}, suite.crop says {crop!r}: other crops are other distances")
        self.remark = f"real set {sha256(path)[:12]}, {self.resolution}, crop {crop}"

    def features(self, name: str, expected: str) -> np.ndarray:
        """[m, d]. Raises InputError when they were made by other weights or are not there."""
        if name not in self._arrays or str(self._arrays[f"{name}_sha256"]) != expected:
            raise InputError(f"{self.path}: no features of the very weights of backends.{name}")
        return self._arrays[name]


class Distribution:
    """FID and FVD over a whole suite: feed it every video, then ask."""

    def __init__(self, backends: Backends, real: Real | None = None):
        self.backends, self.real, self._mine = backends, real, Features(backends)

    def add(self, video: VideoFile) -> None:
        """Raises InputError where its pictures are not of the real set's size."""
        if self.real is None or not any(map(self.backends.has, EXTRACTORS)):
            return
        if f"{video.width}x{video.height}" != self.real.resolution:
            raise InputError(f"{self.real.path}: pictures of {self.real.resolution}, {video.path} has {video.width}x{video.height}")
        self._mine.add(video)

    def measures(self) -> list[Measure]:
        """FID and FVD, and beside each the kernel distance of the same features, which few samples do not bias."""
        return [*self._measures("FID", "KID", "inception"), *self._measures("FVD", "KVD", "i3d")]

    def _measures(self, name: str, kernel: str, backend: str) -> list[Measure]:
        if not self.backends.has(backend) or self.real is None:
            missing = [] if self.backends.has(backend) else [self.backends.needs(backend).removeprefix("needs ")]
            missing += [] if self.real is not None else ["features of a real set (suite.real)"]
            return [absent(label, f"needs {' and '.join(missing)}", better="lower", backend=backend) for label in (name, kernel)]
        sha = self.backends.sha256(backend)
        mine, theirs = self._mine.of(backend), self.real.features(backend, sha)
        n = min(len(mine), len(theirs))
        if n < 2:
            return [absent(label, f"too short: {n} samples", better="lower", backend=backend) for label in (name, kernel)]
        reason = self.real.remark + (f"; small n: {n} of {SMALL[name]}" if n < SMALL[name] else "")
        return [Measure(name=label, value=distance(mine, theirs), unit="", better="lower", n=n, backend=backend, weights_sha256=sha, reason=reason)
                for label, distance in ((name, frechet), (kernel, kernel_distance))]
