"""Portraits are cut so that the face lies as the checkpoint names it: wherever a portrait enters, and never where it lies so already."""

import asyncio
import importlib.util
import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY_SIZE, save_tiny
from PIL import Image

from liveavatar import generate as main_job
from liveavatar.conditioning import framing
from liveavatar.conditioning.face import CHIN, EYE_CORNERS, Face, FaceTracker
from liveavatar.conditioning.framing import Framing, cut, face_box, fit_portrait
from liveavatar.conditioning.identity import fit_picture, load_picture
from liveavatar.config import load
from liveavatar.core import ConfigError, InputError, Open, SetReference, WeightsError
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.sources import open_source

SECTION = {"eyes": [0.5, 0.445], "chin": 0.415}  # of the embedded checkpoint
KNOWN = Framing(eyes=(0.5, 0.445), chin=0.415)
OWN = [main_job.PORTRAIT, *sorted((main_job.ASSETS / "portraits").iterdir())]
MISSING = [name for name in ("ai_edge_litert", "cv2", "mediapipe") if importlib.util.find_spec(name) is None]
tracked = pytest.mark.skipif(bool(MISSING), reason=f"finding faces needs {', '.join(MISSING)} (make face)")


def pasted(portrait, height: int, width: int, side: int, left: int, top: int) -> torch.Tensor:
    """uint8 [3, height, width]: a portrait, side x side, in a picture that is grey otherwise."""
    picture = torch.full((3, height, width), 120, dtype=torch.uint8)
    picture[:, top : top + side, left : left + side] = fit_picture(load_picture(portrait), side, side)
    return picture


def lies(picture: torch.Tensor) -> tuple[float, float, float]:
    """Where the face is: x and y of the eyes and the way to the chin, shares of the picture."""
    (face, *_), (_, height, width) = FaceTracker().find(picture.permute(1, 2, 0).contiguous().numpy()), picture.shape
    return face.eyes[0] / width, face.eyes[1] / height, math.dist(face.eyes, face.landmarks[CHIN, :2]) / height


def face_at(x: float, y: float, chin: float) -> Face:
    """A face whose eyes are at x, y and whose chin is so many pixels below."""
    landmarks = np.zeros((468, 3), np.float32)
    landmarks[list(EYE_CORNERS)] = [(x + dx, y, 0) for dx in (-30, -10, 10, 30)]
    landmarks[CHIN] = x, y + chin, 0
    return Face((x - chin, y - chin, x + chin, y + chin), 1.0, landmarks)


def sees(monkeypatch, *faces: Face) -> list:
    """The tracker finds these; returns the list of pictures it was shown."""
    shown = []

    class Seeing:
        def find(self, picture):
            shown.append(picture)
            return list(faces)

    monkeypatch.setattr(framing, "FaceTracker", Seeing)
    return shown


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- with the tracker


@tracked
@pytest.mark.parametrize("side, left, top", [(300, 40, 150), (160, 700, 60), (90, 300, 250)], ids=["shoulders", "wide", "tiny"])
def test_a_small_face_in_a_wide_picture_lies_as_it_should_afterwards(side, left, top, caplog):
    made = fit_portrait(pasted(OWN[3], 480, 900, side, left, top), 128, 128, KNOWN)
    assert lies(made.pixels) == pytest.approx((0.5, 0.445, 0.415), abs=0.015)
    assert made.box == pytest.approx((left, top, left + side, top + side), abs=0.03 * side)  # it was framed so before it was pasted
    assert len(caplog.messages) == 1 and "cut to the face" in caplog.text and ("times enlarged" in caplog.text) is (side < 120)


@tracked
@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_what_is_framed_right_passes_bit_for_bit(path, caplog):
    picture = load_picture(path)
    for given in (picture, fit_picture(picture, 128, 128)):
        made = fit_portrait(given, 128, 128, KNOWN)
        assert made.box is None and torch.equal(made.pixels, fit_picture(given, 128, 128))
    assert not caplog.messages


@tracked
def test_what_was_cut_is_framed_right():
    made = fit_portrait(pasted(OWN[4], 480, 900, 200, 500, 200), 128, 128, KNOWN)
    again = fit_portrait(made.pixels, 128, 128, KNOWN)
    assert again.box is None and torch.equal(again.pixels, made.pixels)


@tracked
def test_without_a_face_it_is_as_before_and_that_is_said(caplog):
    picture = noise(300, 400)
    made = fit_portrait(picture, 128, 128, KNOWN)
    assert made.box is None and torch.equal(made.pixels, fit_picture(picture, 128, 128))
    assert caplog.messages == ["no face found in the portrait of 400x300: it is used as it is"]


@tracked
def test_of_several_faces_the_largest_is_taken(caplog):
    picture = pasted(OWN[1], 480, 900, 240, 80, 100)
    picture[:, 60:380, 500:820] = fit_picture(load_picture(OWN[3]), 320, 320)
    box = fit_portrait(picture, 128, 128, KNOWN).box
    assert box == pytest.approx((500, 60, 820, 380), abs=12) and "the largest of 2 faces" in caplog.text


@tracked
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_every_kind(mode):
    """Grey, transparent around the head, with a palette: read as always, then cut."""
    image = Image.fromarray(pasted(OWN[3], 400, 600, 200, 350, 100).permute(1, 2, 0).numpy()).convert(mode)
    if mode == "RGBA":
        alpha = np.zeros((400, 600), np.uint8)
        alpha[100:300, 350:550] = 255
        image.putalpha(Image.fromarray(alpha))
    image.save(file := io.BytesIO(), "PNG")
    made = fit_portrait(load_picture(file.getvalue()), 128, 128, KNOWN)
    assert lies(made.pixels) == pytest.approx((0.5, 0.445, 0.415), abs=0.02)


@tracked
def test_a_tilted_head_stays_tilted():
    tilted = Image.open(OWN[3]).convert("RGB").resize((256, 256)).rotate(-20, fillcolor=(88, 60, 140))
    picture = torch.full((3, 400, 700), 120, dtype=torch.uint8)
    picture[:, 100:356, 300:556] = torch.from_numpy(np.array(tilted)).permute(2, 0, 1)
    made = fit_portrait(picture, 128, 128, KNOWN).pixels
    (face,) = FaceTracker().find(made.permute(1, 2, 0).contiguous().numpy())
    dx, dy = face.landmarks[263, :2] - face.landmarks[33, :2]
    assert math.degrees(math.atan2(dy, dx)) == pytest.approx(20, abs=4)
    assert lies(made) == pytest.approx((0.5, 0.445, 0.415), abs=0.02)


# ---------------------------------------------------------------- without


def test_boxes_have_the_proportions_of_the_video():
    left, top, right, bottom = face_box(face_at(400, 300, 83), 256, 128, KNOWN)
    assert (bottom - top, right - left) == pytest.approx((200, 100))
    assert (400 - left) / 100 == pytest.approx(0.5) and (300 - top) / 200 == pytest.approx(0.445)


def test_near_the_border_it_gives_way_as_far_as_nobody_sees_and_then_is_filled(monkeypatch, caplog):
    sees(monkeypatch, face_at(300, 80, 83))  # wants 200 x 200 from 200, -9
    assert fit_portrait(noise(400, 600), 128, 128, KNOWN).box == pytest.approx((200, 0, 400, 200))  # .045 of it: within the tolerance
    assert "beyond the border" not in caplog.text
    sees(monkeypatch, face_at(40, 200, 83))  # from -60: 12 are let go, 48 filled in
    picture = noise(400, 600)
    made = fit_portrait(picture, 200, 200, KNOWN)
    assert made.box == pytest.approx((-48, 111, 152, 311)) and "24% of it beyond the border" in caplog.text
    assert torch.equal(made.pixels[:, :, :40], made.pixels[:, :, :1].expand(-1, -1, 40))  # the border's own colours
    assert torch.equal(made.pixels[:, :, 48:], picture[:, 111:311, :152])


def test_a_face_that_fills_its_picture_stands_in_the_middle_of_more(monkeypatch):
    sees(monkeypatch, face_at(100, 80, 120))
    left, top, right, bottom = fit_portrait(noise(200, 200), 128, 128, KNOWN).box
    assert right - left == pytest.approx(289, abs=1) and left < 0 and right > 200 and top < 0 and bottom > 200


def test_a_huge_picture_is_averaged_down():
    picture = torch.zeros(3, 3000, 3000, dtype=torch.uint8)
    picture[:, ::2] = 200  # lines that must become grey, not a pattern
    made = cut(picture, (-500, 100, 2500, 3100), 100, 100).float()
    assert made.shape == (3, 100, 100) and (made[:, 2:90] - 100).abs().max() < 3


@pytest.mark.parametrize("size, x, y, asked", [(0.415, 0.5, 0.445, False), (0.45, 0.55, 0.40, False), (0.46, 0.5, 0.445, True),
                                                (0.37, 0.5, 0.445, True), (0.415, 0.57, 0.445, True), (0.415, 0.5, 0.37, True)])  # fmt: skip
def test_only_what_is_outside_the_tolerances_is_cut(monkeypatch, size, x, y, asked):
    sees(monkeypatch, face_at(200 * x + 100, 200 * y, 200 * size))
    assert (fit_portrait(noise(200, 400), 64, 64, KNOWN).box is not None) is asked  # the middle of it is what would be shown


def test_without_the_package_it_is_as_before_and_that_is_said_once(monkeypatch, caplog):
    def refuses():
        raise InputError("tracking faces needs ai-edge-litert, which is not installed: make face")

    monkeypatch.setattr(framing, "FaceTracker", refuses)
    framing._say_once.cache_clear()
    for path in OWN:  # the package's own need no looking at
        fit_portrait(load_picture(path), 128, 128, KNOWN)
    assert not caplog.messages
    for seed in (1, 2):
        picture = noise(200, 300, seed)
        made = fit_portrait(picture, 128, 128, KNOWN)
        assert made.box is None and torch.equal(made.pixels, fit_picture(picture, 128, 128))
    assert len(caplog.messages) == 1 and "used as they are" in caplog.text and "make face" in caplog.text


# ---------------------------------------------------------------- what a checkpoint and a person say


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    """A tiny checkpoint that names a framing; read only."""
    return save_tiny(tmp_path_factory.mktemp("framed"), framing=SECTION)


def config(folder, *more: str):
    return load(None, [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "runtime.threads=1", *more])


def test_a_checkpoint_names_its_framing_or_none(framed, tiny_folder):
    assert open_source(config(framed)).framing == KNOWN
    assert open_source(config(framed, "video.face_crop=none")).framing is None
    assert open_source(config(tiny_folder)).framing is None
    assert open_source(load(None, [])).framing == KNOWN  # the embedded one


@pytest.mark.parametrize("wrong, words", [
    ({"eyes": [0.5, 0.4]}, "missing key 'framing.chin'"), ({**SECTION, "nose": 1.0}, "unknown key 'framing.nose'"),
    ({**SECTION, "chin": 1.2}, "framing.chin=1.2"), ({**SECTION, "chin": "half"}, "framing.chin must be float"),
    ({**SECTION, "eyes": [0.5]}, "framing.eyes"), ({**SECTION, "eyes": [0.5, 60]}, "framing.eyes"),
])  # fmt: skip
def test_a_framing_is_checked_strictly(tmp_path, wrong, words):
    folder = save_tiny(tmp_path / "wrong", framing=wrong)
    with pytest.raises(WeightsError, match=words) as caught:
        open_source(config(folder))
    assert str(folder) in str(caught.value)


def test_the_setting_is_checked_strictly(tmp_path):
    with pytest.raises(ConfigError, match="video.face_crop='aut'.*did you mean 'auto'"):
        load(None, ["video.face_crop=aut"])


# ---------------------------------------------------------------- wherever a portrait enters


def test_the_engine_cuts_what_opens_a_session_and_what_replaces_it(framed, monkeypatch):
    shown = sees(monkeypatch, face_at(100, 90, 83))
    sent, first, second = [], noise(400, 600, 1), noise(400, 600, 2)

    async def scenario():
        engine = await Engine.start(config(framed))
        try:
            send = engine.chain.send
            monkeypatch.setattr(engine.chain, "send", lambda message: (sent.append(message), send(message)))
            session = await engine.open(first, name="a")
            await session.set_reference(second)
            await session.set_reference(first)  # seen before
            fitted = await engine.fitted(second)
            assert await engine.fitted(fitted) is fitted  # as the server hands it on
        finally:
            await engine.aclose()

    asyncio.run(scenario())
    pictures = [m.picture for m in sent if isinstance(m, (Open, SetReference))]
    box = face_box(face_at(100, 90, 83), TINY_SIZE, TINY_SIZE, KNOWN)
    for picture, given in zip(pictures, (first, second, first), strict=True):
        assert torch.equal(picture, cut(given, box, TINY_SIZE, TINY_SIZE))
    assert len(shown) == 2  # each portrait is looked at once


def test_generate_cuts_the_portrait_and_its_trace_says_where(framed, monkeypatch, tmp_path, caplog):
    sees(monkeypatch, face_at(100, 90, 83))
    Image.fromarray(noise(400, 600).permute(1, 2, 0).numpy()).save(tmp_path / "me.png")
    made = {}
    for crop in ("auto", "none"):
        trace, out = tmp_path / f"{crop}.jsonl", tmp_path / f"{crop}.mp4"
        main_job.generate(config(framed, f"runtime.trace={trace}", f"video.face_crop={crop}"),
                          main_job.Job(image=tmp_path / "me.png", out=out, length=0.48))  # fmt: skip
        made[crop] = [line["box"] for line in map(json.loads, trace.read_text().splitlines()) if line["event"] == "portrait"]
    assert made == {"auto": [[0, 1, 200, 201]], "none": []}
    assert sum("cut to the face" in line for line in caplog.messages) == 1
    assert (tmp_path / "auto.mp4").read_bytes() != (tmp_path / "none.mp4").read_bytes()
