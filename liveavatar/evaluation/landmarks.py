"""What the tracker saw of a face over time, and how it compares with a reference or with commanded motion.

Lengths are shares of the distance between the outer eye corners (IOD), so that neither picture size nor distance counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from liveavatar.conditioning import face
from liveavatar.conditioning.face import Face
from liveavatar.evaluation import series
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.report import Measure, absent

BACKEND = "mediapipe-0.10.21 468 mesh + eye rim"
LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 185, 40, 39, 37, 0, 267, 269, 270, 409,
        78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 191, 80, 81, 82, 13, 312, 311, 310, 415)  # fmt: skip
STABLE = (33, 133, 362, 263, 168, 6, 197, 195)  # eye corners and nose bridge: skull, not expression
NOSE_BASE, FOREHEAD = 2, 10
GAP_FLOOR, WIDTH_FLOOR, LID_FLOOR = 0.006, 0.005, 0.004  # IOD: standard deviations on a still face in an mp4, see tests/test_eval_face.py
GAP_JITTER = 0.35  # pixels that the gap of a still face has at most, which is what counts where eyes are few pixels apart: of 100 still
# renders in 128 pixels, 20 people in five sizes, the most were .31 at 41 and 25 pixels between the eyes and .19 at 20
MIN_PAIRS = 25  # pictures with a face in both videos
DISTANCES = {"lmd": "IOD", "f_lmd": "IOD", "lvd": "IOD/s"}
TRUE_STEP = 3
FLOOR = (f"The tracker's noise floor, not measured here: on still faces at 128 pixels standard deviations were below {GAP_FLOOR} IOD of the gap, "
         f"or {GAP_JITTER} pixels where that is more (100 faces each), {WIDTH_FLOOR} of the width and {LID_FLOOR} of the lids (14 faces). "
         "Motion below that is not told from stillness.")
NOISE = {"gap": "gap", "width": "width", "blink": "lids"}  # channel -> what is tracked of it
CHANNELS = ("gap", "width", "blink", "yaw", "pitch", "roll")  # of a commanded motion


@dataclass(frozen=True)
class Track:
    """One face through a video. times float64 [T] seconds; points float32 [T, 468, 3] pixels, NaN where there is no face;
    faces int [T], how many were seen: the largest is followed."""

    times: np.ndarray
    points: np.ndarray
    faces: np.ndarray

    @staticmethod
    def of(times: Sequence[float], found: Iterable[Sequence[Face]]) -> Track:
        """From what FaceTracker saw at each time."""
        found = list(found)
        nothing = np.full((468, 3), np.nan, np.float32)
        points = [faces[0].landmarks if faces else nothing for faces in found]
        return Track(np.asarray(times, float), np.stack(points) if points else nothing[None][:0], np.array([len(f) for f in found], int))

    @staticmethod
    def through(file: VideoFile) -> Track:
        """What a new tracker sees in all of a video."""
        tracker, times, found = face.FaceTracker(), [], []
        for at, picture in file.frames():
            times.append(at)
            found.append(tracker.follow(picture))
        return Track.of(times, found)

    @property
    def seen(self) -> np.ndarray:
        """bool [T]: there is a face."""
        return self.faces > 0

    @cached_property
    def eye_distance(self) -> np.ndarray:
        """[T] pixels."""
        return self._distance(face.EYE_RIGHT, face.EYE_LEFT)

    @cached_property
    def gap(self) -> np.ndarray:
        """[T] between the inner lips."""
        return self._distance(*face.INNER_LIPS) / self.eye_distance

    @cached_property
    def gap_floor(self) -> float:
        """Standard deviation of the gap up to which a mouth counts as still."""
        return max(GAP_FLOOR, GAP_JITTER / float(np.nanmedian(self.eye_distance))) if self.seen.any() else GAP_FLOOR

    @cached_property
    def width(self) -> np.ndarray:
        """[T] between the mouth's corners."""
        return self._distance(*face.MOUTH_CORNERS) / self.eye_distance

    @cached_property
    def lids(self) -> np.ndarray:
        """[T] mean opening of the eyes."""
        return (self._distance(*face.LIDS_RIGHT) + self._distance(*face.LIDS_LEFT)) / 2 / self.eye_distance

    @cached_property
    def pose(self) -> np.ndarray:
        """[T, 3] degrees: yaw towards the picture's right, pitch up, roll clockwise; from the mesh's depth, an estimate."""
        across = self.points[:, face.EYE_LEFT] - self.points[:, face.EYE_RIGHT]
        down = self.points[:, NOSE_BASE] - self.points[:, FOREHEAD]
        yaw = np.arctan2(across[:, 2], across[:, 0])
        pitch = -np.arctan2(down[:, 2], down[:, 1])
        roll = np.arctan2(across[:, 1], across[:, 0])
        return np.degrees(np.stack([yaw, pitch, roll], axis=1))

    def _distance(self, a: int, b: int) -> np.ndarray:
        return np.linalg.norm(self.points[:, a, :2] - self.points[:, b, :2], axis=-1).astype(float)

    def channel(self, name: str) -> np.ndarray:
        """[T] of one of CHANNELS. A blink is how far the lids are closed."""
        if name in ("yaw", "pitch", "roll"):
            return self.pose[:, ("yaw", "pitch", "roll").index(name)]
        return {"gap": self.gap, "width": self.width, "blink": -self.lids}[name]


def steady(points: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Points [T, 468, 2] moved, turned and scaled so that their STABLE points lie on shape [8, 2]: the head held still."""
    at = points[:, list(STABLE)].astype(float)
    middle, goal = at.mean(1, keepdims=True), shape.mean(0)
    z = _complex(at - middle)
    with np.errstate(invalid="ignore"):  # no face, no numbers
        turn = (_complex(shape - goal)[None] * z.conj()).sum(1) / (np.abs(z) ** 2).sum(1)
    moved = _complex(points.astype(float) - middle) * turn[:, None]
    return np.stack([moved.real, moved.imag], axis=-1) + goal


def _complex(points: np.ndarray) -> np.ndarray:
    return points[..., 0] + 1j * points[..., 1]


# ---------------------------------------------------------------- against a reference video


def paired(track: Track, reference: Track) -> tuple[np.ndarray, np.ndarray]:
    """Indices of pictures of both shown at the same time (within half a picture), with a face in both."""
    mine, theirs = series.together(track.times, reference.times)
    ok = track.seen[mine] & reference.seen[theirs]
    return mine[ok], theirs[ok]


def distances(track: Track, reference: Track) -> list[Measure]:
    """LMD (lips), F-LMD (all points), LVD (velocity of the lips) against a paired reference video (evaluation.md 2.3)."""
    return _distances(track, reference, {name: name for name in DISTANCES}, BACKEND)


def true_distances(track: Track, truth: Truth, reference: Track | None) -> list[Measure]:
    """LMD and LVD against the rendered mesh: where a landmark truly was, moved by what the tracker is off there on the mean of the exact
    render, which must not be laid to the judged video. LVD over TRUE_STEP pictures: from one to the next the tracker's jitter is as
    fast as lips. The floor is what both are of the exact render itself."""
    true, backend = truth.track, f"{BACKEND}; mesh vertices, {TRUE_STEP} pictures' motion"
    a, b = (np.zeros(0, int),) * 2 if reference is None else paired(reference, true)
    if len(a) < MIN_PAIRS:
        reason = "needs the reference video: where the tracker sees a landmark is unknown"
        return [absent(name, reason, unit=DISTANCES[name[:3]], better="lower", backend=backend) for name in ("lmd_gt", "lvd_gt")]
    shape = true.points[:, list(STABLE), :2].mean(0)
    points = steady(true.points[..., :2], shape)
    off = (steady(reference.points[a, :, :2], shape) - points[b]).mean(0)
    off[list(STABLE)] = 0
    seen = Track(true.times, np.concatenate([points + off, true.points[..., 2:]], axis=-1), true.faces)
    return [m for face, ending in ((track, "_gt"), (reference, "_gt_floor"))
            for m in _distances(face, seen, {name + ending: name for name in ("lmd", "lvd")}, backend, TRUE_STEP)]  # fmt: skip


def _distances(track: Track, reference: Track, names: Mapping[str, str], backend: str, step: int = 1) -> list[Measure]:
    """names: of a measure -> which of DISTANCES it is. step: pictures over which a velocity is taken."""
    a, b = paired(track, reference)
    if len(a) < MIN_PAIRS:
        reason = f"too short: {len(a)} paired pictures with a face, {MIN_PAIRS} needed"
        return [absent(name, reason, unit=DISTANCES[kind], better="lower", backend=backend) for name, kind in names.items()]
    shape = reference.points[b][:, list(STABLE), :2].mean(0)
    unit = float(np.median(reference.eye_distance[b]))
    one, two = (steady(points, shape) / unit for points in (track.points[a, :, :2], reference.points[b, :, :2]))
    apart, lips, times = np.linalg.norm(one - two, axis=-1), (one - two)[:, LIPS], track.times[a]
    speed = np.linalg.norm(lips[step:] - lips[:-step], axis=-1).mean(1) / (times[step:] - times[:-step])
    errors = {"lmd": (times, apart[:, LIPS].mean(1)), "f_lmd": (times, apart.mean(1)), "lvd": (times[step:], speed)}
    return [Measure(name=name, value=float(np.mean(v)), unit=DISTANCES[kind], better="lower", n=len(v), backend=backend,
                    interval=series.mean_interval(t, v)) for name, kind in names.items() for t, v in [errors[kind]]]  # fmt: skip


# ---------------------------------------------------------------- against commanded motion


@dataclass(frozen=True)
class Truth:
    """What a face was told to do. times [T] seconds; channels: some of CHANNELS -> [T], any unit, larger = more; points: landmark ->
    [T, 2] pixels where the rendered mesh has it, empty where that is not known."""

    times: np.ndarray
    channels: Mapping[str, np.ndarray]
    points: Mapping[int, np.ndarray] = field(default_factory=dict)

    def at(self, name: str, times: np.ndarray) -> np.ndarray:
        """The channel at other times; NaN outside."""
        return np.interp(times, self.times, self.channels[name], left=np.nan, right=np.nan)

    @property
    def track(self) -> Track:
        """A face whose known landmarks are where they truly are; NaN elsewhere."""
        points = np.full((len(self.times), 468, 3), np.nan, np.float32)
        for landmark, path in self.points.items():
            points[:, landmark, :2] = path
        return Track(self.times, points, np.ones(len(self.times), int))


def response(track: Track, truth: Truth, reference: Track | None) -> list[Measure]:
    """r and slope of tracked on commanded motion per channel. The slope is divided by that of the reference, the exact render:
    a tracker sees only a share of what small mouths and lids do, and that share must not be laid to the judged video."""
    made = []
    for name in CHANNELS:
        if name in truth.channels:
            made += _response(name, track, truth, reference)
    return made


def noise(reference: Track, truth: Truth) -> list[Measure]:
    """What the tracker adds: standard deviation of what it sees of the exact render about a straight line through what was commanded.
    An upper bound, as faces do not follow commands along straight lines."""
    made = []
    for channel, seen in NOISE.items():
        m = _moments(reference, truth, channel) if channel in truth.channels else None
        if m is None:
            made.append(absent(f"tracker_noise_{seen}", f"the commanded {channel} does not move", unit="IOD", better="lower", backend=BACKEND))
            continue
        made.append(Measure(name=f"tracker_noise_{seen}", value=float(series.residual(m.sum(0))), unit="IOD", better="lower", n=int(m[:, 0].sum()),
                            interval=series.interval(series.residual(series.resampled(m))), backend=BACKEND,
                            reason="the exact render as tracked, about a line through the commanded motion"))  # fmt: skip
    return made


def _response(name: str, track: Track, truth: Truth, reference: Track | None) -> list[Measure]:
    r_name, slope_name = f"response_{name}_r", f"response_{name}_slope"
    m = _moments(track, truth, name)
    if m is None:
        reason = f"the commanded {name} does not move, or fewer than {MIN_PAIRS} pictures show a face"
        return [absent(r_name, reason, backend=BACKEND), absent(slope_name, reason, better="target", backend=BACKEND)]
    drawn = series.resampled(m)
    # a face that stands still follows nothing
    r = float(np.nan_to_num(series.correlation(m.sum(0))))
    first = Measure(name=r_name, value=r, unit="", better="higher", n=int(m[:, 0].sum()), backend=BACKEND,
                    interval=series.interval(np.nan_to_num(series.correlation(drawn))))  # fmt: skip
    other = None if reference is None else _moments(reference, truth, name)
    gain = float("nan") if other is None else float(series.slope(other.sum(0)))
    if not abs(gain) > 0:
        return [first, absent(slope_name, "needs the reference video: the tracker's own gain is unknown", better="target", backend=BACKEND)]
    # the same seconds of both, where they go together: what a second asks for is then no source of doubt
    gains = series.slope(series.resampled(other)) if len(other) == len(m) else gain
    return [first, Measure(name=slope_name, value=float(series.slope(m.sum(0))) / gain, unit="", better="target", n=first.n, backend=BACKEND,
                           interval=series.interval(series.slope(drawn) / gains))]  # fmt: skip


def _moments(track: Track, truth: Truth, name: str) -> np.ndarray | None:
    """Moments [B, 6] of commanded (x) and tracked (y) motion; None where there is too little to compare."""
    commanded = truth.at(name, track.times)
    block, count = series.block_of(track.times)
    m = series.moments(commanded, track.channel(name), block, count)
    enough = count > 1 and m[:, 0].sum() >= MIN_PAIRS and np.nanstd(commanded) > 1e-6
    return m if enough else None


def tracking(track: Track) -> list[Measure]:
    """Share of pictures with a face, with more than one, and where it is."""
    if not len(track.times):
        return [absent("faces", "the file holds no pictures", backend=BACKEND)]
    return [
        Measure(name="face_share", value=float(np.mean(track.faces > 0)), unit="", better="higher", n=len(track.times), backend=BACKEND),
        Measure(name="several_faces_share", value=float(np.mean(track.faces > 1)), unit="", better="lower", n=len(track.times), backend=BACKEND),
        *_place(track),
    ]  # fmt: skip


def _place(track: Track) -> list[Measure]:
    """Where the face is and how large: mean of its rigid points, distance of the outer eye corners."""
    middle = track.points[:, list(STABLE), :2].mean(1)
    made = []
    for name, values in (("face_x", middle[:, 0]), ("face_y", middle[:, 1]), ("face_iod", track.eye_distance)):
        if not track.seen.any():
            made.append(absent(name, "no face", unit="px", better="target", backend=BACKEND))
        else:
            made.append(Measure(name=name, value=float(np.nanmean(values)), unit="px", better="target", n=int(track.seen.sum()), backend=BACKEND,
                                interval=series.mean_interval(track.times, values)))  # fmt: skip
    return made
