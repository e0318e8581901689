"""The face tracker on rendered heads whose lips, lids and pose are known."""

import importlib.util

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="the face tracker's runtime")
pytest.importorskip("cv2", reason="the face tracker's pictures")

from liveavatar.conditioning import face
from liveavatar.conditioning.face import FaceTracker
from liveavatar.core import InputError
from liveavatar.evaluation import series
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.landmarks import GAP_FLOOR, LID_FLOOR, WIDTH_FLOOR, Track
from liveavatar.evaluation.suite import read_truth

pytestmark = pytest.mark.timeout(900)  # the first test may have to wait for renders


@pytest.fixture(scope="module")
def seen(rendered_suite):
    """(frames, Track, Truth) of the first item."""
    item = rendered_suite.manifest.items[0]
    rows = list(VideoFile(rendered_suite.path(item, "gt_video")).frames())
    frames = np.stack([frame for _, frame in rows])
    return frames, Track.of([at for at, _ in rows], FaceTracker().track(frames)), read_truth(rendered_suite.path(item, "gt_motion"))


def test_one_face_in_every_small_picture(seen):
    frames, track, _ = seen
    assert frames.shape[1:] == (128, 128, 3) and (track.faces == 1).all()
    assert track.points.shape == (150, 468, 3) and track.points.dtype == np.float32
    assert 30 < np.median(track.eye_distance) < 60


def test_lips_lids_and_head_follow_the_render(seen):
    _, track, truth = seen
    least = {"gap": 0.93, "width": 0.75, "blink": 0.8, "yaw": 0.95, "pitch": 0.9}
    for name, floor in least.items():
        commanded = truth.at(name, track.times)
        r = series.correlation(series.moments(commanded, track.channel(name), np.zeros(len(commanded), int), 1)[0])
        assert r > floor, f"{name}: r {r:.3f}"


def test_noise_floor_is_what_is_printed(seen):
    """A still face with camera noise of 3 levels: the constants in landmarks.py are not below what the tracker does."""
    frame = seen[0][0].astype(float)
    rng = np.random.default_rng(0)
    noisy = [np.clip(frame + rng.normal(0, 3, frame.shape), 0, 255).astype(np.uint8) for _ in range(30)]
    track = Track.of(np.arange(30) / 25, FaceTracker().track(noisy))
    assert track.gap.std() < GAP_FLOOR and track.width.std() < 1.2 * WIDTH_FLOOR and track.lids.std() < 1.5 * LID_FLOOR


def test_moved_picture_moves_the_face(seen):
    frame = seen[0][0]
    canvas = np.full((240, 320, 3), 128, np.uint8)
    canvas[60:188, 150:278] = frame
    here, there = FaceTracker().follow(frame)[0], FaceTracker().follow(canvas)[0]
    assert np.abs(there.landmarks[:, :2] - here.landmarks[:, :2] - [150, 60]).mean() < 1.0


def test_several_faces_and_none(seen, rendered_suite):
    other = next(VideoFile(rendered_suite.path(rendered_suite.manifest.items[1], "gt_video")).frames())[1]
    pair = np.concatenate([seen[0][0], other], axis=1)
    found = FaceTracker().follow(pair)
    assert len(found) == 2 and found[0].eye_distance >= found[1].eye_distance
    assert {face.box[0] > 128 for face in found} == {True, False}
    tracker = FaceTracker()
    assert len(tracker.follow(pair)) == 2 and tracker.follow(np.full_like(pair, 90)) == []


def test_larger_picture_same_face(seen):
    import cv2

    large = cv2.resize(seen[0][0], (640, 640), interpolation=cv2.INTER_CUBIC)
    a, b = FaceTracker().follow(seen[0][0])[0], FaceTracker().follow(large)[0]
    assert abs(b.eye_distance / a.eye_distance / 5 - 1) < 0.04


def test_wrong_pictures_are_refused():
    with pytest.raises(InputError, match="uint8"):
        FaceTracker().follow(np.zeros((8, 8, 3), np.float32))


def test_missing_models_name_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"liveavatar\[face\]"):
        FaceTracker()


def test_other_models_are_refused(monkeypatch):
    monkeypatch.setitem(face.MODEL_SHA256, face.MESH, "0" * 64)
    with pytest.raises(InputError, match="not the model"):
        FaceTracker()
