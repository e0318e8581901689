"""Faces in pictures: boxes and the 468 mesh points of the MediaPipe face models, run by ai-edge-litert on the CPU.

The three models (Apache-2.0; arXiv 1907.05047, 1907.06724, 2006.11341) are data files of the wheel of mediapipe 0.10.21,
whose own code is not used: later wheels hold no models, and its code wants numpy below 2. Coordinates are continuous
pixels, x right, y down, the picture's upper left corner at 0, 0.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from liveavatar.core import InputError

DETECTOR, MESH, EYE = "face_detection_short_range", "face_landmark", "iris_landmark"
MODEL_SHA256 = {
    DETECTOR: "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
    MESH: "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
    EYE: "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f",
}
TRACKER_SHA256 = hashlib.sha256(" ".join(MODEL_SHA256.values()).encode()).hexdigest()  # of all three, for reports
MODELS = "pip install --no-deps mediapipe==0.10.21 (its models alone are used)"
INSTALL = f"pip install 'liveavatar[eval]', then {MODELS}"  # of all that judges faces
TRACKER_INSTALL = f"make face, or pip install 'liveavatar[face]', then {MODELS}"

# Points of the mesh, numbered as its authors do; left and right are the person's.
EYE_RIGHT, EYE_LEFT = 33, 263  # outer corners; their distance is the unit of all that is measured on faces
INNER_LIPS, MOUTH_CORNERS = (13, 14), (61, 291)
EYE_CORNERS, CHIN = (33, 133, 362, 263), 152
LIDS_RIGHT, LIDS_LEFT = (159, 145), (386, 374)
CONTOUR_RIGHT = (33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173)  # in the order of the eye model
CONTOUR_LEFT = (263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398)

ANCHOR_GRIDS = ((16, 2), (8, 6))  # the detector's output cells per side, and anchors in each
DETECTOR_SIDE, MESH_SIDE, EYE_SIDE = 128, 192, 64  # pixels the models look at
MIN_SCORE = 0.5  # of a detection, and of the mesh's own belief that it sees a face
SAME_FACE = 0.3  # intersection over union from which on two boxes are one face
MARGIN = 1.5  # side of the square the mesh looks at, in longer sides of the face's box
LOOKS = (0.95, 1.03)  # the mesh looks twice, so much closer and farther, and the mean is taken: it halves the noise's square
CLOSER = (1.0, 0.5, 0.25)  # where the whole picture shows no face: sides of the squares looked at one by one, in its shorter sides
EYE_MARGIN = 2.3  # side of the square the eye model looks at, in widths of the eye


@dataclass(frozen=True)
class Face:
    """One face in one picture. box: x0 y0 x1 y1 around the mesh, pixels. score: 0..1, of the mesh. landmarks float32
    [468, 3] pixels: x, y and depth towards the back of the head, in pixels too, zero at the head's middle."""

    box: tuple[float, float, float, float]
    score: float
    landmarks: np.ndarray

    @property
    def eye_distance(self) -> float:
        """Pixels between the outer eye corners."""
        return float(np.linalg.norm(self.landmarks[EYE_RIGHT, :2] - self.landmarks[EYE_LEFT, :2]))

    @property
    def eyes(self) -> np.ndarray:
        """[2] pixels: the middle between the eyes."""
        return self.landmarks[list(EYE_CORNERS), :2].astype(float).mean(0)

    def moved(self, x: float, y: float) -> Face:
        """The same face so many pixels further right and down."""
        x0, y0, x1, y1 = self.box
        return Face((x0 + x, y0 + y, x1 + x, y1 + y), self.score, self.landmarks + np.float32([x, y, 0]))


@dataclass(frozen=True)
class _Square:
    """Where a model looks: centre and side in pixels, angle in radians by which the face is turned clockwise."""

    centre: np.ndarray
    side: float
    angle: float

    def to_picture(self, cells: int) -> np.ndarray:
        """[2, 3]: coordinates 0..cells inside the square -> pixels of the picture."""
        scale = self.side / cells
        c, s = np.cos(self.angle) * scale, np.sin(self.angle) * scale
        turn = np.array([[c, -s], [s, c]])
        return np.column_stack([turn, self.centre - turn @ np.full(2, cells / 2)])

    def place(self, points: np.ndarray, cells: int) -> np.ndarray:
        """Points [n, 2] in 0..cells inside the square -> [n, 2] pixels of the picture."""
        matrix = self.to_picture(cells)
        return points @ matrix[:, :2].T + matrix[:, 2]


class FaceTracker:
    """Finds faces and follows them from picture to picture. One object per video: it remembers the last picture's faces."""

    def __init__(self) -> None:
        """Raises InputError naming what to install where the models or their runtime are missing."""
        self._detector, self._mesh, self._eyes = _Model(DETECTOR), _Model(MESH), _Model(EYE)
        self._last: list[Face] = []

    def track(self, frames: Iterable[np.ndarray]) -> list[list[Face]]:
        """Pictures uint8 [H, W, 3] RGB, read one at a time -> for each the faces in it, largest first."""
        return [self.follow(frame) for frame in frames]

    def follow(self, frame: np.ndarray) -> list[Face]:
        """The faces of the next picture uint8 [H, W, 3] RGB, largest first."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise InputError(f"picture {frame.shape} {frame.dtype}: must be uint8 [H, W, 3]")
        squares = [_around(face.landmarks) for face in self._last]
        known = [face.box for face in self._last]
        for box, square in self._detect(frame):
            if all(_overlap(box, other) < SAME_FACE for other in known):
                first = self._fit(frame, square)  # from a box alone the mesh sits badly: look again where it found the face
                squares += [] if first is None else [_around(first.landmarks)]
        found = (self._fit(frame, square) for square in squares)
        self._last = _distinct([face for face in found if face is not None])
        return list(self._last)

    def find(self, picture: np.ndarray) -> list[Face]:
        """The faces of a picture by itself, uint8 [H, W, 3] RGB, largest first. Small ones too: of a whole picture the detector
        overlooks those under a tenth of its longer side."""
        faces, shorter = self._afresh(picture, 0, 0), min(picture.shape[:2])
        for side in (round(share * shorter) for share in CLOSER):
            if faces or side < DETECTOR_SIDE:
                break
            corners = [(x, y) for y in _starts(picture.shape[0], side) for x in _starts(picture.shape[1], side)]
            faces = [face for x, y in corners for face in self._afresh(picture[y : y + side, x : x + side], x, y)]
            faces = _distinct([again for face in faces for again in self._near(picture, face)])  # some squares show half a face
        return faces

    def _near(self, picture: np.ndarray, face: Face) -> list[Face]:
        """The largest face where one was seen, by a look that has all of it in the middle; none where it was none."""
        x0, y0, x1, y1 = face.box
        reach = max(x1 - x0, y1 - y0)
        left, top = (max(0, int(low - reach)) for low in (x0, y0))
        return self._afresh(picture[top : int(y1 + reach), left : int(x1 + reach)], left, top)[:1]

    def _afresh(self, part: np.ndarray, left: int, top: int) -> list[Face]:
        """The faces in a part of a picture whose corner lies at left, top, in the picture's pixels."""
        self._last = []
        found, self._last = self.follow(part), []
        return [face.moved(left, top) for face in found]

    def _detect(self, frame: np.ndarray) -> list[tuple[np.ndarray, _Square]]:
        """Boxes [4] x0 y0 x1 y1 of faces, and the square in which the mesh should look for each."""
        height, width = frame.shape[:2]
        whole = _Square(np.array([width, height]) / 2, float(max(height, width)), 0.0)
        rows, logits = self._detector(_cut(frame, whole, DETECTOR_SIDE) * 2 - 1)
        scores = 1 / (1 + np.exp(-np.clip(logits[0, :, 0], -50, 50)))
        kept = np.flatnonzero(scores >= MIN_SCORE)
        points = rows[0, kept].reshape(-1, 8, 2) / DETECTOR_SIDE  # centre, size, six points of the face
        points[:, [0, 2, 3, 4, 5, 6, 7]] += _anchors()[kept, None]
        points *= whole.side
        points[:, [0, 2, 3, 4, 5, 6, 7]] += whole.centre - whole.side / 2
        return _suppressed(points, scores[kept])

    def _fit(self, frame: np.ndarray, square: _Square) -> Face | None:
        """The mesh on the face in a square; None where the model sees no face there."""
        looks = [self._look(frame, _Square(square.centre, square.side * factor, square.angle)) for factor in LOOKS]
        score = float(np.mean([1 / (1 + np.exp(-flag)) for _, flag in looks]))
        if score < MIN_SCORE:
            return None
        landmarks = np.mean([points for points, _ in looks], axis=0)
        for contour, mirrored in ((CONTOUR_RIGHT, False), (CONTOUR_LEFT, True)):
            landmarks[list(contour), :2] = self._eye(frame, landmarks, contour, mirrored)
        flat = landmarks[:, :2]
        return Face((*(float(v) for v in flat.min(0)), *(float(v) for v in flat.max(0))), score, landmarks.astype(np.float32))

    def _look(self, frame: np.ndarray, square: _Square) -> tuple[np.ndarray, float]:
        """Mesh points [468, 3] in pixels of the picture, and the logit of there being a face."""
        points, flag = self._mesh(_cut(frame, square, MESH_SIDE))
        points = points.reshape(468, 3).astype(np.float64)
        return np.column_stack([square.place(points[:, :2], MESH_SIDE), points[:, 2] * (square.side / MESH_SIDE)]), flag.item()

    def _eye(self, frame: np.ndarray, landmarks: np.ndarray, contour: tuple[int, ...], mirrored: bool) -> np.ndarray:
        """The rim [16, 2] of one eye in pixels, of the eye's own model: the mesh hardly sees a lid that closes.

        mirrored: the person's left eye; the model knows right ones.
        """
        corners = landmarks[[contour[0], contour[8]], :2]
        width = float(np.linalg.norm(corners[0] - corners[1]))
        square = _Square(corners.mean(0), max(EYE_MARGIN * width, 1.0), _angle(landmarks))
        picture = _cut(frame, square, EYE_SIDE)
        points = self._eyes(picture[:, ::-1] if mirrored else picture)[0].reshape(71, 3)[:16, :2].astype(np.float64)
        if mirrored:
            points[:, 0] = EYE_SIDE - points[:, 0]
        return square.place(points, EYE_SIDE)


class _Model:
    """A .tflite file on one CPU thread: float32 [n, n, 3] -> its outputs in order."""

    def __init__(self, name: str) -> None:
        interpreter, path = _runtime(), model_path(name)
        if hashlib.sha256(path.read_bytes()).hexdigest() != MODEL_SHA256[name]:
            raise InputError(f"{path}: not the model that this program knows: {TRACKER_INSTALL}")
        self._runner = interpreter(model_path=str(path), num_threads=1)
        self._runner.allocate_tensors()
        self._input = self._runner.get_input_details()[0]["index"]
        self._outputs = [output["index"] for output in self._runner.get_output_details()]

    def __call__(self, picture: np.ndarray) -> list[np.ndarray]:
        self._runner.set_tensor(self._input, picture[None].astype(np.float32))
        self._runner.invoke()
        return [self._runner.get_tensor(index) for index in self._outputs]


def _runtime() -> type:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise InputError(f"tracking faces needs ai-edge-litert, which is not installed: {TRACKER_INSTALL}") from None
    return Interpreter


def model_path(name: str) -> Path:
    """The file of one of the three models. Raises InputError naming what to install where it is missing."""
    package = importlib.util.find_spec("mediapipe")
    if package is None or not package.submodule_search_locations:
        raise InputError(f"tracking faces needs the models in the wheel of mediapipe 0.10.21, which is not installed: {TRACKER_INSTALL}")
    kind = "face_detection" if name == DETECTOR else name
    path = Path(package.submodule_search_locations[0]) / "modules" / kind / f"{name}.tflite"
    if not path.is_file():
        raise InputError(f"{path} is missing, other versions of mediapipe hold no models: {TRACKER_INSTALL}")
    return path


def _cut(frame: np.ndarray, square: _Square, cells: int) -> np.ndarray:
    """The square of a picture as float32 [cells, cells, 3] in 0..1; black outside the picture."""
    try:
        import cv2
    except ImportError:
        raise InputError(f"tracking faces needs opencv-python-headless, which is not installed: {TRACKER_INSTALL}") from None
    shrink = max(1, int(square.side / cells))  # bilinear sampling skips pixels beyond a factor of two: average them first
    if shrink > 1:
        height, width = (max(1, round(n / shrink)) for n in frame.shape[:2])
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    matrix = square.to_picture(cells) / shrink
    matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5  # OpenCV counts from the middle of the first pixel
    cut = cv2.warpAffine(frame, matrix, (cells, cells), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT)
    return cut.astype(np.float32) / 255


@cache
def _anchors() -> np.ndarray:
    """[896, 2]: the middle of every output cell of the detector, shares of the picture, in the order of its outputs."""
    grids = []
    for cells, repeats in ANCHOR_GRIDS:
        middle = (np.arange(cells) + 0.5) / cells
        grids.append(np.repeat(np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2), repeats, axis=0))
    return np.concatenate(grids)


def _suppressed(points: np.ndarray, scores: np.ndarray) -> list[tuple[np.ndarray, _Square]]:
    """Detections [n, 8, 2], scores [n] -> one (box, square) per face: overlapping ones averaged by score."""
    boxes = np.concatenate([points[:, 0] - points[:, 1] / 2, points[:, 0] + points[:, 1] / 2], axis=1)
    left, found = np.argsort(-scores), []
    while len(left):
        same = np.array([_overlap(boxes[left[0]], boxes[k]) >= SAME_FACE for k in left])
        group, left = left[same], left[~same]
        mean = np.average(points[group], axis=0, weights=scores[group])
        centre, size, right_eye, left_eye = mean[:4]
        dx, dy = left_eye - right_eye
        square = _Square(centre, MARGIN * float(size.max()), float(np.arctan2(dy, dx)))
        found.append((np.concatenate([centre - size / 2, centre + size / 2]), square))
    return found


def _around(landmarks: np.ndarray) -> _Square:
    """The square in which to look for a face that was just there: upright with it, its box and a margin."""
    flat, angle = landmarks[:, :2].astype(np.float64), _angle(landmarks)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    upright = flat @ turn
    low, high = upright.min(0), upright.max(0)
    return _Square(turn @ ((low + high) / 2), MARGIN * float((high - low).max()), angle)


def _starts(length: int, side: int) -> range:
    """Where squares begin that overlap by half along so many pixels; the last may end beyond them."""
    return range(0, max(1, length - side // 2), side // 2)


def _angle(landmarks: np.ndarray) -> float:
    """Radians by which the line between the eyes is turned clockwise."""
    dx, dy = landmarks[EYE_LEFT, :2] - landmarks[EYE_RIGHT, :2]
    return float(np.arctan2(dy, dx))


def _overlap(a, b) -> float:
    """Intersection over union of two boxes x0 y0 x1 y1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return float(both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both))


def _distinct(faces: list[Face]) -> list[Face]:
    """Largest first; of faces that lie on each other only the first."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda f: -f.eye_distance):
        if all(_overlap(face.box, other.box) < SAME_FACE for other in kept):
            kept.append(face)
    return kept
