"""Portraits: safe reading, the size rule of the reference, fitting without bars; prompts cleaned."""

import io
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from liveavatar.conditioning.identity import FORMATS, fit_picture, load_picture, output_size
from liveavatar.conditioning.prompt import clean
from liveavatar.core import InputError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "size_rule.json").read_text())


def portrait(width=80, height=100) -> Image.Image:
    """Left half red, right half blue, a green stripe on top."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 200
    pixels[:, width // 2 :, 2] = 200
    pixels[:10] = (0, 150, 0)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- reading


def test_picture_is_rgb_channels_first(tmp_path):
    path = tmp_path / "me.png"
    portrait().save(path)
    for source in (path, str(path), path.read_bytes()):
        picture = load_picture(source)
        assert picture.dtype == torch.uint8 and picture.shape == (3, 100, 80)
        assert picture[:, 50, 5].tolist() == [200, 0, 0] and picture[:, 2, 2].tolist() == [0, 150, 0]


def test_exif_orientation_is_applied():
    image = portrait()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    picture = load_picture(encoded(image, "JPEG", exif=exif, quality=95))
    assert picture.shape == (3, 80, 100)
    assert picture[1, 40, 95] > 120 and picture[1, 40, 5] < 40  # the green stripe is on the right


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_over_mid_grey(mode):
    image = Image.new("RGBA", (70, 70), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 35, 70))
    if mode != "RGBA":
        image = image.convert(mode)
    picture = load_picture(encoded(image, "TIFF" if mode == "PA" else "PNG"))
    assert picture[:, 10, 60].tolist() == [128, 128, 128] and picture[:, 10, 10].tolist() == [255, 255, 255]


def test_transparent_palette_colour_lies_over_mid_grey():
    image = Image.new("P", (70, 70), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 35, 70))
    picture = load_picture(encoded(image, "PNG", transparency=0))
    assert picture[:, 10, 60].tolist() == [128, 128, 128] and picture[:, 10, 10].tolist() == [200, 100, 50]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(format):
    second = Image.new("RGB", (80, 100), (255, 255, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    picture = load_picture(encoded(portrait(), format, save_all=True, append_images=[second], **options))
    assert picture[0, 50, 5] > 180 and picture[2, 50, 5] < 40


def test_sixteen_bits_and_cmyk_and_grey_keep_their_brightness():
    deep = np.tile(np.linspace(0, 65535, 80).astype(np.uint16), (80, 1))
    picture = load_picture(encoded(Image.fromarray(deep)))
    assert abs(int(picture[0, 0, 40]) - int(deep[0, 40]) // 257) <= 1 and picture[0, 0, 79] == 255
    assert load_picture(encoded(Image.new("L", (64, 64), 77)))[:, 0, 0].tolist() == [77, 77, 77]
    assert load_picture(encoded(portrait().convert("CMYK"), "TIFF"))[0, 50, 5] > 180


# ---------------------------------------------------------------- refusing


def bomb_header() -> bytes:
    """A valid PNG header of 60000 x 60000 pixels with nearly no data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "empty"),
        (b"hello, I am no picture" * 10, "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not a picture"),
        (bomb_header(), "(exceeds limit|million pixels)"),
        (encoded(Image.new("RGB", (63, 400))), "63x400 is no face-sized image"),
        (encoded(portrait())[:150], "damaged"),
        (encoded(Image.new("F", (80, 80), 0.5), "TIFF"), "floating-point"),
        (encoded(Image.new("1", (9000, 8000))), "9000x8000 is more than 64 million pixels"),
    ],
    ids=["empty", "text", "postscript", "bomb", "small", "truncated", "float", "large"],
)
def test_what_is_no_usable_portrait_is_refused_in_one_line(tmp_path, data, message):
    path = tmp_path / "me.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_picture(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="nobody.png: no such file"):
        load_picture(tmp_path / "nobody.png")
    with pytest.raises(InputError, match="not a file"):
        load_picture(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_bytes_never_raise_anything_but_input_error(format):
    rng = random.Random(format)
    whole = encoded(portrait(), format)
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 30)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randint(1, len(data))]
        try:
            assert load_picture(bytes(data)).shape[0] == 3
        except InputError as error:
            assert "\n" not in str(error)


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("pair", GOLDEN["pairs"], ids=lambda p: f"{p[0]}x{p[1]}-{p[2]}")
def test_output_size_of_the_reference(pair):
    height, width, cap, *expected = pair
    assert list(output_size(height, width, cap)) == expected


def test_no_size_is_an_error():
    with pytest.raises(InputError, match="no output size within 2000 pixels"):
        output_size(100, 100, 2000)


# ---------------------------------------------------------------- fitting


def test_fitting_covers_and_crops_the_middle():
    picture = torch.full((3, 720, 1280), 200, dtype=torch.uint8)
    picture[:, :, :20] = picture[:, :, -20:] = 0
    for height, width in ((384, 704), (704, 384), (512, 512), (900, 1600)):
        fitted = fit_picture(picture, height, width)
        assert fitted.shape == (3, height, width) and fitted.dtype == torch.uint8
        assert fitted[:, :, width // 2].float().mean() == 200  # no bars anywhere near
    assert fit_picture(picture, 704, 384).min() == 200  # the dark sides are cropped away
    assert fit_picture(picture, 360, 640)[0, :, :9].max() < 20  # and kept when the shape is the same


def test_fitting_is_antialiased_and_exact_at_its_own_size():
    stripes = torch.zeros(3, 256, 256, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert (fit_picture(stripes, 64, 64)[:, :, 4:-4].float() - 127.5).abs().max() < 10
    assert torch.equal(fit_picture(stripes, 256, 256), stripes)


def test_centre_stays_in_the_centre():
    picture = torch.zeros(3, 401, 301, dtype=torch.uint8)
    picture[:, 195:206, 145:156] = 255
    light = fit_picture(picture, 128, 192)[0].float()
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(192.0), indexing="ij")
    assert abs((light * rows).sum() / light.sum() - 63.5) < 0.2 and abs((light * columns).sum() / light.sum() - 95.5) < 0.2


# ---------------------------------------------------------------- prompt


def test_prompt_is_cleaned():
    assert clean("  a\tman &amp;amp; a\n\nwoman ") == "a man & a woman"
    assert clean("&amp;lt;b&amp;gt;") == "<b>"
    assert clean("voilÃ  un cafÃ©") == "voilà un café"
    assert clean("") == "" and clean(" \n ") == ""


def test_prompt_that_is_no_text_is_refused():
    with pytest.raises(InputError, match="character 3 is not valid Unicode"):
        clean("abc\udcff")
