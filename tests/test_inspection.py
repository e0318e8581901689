"""What is aired is looked at (19.3): a mark that is not there is told, a picture that stands still or is black shows, also behind the encoder."""

import numpy as np
import pytest
from test_watermark import clip

from liveavatar.serving.encoder import VideoEncoder
from liveavatar.serving.inspection import MARK_LOOKS, MARK_PICTURES, Eye, MarkCheck
from liveavatar.serving.packets import Packet, Tick
from liveavatar.serving.settings import MediaConfig
from liveavatar.serving.watermark import GROUP, Watermark

KEY, PAYLOAD, SILENCE = b"k" * 32, 0xC0FFEE, np.zeros(1920, np.int16)


def ticks(pictures) -> list[Tick]:
    return [Tick(n, 0, "idle", picture, SILENCE) for n, picture in enumerate(pictures)]


def groups(pictures, scale: int = 1) -> list[tuple[Packet, ...]]:
    """The pictures as they leave for viewers, from each keyframe up to the next."""
    encoder, found = VideoEncoder(128, 128, MediaConfig(scale=scale)), []
    for tick in ticks(pictures):
        for packet in encoder.encode(tick, 0.0, tick.index % GROUP == 0):
            found += [[]] if packet.keyframe else []
            found[-1].append(packet)
    return [tuple(group) for group in found]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return clip(128, 128, 2 * GROUP)


def test_the_mark_is_read_back_behind_the_encoder_and_told_when_it_is_not_there(pictures):
    failures = []
    eye = Eye(MarkCheck(KEY, 128, lambda: failures.append(1)), None)
    mark = Watermark(KEY, PAYLOAD, 128, 128).mark
    for group in groups(map(mark, pictures), scale=2):
        eye.look(group, PAYLOAD)
    assert eye.marked == 1 and not failures
    plain = groups(pictures)
    for _ in range(MARK_LOOKS - 1):  # until it is looked at again
        eye.look(plain[0], PAYLOAD)
    for _ in range(MARK_PICTURES // GROUP - 1):
        assert eye.marked == 1 and not failures  # a busy picture may need more of them
        eye.look(plain[1], PAYLOAD)
    assert eye.marked < 0.95 and len(failures) == 1


def test_another_payload_is_no_mark(pictures):
    failures = []
    eye, mark = Eye(MarkCheck(KEY, 128, lambda: failures.append(1)), None), Watermark(KEY, PAYLOAD, 128, 128).mark
    for tick in ticks([mark(picture) for picture in pictures] * 2):
        eye.look(tick, PAYLOAD ^ 0b11)
    assert eye.marked == 30 / 32 and len(failures) == 1


def test_a_picture_that_stands_still_or_is_black_shows(pictures):
    eye, (moving, still) = Eye(None, None), (groups(pictures), groups([pictures[0]] * 2 * GROUP))
    assert not eye.fresh(()) and not eye.fresh(None) and eye.fresh(moving[0])
    for group in moving:
        eye.look(group, 0)
    assert not eye.fresh(moving[-1]) and eye.change > 0.01 and 0.1 < eye.luma < 0.9 and eye.marked is None
    for group in still:
        eye.look(group, 0)
    assert eye.change < 0.001
    eye.look(ticks([np.zeros((128, 128, 3), np.uint8)])[0], 0)
    assert eye.luma == 0 and eye.change > 0.5
