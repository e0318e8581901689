"""The synthetic talking head: who it is (Identity), what it does (units), and its picture.

Angles are degrees.  Yaw > 0 turns the face to picture right, pitch > 0 looks up, roll > 0 tilts
the head clockwise in the picture.  Translation is a fraction of the picture, x right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from liveavatar.conditioning.visemes import ARKIT_UNITS
from liveavatar.training.synth import raster, shade
from liveavatar.training.synth.people import FEATURES, Identity
from liveavatar.training.synth.tracked import VERTICES


@dataclass
class Picture:
    """One frame and the truth about it.

    rgb uint8 [size,size,3]; boxes (x0,y0,x1,y1) in pixels; aperture, width, lid are divided by
    the distance between the eye centres, measured on the mesh before head pose; points float32 [n,2]
    pixels of the landmarks of tracked.VERTICES.
    """

    rgb: np.ndarray
    mouth_box: tuple[float, float, float, float]
    eye_boxes: tuple[tuple[float, float, float, float], ...]
    aperture: float
    width: float
    lid: float
    points: np.ndarray


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """float32 [3,3] for angles in degrees; signs as in the module text."""
    y, p, r = np.radians([yaw, -pitch, -roll])
    cy, sy, cp, sp, cr, sr = np.cos(y), np.sin(y), np.cos(p), np.sin(p), np.cos(r), np.sin(r)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (about_z @ about_y @ about_x).astype(np.float32)


class _Body:
    """Identity-morphed mesh ready to pose: points [V,3], units [52,V*3], landmarks' indices."""

    def __init__(self, identity: Identity, marks: _Marks) -> None:
        mesh = raster.load_mesh()
        points = mesh.rest.copy()
        woman, old = identity.female, identity.age
        for race, share in zip(("caucasian", "asian", "african"), identity.mix, strict=True):
            for sex, a in (("female", woman), ("male", 1 - woman)):
                for years, b in (("young", 1 - old), ("old", old)):
                    if share * a * b > 1e-3:
                        name = f"macrodetails/{race}-{sex}-{years}"
                        points += np.float32(share * a * b) * raster.load_morph(name)
        for (low, high), value in zip(FEATURES, identity.features, strict=True):
            for name in high if value > 0 else low:
                points += np.float32(abs(value)) * raster.load_morph(name)
        # Same framing for everybody: eye line and chin land on the same picture rows.
        eyes = [points[i].mean(0) for i in marks.eyeballs]
        middle = (eyes[0] + eyes[1]) / 2
        scale = (marks.rest_eye[1] - marks.rest_chin) / (middle[1] - points[marks.chin, 1])
        curtain = mesh.part == raster.CURTAIN
        moved = (points - middle) * scale + marks.rest_eye
        breadth = np.abs(moved[marks.temples, 0]).mean() / np.abs(mesh.rest[marks.temples, 0]).mean()
        crown = moved[marks.crown, 2].mean() - mesh.rest[marks.crown, 2].mean()
        moved[curtain] = points[curtain] * [breadth, 1, 1] + [0, 0, crown]
        if identity.style == "bob":  # shorter hanging hair, gathered a little at the bottom
            y = points[curtain, 1]
            moved[curtain, 1] = 8.0 - (8.0 - y) * 0.66
        normal = raster.normals(moved.astype(np.float32), mesh)
        thick = {"long": 0.13, "bob": 0.15, "short": 0.12, "buzz": 0.018, "bald": 0.0}
        grow = raster.smoothstep(-0.03, 0.45, mesh.hair) * mesh.layer * thick[identity.style]
        top = 1.0 + 0.5 * raster.smoothstep(7.9, 8.5, mesh.rest[:, 1])
        cloth = raster.smoothstep(5.92, 5.75, mesh.rest[:, 1]) * (mesh.part == raster.SKIN)
        moved = moved + normal * (grow * top + 0.04 * cloth)[:, None]
        self.points = moved.astype(np.float32)
        self.units = (mesh.units * np.float32(scale)).reshape(len(ARKIT_UNITS), -1)
        self.eyes = [self.points[i].mean(0) for i in marks.eyeballs]
        self.iod = float(np.linalg.norm(self.eyes[0] - self.eyes[1]))


class _Marks:
    """Vertex numbers of the places that are measured, found on the base mesh."""

    def __init__(self) -> None:
        mesh = raster.load_mesh()
        rest, part = mesh.rest, mesh.part
        unit = {name: mesh.units[i] for i, name in enumerate(ARKIT_UNITS)}
        self.eyeballs = [
            np.flatnonzero((part == raster.EYE) & (rest[:, 0] * s > 0)) for s in (1, -1)
        ]
        self.rest_eye = (rest[self.eyeballs[0]].mean(0) + rest[self.eyeballs[1]].mean(0)) / 2
        skin = part == raster.SKIN
        front = skin & (np.abs(rest[:, 0]) < 0.02) & (rest[:, 2] > 1.15) & (rest[:, 1] > 5.95)
        self.chin = int(np.flatnonzero(front)[np.argmin(rest[front, 1])])
        self.rest_chin = float(rest[self.chin, 1])
        side = skin & (np.abs(rest[:, 1] - 7.6) < 0.2) & (np.abs(rest[:, 0]) > 0.6)
        self.temples = np.flatnonzero(side & (mesh.ear < 0.3))
        self.crown = np.flatnonzero(skin & (rest[:, 1] > 8.0) & (mesh.hair > 0))
        lips = np.flatnonzero(skin & (mesh.lips > 0.5) & (mesh.inside < 0.5))
        drop = -unit["jawOpen"][lips, 1]
        middle = np.abs(rest[lips, 0]) < 0.06
        self.upper_lip = lips[middle & (drop < 0.08)]
        self.lower_lip = lips[middle & (drop > 0.20)]
        self.lips = lips
        self.corners = [int(lips[np.argmax(s * rest[lips, 0])]) for s in (1, -1)]
        self.tracked = np.array([np.flatnonzero(mesh.source == vertex)[0] for vertex in VERTICES.values()], int)
        self.lids = []
        for name, s in (("eyeBlinkLeft", 1), ("eyeBlinkRight", -1)):
            fall = np.where(skin & (rest[:, 0] * s > 0), -unit[name][:, 1], 0)
            upper = int(np.argmax(fall))
            land = rest[upper] + unit[name][upper]
            far = np.linalg.norm(rest - land, axis=1) + 9.0 * (~skin | (fall > 0.03))
            self.lids.append((upper, int(np.argmin(far))))
        self.head_weight = raster.smoothstep(5.65, 6.5, rest[:, 1] + 0.4 * rest[:, 2])
        self.head_weight = self.head_weight.astype(np.float32)[:, None]


_PIVOT = np.array([0.0, 6.55, 0.15], np.float32)  # where skull meets neck, dm


class HeadRenderer:
    """Draws heads of size x size pixels; keep one per process, it owns a GL context."""

    def __init__(self, size: int = 128, supersample: int = 2) -> None:
        self.size, self.supersample = int(size), int(supersample)
        self.mesh = raster.load_mesh()
        self.marks = _Marks()
        self.raster = raster.Raster(self.size * self.supersample, self.mesh)
        self._body: tuple[Identity, _Body] | None = None

    def _person(self, identity: Identity) -> _Body:
        if self._body is None or self._body[0] != identity:
            self._body = (identity, _Body(identity, self.marks))
            self.raster.style(shade.uniforms(identity))
        return self._body[1]

    def render(self, identity: Identity, units: np.ndarray, pose: tuple = (0, 0, 0),
               translation: tuple = (0, 0), gaze: tuple = (0, 0), view: raster.View = raster.CLOSE) -> Picture:
        """One picture: units [52] in 0..1, pose and gaze in degrees, translation in pictures."""
        row = [np.asarray(x, np.float32)[None] for x in (units, pose, translation, gaze)]
        return self.render_clip(identity, *row, view)[0]

    def neutral(self, identity: Identity, yaw: float = 0.0, view: raster.View = raster.CLOSE) -> np.ndarray:
        """uint8 [size,size,3]: closed mouth, open eyes, looking ahead; the head turned by yaw degrees."""
        return self.render(identity, np.zeros(len(ARKIT_UNITS), np.float32), (yaw, 0, 0), view=view).rgb

    def render_clip(self, identity: Identity, units: np.ndarray, pose: np.ndarray, translation: np.ndarray,
                    gaze: np.ndarray, view: raster.View = raster.CLOSE) -> list[Picture]:
        """Pictures of units [T,52], pose [T,3], translation [T,2], gaze [T,2]."""
        body = self._person(identity)
        units = np.clip(np.array(units, np.float32), 0, 1)
        gaze = np.asarray(gaze, np.float32)
        # Lids ride on the eyeball: a downward look without it shows white above the iris.
        for side in ("Left", "Right"):
            for unit, sign in (("eyeLookDown", -1.0), ("eyeLookUp", 1.0)):
                k = ARKIT_UNITS.index(unit + side)
                units[:, k] = np.maximum(units[:, k], np.clip(sign * gaze[:, 1] / 30.0, 0, 1))
        pictures = []
        for start in range(0, len(units), 64):  # bounded memory: 64 frames are about 5 MB
            part = slice(start, start + 64)
            moved = (units[part] @ body.units).reshape(-1, *body.points.shape)
            for i, offset in enumerate(moved):
                offset += body.points
                k = start + i
                pictures.append(self._frame(body, identity, offset, np.asarray(pose[k]),
                                            np.asarray(translation[k]), gaze[k], view))  # fmt: skip
        return pictures

    def _frame(self, body: _Body, identity: Identity, points: np.ndarray, pose: np.ndarray,
               translation: np.ndarray, gaze: np.ndarray, view: raster.View) -> Picture:
        marks = self.marks
        turn = rotation(float(gaze[0]), float(gaze[1]), 0.0).T
        for where, centre in zip(marks.eyeballs, body.eyes, strict=True):
            points[where] = (points[where] - centre) @ turn + centre
        gap = points[marks.upper_lip, 1].min() - points[marks.lower_lip, 1].max()
        left, right = (points[c] for c in marks.corners)
        lids = [max(0.0, float(points[u, 1] - points[low, 1])) for u, low in marks.lids]
        normal = raster.normals(points, self.mesh)
        spin = rotation(*(float(x) for x in pose)).T
        centred = points - _PIVOT
        points = points + marks.head_weight * (centred @ spin - centred)
        turned = normal + marks.head_weight * (normal @ spin - normal)
        hanging = identity.style in ("long", "bob")
        big = self.raster.draw(points, turned, translation, hanging, view)
        s, n = self.supersample, self.size
        # Box filter in linear light would be truer; the shader's output is already gamma coded
        # and the difference at 2x is below one grey level except on hard rims.
        rgb = np.zeros((n, n, 3), np.uint16)
        for row in range(s):  # strided adds: numpy's mean over two axes is ten times slower
            for column in range(s):
                rgb += big[row::s, column::s]
        rgb = (rgb + s * s // 2) // (s * s)
        flat = raster.project(points[marks.lips], translation, n, view)
        pad = 0.02 * n
        mouth = (*(flat.min(0) - pad), *(flat.max(0) + pad))
        eyes = []
        for where in marks.eyeballs:
            flat = raster.project(points[where], translation, n, view)
            eyes.append(tuple(float(v) for v in (*flat.min(0), *flat.max(0))))
        return Picture(
            rgb=rgb.astype(np.uint8),
            mouth_box=tuple(float(v) for v in mouth), eye_boxes=tuple(eyes),
            aperture=max(0.0, float(gap)) / body.iod,
            width=float(np.linalg.norm(left - right)) / body.iod,
            lid=float(np.mean(lids)) / body.iod,
            points=raster.project(points[marks.tracked], translation, n, view).astype(np.float32),
        )  # fmt: skip
