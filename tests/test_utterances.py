"""What was pushed, what waits, what was heard, which segment it was (ENG-2, ENG-5, ENG-6, BRG-1)."""

import numpy as np
import pytest
from conftest import speech
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar.serving.packets import Mark
from liveavatar.serving.problems import BufferFull
from liveavatar.serving.utterances import Speech, Track

RATE = 16_000


def play(s: Speech, start: int, stop: int, step: int = 640) -> list[Mark]:
    """Hear [start, stop) a tick at a time."""
    return [mark for at in range(start, stop, step) for mark in s.hear(at, min(stop, at + step))]


def test_segments_begin_and_end_with_their_very_samples():
    s = Speech(60)
    s.push(speech(1.0), RATE, end=True)
    s.push(speech(0.5), RATE, segment=7)
    s.push(speech(0.5), RATE, segment=7, end=True)
    s.push(np.zeros(0, np.float32), RATE, segment=9, end=True)
    assert play(s, 0, 16_000 - 640) == [Mark("started", 0)]
    assert play(s, 16_000 - 640, 16_000) == [Mark("finished", 0, 1000)]
    assert play(s, 16_000, 31_999) == [Mark("started", 7)]
    assert s.position_ms == 999
    assert s.hear(31_999, 32_000) == (Mark("finished", 7, 1000), Mark("finished", 9, 0))
    assert s.waiting == 0 and not s.segments


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_viewers_hear_the_sound_that_was_pushed_and_not_what_the_model_hears(rate):
    t = np.arange(rate) / rate
    pushed = (0.4 * np.sin(2 * np.pi * 300 * t)).astype(np.float32)
    s = Speech(60)
    for piece in np.array_split(pushed, 7):
        s.push(piece, rate)
    s.end()
    assert s.total == RATE and s.sound(0, s.total).shape == (48_000,)
    heard, wanted = s.sound(0, s.total)[2000:-2000] / 32767, 0.4 * np.sin(2 * np.pi * 300 * np.arange(48_000) / 48_000)[2000:-2000]
    assert np.abs(heard - wanted).max() < 0.02
    low = s.take(s.total)
    assert len(low) == RATE and np.abs(low[700:-700] - wanted[np.arange(700, RATE - 700) * 3 - 2000 + 0][: len(low) - 1400]).max() < 0.02


def test_too_much_is_refused_whole_and_there_is_room_again_when_some_was_heard():
    s = Speech(2.0)
    s.push(speech(1.5), RATE)
    with pytest.raises(BufferFull, match="1.5 s of speech wait, 2 s is the limit"):
        s.push(speech(1.0), RATE)
    assert s.total == 24_000
    play(s, 0, 16_000)
    s.push(speech(1.0), RATE)
    assert s.total == 40_000


def test_an_interruption_forgets_what_was_not_heard_and_says_how_far_it_came():
    s = Speech(60)
    s.push(speech(2.0), RATE, segment=3)
    s.take(20_000)
    play(s, 0, 6400)
    assert s.interrupt() == [Mark("finished", 3, 400, interrupted=True)] and s.waiting == 0
    s.push(speech(1.0, seed=5), RATE, segment=4, end=True)
    assert np.array_equal(s.take(99_999), speech(1.0, seed=5))
    assert s.hear(20_000, 20_640) == (Mark("started", 4),)


def test_speech_given_to_an_engine_that_died_can_be_given_again():
    s = Speech(60)
    s.push(speech(2.0), RATE, end=True)
    s.take(32_000)
    play(s, 0, 9600)
    s.rewind(9600)
    assert not s.settled and np.array_equal(s.take(99_999), speech(2.0)[9600:]) and s.settled


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "forget", "cut"]), st.integers(0, 500)), max_size=30))
def test_a_track_is_an_array_that_forgets(script):
    track, plain, base = Track(), np.zeros(0, np.float32), 0
    for act, n in script:
        if act == "append":
            fresh = np.arange(len(plain), len(plain) + n, dtype=np.float32)
            plain = np.concatenate([plain, fresh])
            track.append(fresh)
        elif act == "forget":
            base = max(base, min(n, len(plain)))
            track.forget(n)
        else:
            position = min(len(plain), max(base, n))
            plain = plain[:position]
            track.cut(position)
        assert track.total == len(plain) and track.base <= base or act == "cut"
        assert np.array_equal(track.read(base, len(plain)), plain[base:])
