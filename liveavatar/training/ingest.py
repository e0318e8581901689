"""Stage `data` from a folder of videos: shots, filters, crops; clip files like the generator's, labels from a tracker.

Every clip that is dropped is counted under one reason. A file's outcome is written once its clips are, so a killed run
goes on with the next file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from liveavatar.conditioning import face
from liveavatar.conditioning.audio_features import SAMPLES_PER_FRAME
from liveavatar.core import FPS, SAMPLE_RATE, ConfigError, InputError
from liveavatar.training import footage, shards
from liveavatar.training.data import DataConfig
from liveavatar.training.progress import counted
from liveavatar.training.synth.speech import LOOKAHEAD_SECONDS

LIP_OUTLINE = (61, 291, 0, 17)  # mouth corners, top and bottom of the lips
NATURAL_LAG_MS = 40.0  # that sound trails a natural face by
FIRST_PERSON = 2_000_000  # seeds of people in videos begin here, one per file; the generator's are below

SyncJudge = Callable[[list[list[face.Face]], np.ndarray], tuple[float, float] | None]
"""(faces per picture at 25 per second, pcm float32 16 kHz) -> (confidence, milliseconds that the sound is late), None: cannot say."""


class Tracker(Protocol):
    """What finds faces; conditioning.face.FaceTracker."""

    def track(self, frames) -> list[list[face.Face]]: ...


@dataclass(frozen=True, kw_only=True)
class VideosConfig:
    """folder: videos, captions beside them as NAME.txt. licence, consent: under which terms, and how the people shown agreed; both
    are recorded with every clip. face_pixels: least distance between the outer eye corners in the source; present: least share
    of pictures with a face; several: most pictures with two; loudness: least RMS in dBFS; confidence, offset_ms: of the sync
    judge; margin: shorter side of the crop in heights of the face; shortest: seconds of a shot that clips are cut from; stretch: most
    seconds judged for sync at once; held_share: of the files."""

    folder: str
    licence: str
    consent: str
    face_pixels: float = 40.0
    present: float = 0.95
    several: float = 0.05
    loudness: float = -45.0
    confidence: float = 0.2
    offset_ms: float = 120.0
    margin: float = 1.9
    shortest: float = 0.0
    stretch: float = 20.0
    held_share: float = 0.05

    def __post_init__(self):
        for name in ("licence", "consent"):
            if not getattr(self, name).strip():
                raise ConfigError(f"videos.{name} is empty: say under which {name} these people's pictures are used")
        for name in ("present", "several", "held_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"videos.{name}={getattr(self, name)}: must be in 0..1")
        if self.margin < 1:
            raise ConfigError(f"videos.margin={self.margin}: must be at least 1, the face itself")


@dataclass
class Outcome:
    """Of one file: clips kept, and dropped by reason."""

    file: str
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Piece:
    """One clip's worth of a stretch. first: its first picture, counted in the stretch; clip: None where `reason` says why not."""

    first: int
    faces: list[list[face.Face]]
    clip: dict[str, np.ndarray] | None
    reason: str = ""


# ---------------------------------------------------------------- the stage


def ingest(config: VideosConfig, data: DataConfig, judge: SyncJudge | None, tracker: Callable[[], Tracker] = face.FaceTracker) -> dict:
    """Make clips of every video that was not seen yet; returns the report, also in data.folder/ingest.json.

    judge: None drops nothing for want of synchrony, and the report says so. Raises ConfigError, InputError.
    """
    paths = sorted(p for p in Path(config.folder).rglob("*") if p.suffix.lower() in footage.SUFFIXES)
    if not paths:
        raise ConfigError(f"videos.folder={config.folder}: holds no video ({', '.join(footage.SUFFIXES)})")
    for number, path in enumerate(counted(paths, "videos")):
        record = record_path(data, path, config)
        if not record.exists():
            outcome = ingest_file(path, number, config, data, judge, tracker)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps({**vars(outcome), "dropped": dict(outcome.dropped)}), encoding="utf-8")
    return write_report(config, data, paths, judge is not None)


def record_path(data: DataConfig, path: Path, config: VideosConfig) -> Path:
    """Where the outcome of one video lies."""
    name = path.relative_to(config.folder).as_posix()
    return Path(data.folder) / "ingest" / f"{path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def write_report(config: VideosConfig, data: DataConfig, paths: list[Path], judged: bool) -> dict:
    """Counts over all files, and per file."""
    outcomes = [json.loads(record_path(data, path, config).read_text()) for path in paths]
    dropped = sum((Counter(outcome["dropped"]) for outcome in outcomes), Counter())
    report = {"config": asdict(config), "sync judged": judged, "kept": sum(outcome["kept"] for outcome in outcomes),
              "dropped": dict(dropped), "files": outcomes}
    Path(data.folder, "ingest.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def ingest_file(path: Path, number: int, config: VideosConfig, data: DataConfig, judge: SyncJudge | None, tracker: Callable[[], Tracker]) -> Outcome:
    """Clips of one video into data.folder. A file that cannot be read is one drop."""
    outcome = Outcome(path.relative_to(config.folder).as_posix())
    split = "held" if int(hashlib.sha256(outcome.file.encode()).hexdigest()[:8], 16) / 2**32 < config.held_share else "train"
    try:
        for at, clip in clips_of(path, config, data, judge, tracker, outcome):
            index = 1 + max(map(shards.number_of, shards.clip_paths(data.folder, split)), default=-1)
            card = card_of(path, outcome.file, config) | {"split": split, "index": index, "seed": FIRST_PERSON + index, "start": at / FPS,
                                                          "identity": {"seed": FIRST_PERSON + number}}
            shards.write_clip(shards.clip_path(data.folder, split, index), shards.Clip(**clip, card=card))
            outcome.kept += 1
    except InputError as error:
        outcome.dropped[f"unreadable: {error}"] += 1
    return outcome


def card_of(path: Path, name: str, config: VideosConfig) -> dict:
    """What is known of a clip besides its arrays; no "generator": nothing in it was rendered."""
    text = path.with_suffix(".txt")
    return {"caption": text.read_text(encoding="utf-8").strip() if text.is_file() else "", "source": name, "licence": config.licence,
            "consent": config.consent, "labels": "tracked", "voice": name, "text": "", "fps": FPS, "phones": []}


# ---------------------------------------------------------------- from a file to clips


def clips_of(path: Path, config: VideosConfig, data: DataConfig, judge: SyncJudge | None, tracker: Callable[[], Tracker],
             outcome: Outcome) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first picture, arrays of a Clip) of all that passes; the others are counted in `outcome`. Holds one stretch's clips at a time."""
    pcm, total = footage.sound_of(path), sum(1 for _ in footage.pictures_of(path))
    if pcm is None:
        outcome.dropped["no sound"] += 1
        return
    pictures, at = footage.pictures_of(path), 0
    for first, last in footage.shots_of(path, total):
        if last - first < max(data.pictures, config.shortest * FPS):
            outcome.dropped["short shot"] += 1
            continue
        for start, stop in stretches(first, last, data.pictures, round(config.stretch * FPS)):
            next(islice(pictures, start - at, start - at), None)
            pieces = [take_piece(list(islice(pictures, data.pictures)), sound_at(pcm, start + k, data.pictures), k, config, data, tracker)
                      for k in range(0, stop - start, data.pictures)]
            at = stop
            verdict = sync_reason(pieces, stop - start, sound_at(pcm, start, stop - start), config, judge)
            for piece in pieces:
                if piece.reason or verdict:
                    outcome.dropped[piece.reason or verdict] += 1
                else:
                    yield start + piece.first, piece.clip


def stretches(first: int, last: int, pictures: int, longest: int) -> list[tuple[int, int]]:
    """A shot as stretches of whole clips, none longer than `longest` unless one clip is; the shot's rest is left out."""
    size = max(1, longest // pictures) * pictures
    end = first + (last - first) // pictures * pictures
    return [(start, min(start + size, end)) for start in range(first, end, size)]


def sound_at(pcm: np.ndarray, first: int, pictures: int) -> np.ndarray:
    """float32 of so many pictures and the audio look-ahead; silence beyond the end."""
    start, count = first * SAMPLES_PER_FRAME, pictures * SAMPLES_PER_FRAME + round(LOOKAHEAD_SECONDS * SAMPLE_RATE)
    piece = pcm[start : start + count]
    return np.concatenate([piece, np.zeros(count - len(piece), np.float32)])


def take_piece(frames: list[np.ndarray], pcm: np.ndarray, first: int, config: VideosConfig, data: DataConfig,
               tracker: Callable[[], Tracker]) -> Piece:
    """Judge and crop one clip. The cheap questions come first."""
    nobody: list[list[face.Face]] = [[] for _ in frames]
    if 20 * np.log10(np.sqrt(np.mean(pcm**2)) + 1e-9) < config.loudness:
        return Piece(first, nobody, None, "silent")
    found = tracker().track(frames)
    reason = face_reason(found, config)
    if reason:
        return Piece(first, nobody, None, reason)
    points = followed(found)
    box = crop_box(points, frames[0].shape, config.margin, data.sides)
    if box is None:
        return Piece(first, found, None, "face leaves the crop")
    return Piece(first, found, arrays_of(frames, points, box, pcm, data.sides))


def face_reason(found: list[list[face.Face]], config: VideosConfig) -> str:
    """Why these faces are not one person large enough all along; "" when they are."""
    if np.mean([len(faces) > 1 for faces in found]) > config.several:
        return "several faces"
    if np.mean([len(faces) > 0 for faces in found]) < config.present:
        return "no face"
    if np.median([faces[0].eye_distance for faces in found if faces]) < config.face_pixels:
        return "small face"
    return ""


def sync_reason(pieces: list[Piece], pictures: int, pcm: np.ndarray, config: VideosConfig, judge: SyncJudge | None) -> str:
    """Why sound and mouth of a stretch do not belong together; "" when they do or nobody judges."""
    if judge is None or all(piece.reason for piece in pieces):
        return ""
    verdict = judge([faces for piece in pieces for faces in piece.faces], pcm[: pictures * SAMPLES_PER_FRAME])
    if verdict is None:
        return "sync unknown"
    confidence, lag = verdict
    if confidence < config.confidence:
        return "no sync"
    return "sound offset" if abs(lag - NATURAL_LAG_MS) > config.offset_ms else ""


# ---------------------------------------------------------------- crop and labels


def followed(found: list[list[face.Face]]) -> np.ndarray:
    """Landmarks float32 [T,468,2] pixels of the largest face; a picture without one takes its nearest neighbour's."""
    seen = np.array([i for i, faces in enumerate(found) if faces])
    nearest = seen[np.abs(seen[None] - np.arange(len(found))[:, None]).argmin(1)]
    return np.stack([found[i][0].landmarks[:, :2] for i in nearest])


Box = tuple[float, float, float, float]  # left, top, right, bottom


def crop_box(points: np.ndarray, shape: tuple[int, ...], margin: float, sides: tuple[int, int]) -> Box | None:
    """The one box of the proportions of `sides` (height, width) for all pictures, inside of them; None when the face does not stay in it."""
    low, high = points.min(1), points.max(1)  # [T,2]
    middle, height = np.median((low + high) / 2, axis=0), float(np.median(high[:, 1] - low[:, 1]))
    scale = min(margin * height / min(sides), *(length / side for length, side in zip(shape, sides)))
    size = np.array([sides[1], sides[0]]) * scale  # width, height
    start = np.clip(middle - size / 2, 0, np.array([shape[1], shape[0]]) - size)
    inside = (low >= start).all() and (high <= start + size).all()
    return tuple(map(float, (*start, *(start + size)))) if inside else None


def arrays_of(frames: list[np.ndarray], points: np.ndarray, box: Box, pcm: np.ndarray, sides: tuple[int, int]) -> dict[str, np.ndarray]:
    """The arrays of a Clip: cropped and scaled, with tracked boxes, gap, width and lids; the portrait has the most closed mouth."""
    part = {"size": sides[::-1], "box": box, "resample": Image.Resampling.LANCZOS}
    cropped = np.stack([np.asarray(Image.fromarray(frame).resize(**part)) for frame in frames])
    points = (points - box[:2]) * (sides[0] / (box[3] - box[1]))
    rims = [points[:, rim] for rim in (face.CONTOUR_RIGHT, face.CONTOUR_LEFT)]  # [T,n,2] each
    apart = np.linalg.norm(rims[0].mean(1) - rims[1].mean(1), axis=1)

    def distance(pair: tuple[int, int]) -> np.ndarray:
        return np.linalg.norm(points[:, pair[0]] - points[:, pair[1]], axis=1) / apart

    aperture, lid = distance(face.INNER_LIPS), (distance(face.LIDS_RIGHT) + distance(face.LIDS_LEFT)) / 2
    eyes = np.stack([np.concatenate([rim.min(1), rim.max(1)], axis=1) for rim in rims], axis=1)
    lips, pad = points[:, LIP_OUTLINE], 0.02 * min(sides)
    mouth = np.concatenate([lips.min(1) - pad, lips.max(1) + pad], axis=1)
    calm = np.where(lid >= np.median(lid) * 0.8, aperture, np.inf)
    labels = {"mouth": mouth, "eyes": eyes, "aperture": aperture, "width": distance(face.MOUTH_CORNERS), "lid": lid}
    return {"frames": cropped, "reference": cropped[int(calm.argmin())], "pcm": np.round(np.clip(pcm, -1, 1) * 32767).astype(np.int16),
            **{name: value.astype(np.float32) for name, value in labels.items()}}
