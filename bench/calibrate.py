"""Which vertex of the rendered head lies where the tracker sees a landmark: prints the table of liveavatar/training/synth/tracked.py.

    python bench/calibrate.py

People and faces they make in front of the camera; per landmark the skin vertex that is nearest on the mean over all of them.
An open mouth is among the faces: on shut lips the upper and the lower one are in the same place.
"""

from __future__ import annotations

import numpy as np

from liveavatar.conditioning.face import EYE_LEFT, EYE_RIGHT, FaceTracker
from liveavatar.conditioning.visemes import ARKIT_UNITS
from liveavatar.evaluation.landmarks import LIPS, STABLE
from liveavatar.training.synth import raster
from liveavatar.training.synth.head import HeadRenderer
from liveavatar.training.synth.people import Identity

SIZE, PEOPLE = 512, range(24)
FACES = ({}, {"jawOpen": 0.25}, {"jawOpen": 0.5}, {"mouthPucker": 0.6}, {"mouthSmileLeft": 0.6, "mouthSmileRight": 0.6})
INNER_MOUTH = 0.5  # of the mask: what lies behind the lips is never what the tracker sees


def main() -> None:
    renderer, landmarks = HeadRenderer(SIZE, 1), (*LIPS, *STABLE)
    mesh = renderer.mesh
    candidates = np.flatnonzero((mesh.part == raster.SKIN) & (mesh.layer == 0) & (mesh.rest[:, 2] > 0.6) & (mesh.inside < INNER_MOUTH))
    renderer.marks.tracked, apart = candidates, []
    for person in PEOPLE:
        for face in FACES:
            units = np.array([face.get(name, 0.0) for name in ARKIT_UNITS], np.float32)
            picture = renderer.render(Identity.sample(person), units)
            (found,) = FaceTracker().follow(picture.rgb)
            unit = np.linalg.norm(found.landmarks[EYE_RIGHT, :2] - found.landmarks[EYE_LEFT, :2])
            apart.append(np.linalg.norm(found.landmarks[list(landmarks), None, :2] - picture.points, axis=-1) / unit)
    mean = np.mean(apart, axis=0)
    for landmark, row in zip(landmarks, mean, strict=True):
        print(f"{landmark}: {mesh.source[candidates[row.argmin()]]},  # {row.min():.3f} eye distances away")


if __name__ == "__main__":
    main()
