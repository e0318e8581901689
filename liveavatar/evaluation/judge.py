"""One video in, every measure that applies out: the one entry for files of any system (evaluation.md section 2).

The pictures are read once, one at a time; what is kept of them are landmarks, sums, and one embedding a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liveavatar.conditioning.face import TRACKER_SHA256, Face, FaceTracker
from liveavatar.conditioning.faceprint import embedding
from liveavatar.conditioning.identity import load_picture
from liveavatar.conditioning.media import read_audio
from liveavatar.conditioning.phones import Phone, SpeechError, Utterance, model_sha256
from liveavatar.core import InputError
from liveavatar.evaluation import closure, landmarks, likeness, sync
from liveavatar.evaluation import stability as steadiness
from liveavatar.evaluation.backends import Backends
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.landmarks import Track, Truth
from liveavatar.evaluation.quality import Quality
from liveavatar.evaluation.report import Measure, absent
from liveavatar.evaluation.weighted import Sample
from liveavatar.evaluation.weighted import judge as judge_by_weights

KEPT_SECONDS = 30.0  # of pictures held for those networks of the user's that look at every picture
FIVE = ((33, 133), (362, 263), (4,), (61,), (291,))  # eyes, tip of the nose, corners of the mouth: mesh points averaged


@dataclass(frozen=True)
class Portrait:
    """Who it should be. picture uint8 [H, W, 3]; points [5, 2] pixels; embedding [128]."""

    picture: np.ndarray
    points: np.ndarray
    embedding: np.ndarray


def judge_video(video: str | Path | VideoFile, audio: str | Path | None = None, *, reference: str | Path | VideoFile | None = None,
                truth: Truth | None = None, text: str | None = None, phones: tuple[Phone, ...] | None = None,
                portrait: str | Path | None = None, language: str = "en", backends: Backends | None = None,
                start: np.ndarray | None = None) -> list[Measure]:
    """Every measure of one video; what cannot be measured says why.

    audio: a recording in place of the video's own sound, from the video's second 0. reference: what the video should show,
    picture by picture. truth: what the face was told to do. text: what is said; or phones, on the clock of the sound; with
    neither, phones are recognised. portrait: who it should be. backends: the user's weights. start: likeness.own_face of the
    stream whose part this is. Raises InputError on files that cannot be judged.
    """
    file, other = _file(video), None if reference is None else _file(reference)
    pcm = _pcm(file, audio)
    utterance, source = _heard(pcm, text, phones, language)
    who = None if portrait is None else read_portrait(portrait)
    watched, model = watch(file, other, utterance, keep=bool(backends and backends.given))
    return _signed([
        *landmarks.tracking(watched.track), *_speech(watched.track, utterance, source, language),
        *([] if model is None else landmarks.distances(watched.track, model.track)),
        *(landmarks.true_distances(watched.track, truth, None if model is None else model.track) if truth is not None and truth.points else []),
        *([] if truth is None else landmarks.response(watched.track, truth, None if model is None else model.track)),
        *([] if truth is None or model is None else landmarks.noise(model.track, truth)),
        *watched.steady.measures(None if model is None else model.steady), *watched.still.measures(), steadiness.jerk(watched.track),
        *steadiness.motion_energy(watched.track, _silence(utterance, watched.track.times)),
        *watched.likeness.measures(None if who is None else who.embedding, start), *watched.quality.measures(other is not None),
        *_by_weights(watched, model, pcm, who, backends or Backends(), start is not None),
    ], source)  # fmt: skip


def _signed(measures: list[Measure], source: str) -> list[Measure]:
    """Those of the tracker and of the phones with the hashes of their models; phones that were given are nobody's."""
    def signed(m: Measure) -> Measure:
        heard = m.backend in (sync.BACKEND, closure.BACKEND)
        if not m.measured or not (heard or m.backend == landmarks.BACKEND):
            return m
        if heard and source == sync.GIVEN:
            return replace(m, backend=m.backend.replace("pocketsphinx", "given"), weights_sha256=TRACKER_SHA256)
        return replace(m, weights_sha256=f"{model_sha256()}+{TRACKER_SHA256}" if heard else TRACKER_SHA256)

    return [signed(m) for m in measures]


# ---------------------------------------------------------------- the sound


def _file(video: str | Path | VideoFile) -> VideoFile:
    return video if isinstance(video, VideoFile) else VideoFile(video)


def _pcm(file: VideoFile, audio: str | Path | None) -> np.ndarray:
    return file.sound() if audio is None else np.concatenate(list(read_audio(str(audio))))


def _heard(pcm: np.ndarray, text: str | None, phones: tuple[Phone, ...] | None, language: str) -> tuple[Utterance | None, str]:
    """What is said and how that is known; or None and why it is not."""
    if not len(pcm):
        return None, "the file is mute"
    if language != "en" and phones is None:
        return None, f"no phone map for language {language}"
    try:
        return sync.heard(pcm, text, phones)
    except SpeechError as error:
        return None, str(error)


def _speech(track: Track, utterance: Utterance | None, source: str, language: str) -> list[Measure]:
    if utterance is not None:
        return [*sync.av_corr(track, utterance, source), *closure.closure(track, utterance, source, language)]
    fields = {**sync.FIELDS, **closure.NAMES}
    return [absent(name, source, unit=unit, better=better) for name, (unit, better) in fields.items()]


def _silence(utterance: Utterance | None, times: np.ndarray) -> np.ndarray:
    return np.zeros(len(times), bool) if utterance is None else sync.silent_at(utterance, times)


# ---------------------------------------------------------------- the pictures


def read_portrait(path: str | Path) -> Portrait:
    """Raises InputError unless exactly one face is in the picture."""
    picture = load_picture(path).permute(1, 2, 0).contiguous().numpy()
    faces = FaceTracker().follow(picture)
    if len(faces) != 1:
        raise InputError(f"{path}: {len(faces)} faces found: likeness needs a portrait with exactly one")
    return Portrait(picture, five_points(faces[0].landmarks), embedding(picture, faces[0]))


def five_points(points: np.ndarray) -> np.ndarray:
    """Mesh [468, 3] -> [5, 2]: eyes (the person's right one first), tip of the nose, corners of the mouth."""
    return np.stack([points[list(indices), :2].mean(0) for indices in FIVE])


def five_of(faces: list[Face]) -> np.ndarray:
    """[5, 2] of the largest face; NaN without one."""
    return five_points(faces[0].landmarks) if faces else np.full((len(FIVE), 2), np.nan)


class Watched:
    """Everything that is measured on the pictures of one video. brief: no likeness and quality, as of a reference."""

    def __init__(self, utterance: Utterance | None, brief: bool = False, keep: bool = False):
        self.tracker, self.steady, self.still = FaceTracker(), steadiness.Steadiness(), steadiness.Stillness()
        self.likeness, self.quality = (None, None) if brief else (likeness.Likeness(), Quality())
        self._utterance, self._keep = utterance, keep
        self.times: list[float] = []
        self.faces: list[list[Face]] = []
        self.kept: list[tuple[float, np.ndarray]] = []
        self.sample = Sample()
        self.last: np.ndarray | None = None

    def see(self, at: float, frame: np.ndarray, model: Watched | None = None) -> None:
        """The next picture, and the reference that has just seen the same moment."""
        faces = self.tracker.follow(frame)
        self.times.append(at)
        self.faces.append(faces)
        self.last = frame
        self.steady.see(at, frame)
        if self._utterance is not None and _silence(self._utterance, np.array([at]))[0]:
            self.still.see(frame, faces)
        if self.likeness is not None:
            self.likeness.see(at, frame, faces)
            self.quality.see(at, frame, faces, *((None, None) if model is None else (model.last, model.faces[-1])))
        if self._keep and at - self.times[0] < KEPT_SECONDS:
            self.kept.append((at, frame))
        if self._keep:
            self.sample.see(at, frame, five_of(faces))

    @property
    def track(self) -> Track:
        return Track.of(self.times, self.faces)


def watch(file: VideoFile, reference: VideoFile | None, utterance: Utterance | None, keep: bool = False) -> tuple[Watched, Watched | None]:
    """One pass over a video and, beside it, over its reference. Raises InputError where there are no pictures."""
    watched = Watched(utterance, keep=keep)
    model = None if reference is None else Watched(utterance, brief=True, keep=keep)
    beside = _Beside(reference, model)
    for at, frame in file.frames():
        watched.see(at, frame, beside.at(at))
    if not watched.times:
        raise InputError(f"{file.path}: no picture could be decoded")
    return watched, model


class _Beside:
    """The reference video, read on as far as the judged one has come."""

    def __init__(self, reference: VideoFile | None, model: Watched | None):
        self._frames: Iterator = iter(()) if reference is None else reference.frames()
        self._half = 0.0 if reference is None else 0.5 / max(reference.fps, 1.0)
        self._model, self._next = model, next(self._frames, None)

    def at(self, seconds: float) -> Watched | None:
        """The reference, having seen the picture nearest to this time; None where it shows none then."""
        while self._next is not None and self._next[0] <= seconds + self._half:
            self._model.see(*self._next)
            self._next = next(self._frames, None)
        there = self._model is not None and self._model.times and abs(self._model.times[-1] - seconds) <= self._half + 1e-6
        return self._model if there else None


# ---------------------------------------------------------------- networks that the user gives


def _by_weights(watched: Watched, model: Watched | None, pcm: np.ndarray, who: Portrait | None, backends: Backends,
                part: bool) -> list[Measure]:
    """part: the video is a later part of a stream, so that its own beginning says nothing."""
    frames = watched.kept or [(watched.times[0], watched.last)]
    found = watched.track.points[: len(frames)]
    boxes = np.concatenate([found[..., :2].min(1), found[..., :2].max(1)], axis=1)
    cut = f"first {KEPT_SECONDS:.0f} s of {watched.times[-1] - watched.times[0]:.0f}" if len(frames) < len(watched.times) else ""
    return judge_by_weights(frames, pcm, backends, watched.sample, portrait=None if who is None else who.picture, boxes=boxes, cut=cut,
                            portrait_points=None if who is None else who.points, paired=None if model is None else model.kept or None,
                            own="a part of a stream: see how the measure itself changes" if part else "")  # fmt: skip
