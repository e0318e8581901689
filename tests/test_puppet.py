"""A viewer's microphone as what the avatar says: phrases, and the drift of its clock (CLK-5)."""

import asyncio

import numpy as np
import pytest

from api_server import running, settings, tone
from liveavatar.serving.puppet import Puppet

RATE, PIECE = 16_000, 320  # 20 ms


def pieces(*spans: tuple[float, int]) -> list[np.ndarray]:
    """(seconds, loudness) -> a stream in pieces of 20 ms; no two samples of the whole are alike where it is loud."""
    rng = np.random.default_rng(0)
    sound = np.concatenate([rng.integers(-level - 1, level + 1, round(seconds * RATE), np.int16) for seconds, level in spans])
    return [sound[at : at + PIECE] for at in range(0, len(sound), PIECE)]


def said(stream, puppet=None) -> list[np.ndarray]:
    """The phrases of a stream that is heard at once."""
    puppet, phrases, now = puppet or Puppet(), [], []
    for pcm in stream:
        piece, over = puppet.hear(pcm, RATE, None)
        now.append(piece)
        if over:
            phrases.append(np.concatenate(now))
            now = []
    return phrases


def test_phrases_begin_with_sound_and_end_with_silence():
    stream = pieces((1.0, 3), (0.5, 8000), (0.4, 3), (0.5, 8000), (1.0, 3), (0.02, 8000), (1.0, 3), (0.3, 8000), (2.0, 3))
    first, second = said(stream)  # a breath is no end, a click no beginning
    assert len(first) / RATE == pytest.approx(0.2 + 1.4 + 0.6, abs=0.021) and len(second) / RATE == pytest.approx(0.2 + 0.3 + 0.6, abs=0.021)
    whole = np.concatenate(stream)
    assert np.array_equal(first, whole[round(0.8 * RATE) :][: len(first)]), "every sample between, none twice"


def test_a_microphone_that_is_switched_off_ends_its_phrase_once():
    puppet, nothing = Puppet(), np.zeros(0, np.int16)
    assert not said([*pieces((0.5, 8000)), *pieces((0.2, 3))], puppet)
    assert [puppet.hear(nothing, RATE, None)[1] for _ in range(2)] == [True, False]


def test_the_noise_of_a_room_is_no_speech_for_long():
    puppet = Puppet()
    said(pieces((20.0, 150)), puppet)  # -51 dB
    assert not said(pieces((5.0, 200)), puppet) and len(said(pieces((0.5, 6000), (1.0, 200)), puppet)) == 1


def spoken_for(minutes: float, drift: float) -> tuple[float, float, np.ndarray, np.ndarray]:
    """A talk without a pause of 0.6 s by a clock that is `drift` too fast: the way to the viewer at 10 s and at the end, what went in and out.

    The avatar hears 0.9 s after the first sound, then as its own clock says; what it has not got it waits for, 40 ms at a time.
    """
    stream = pieces(*[(1.7, 8000), (0.3, 3)] * round(minutes * 30))
    puppet, out, pushed, heard, start, late = Puppet(), [], 0.0, 0.0, 0.9, []
    for n, pcm in enumerate(stream):
        now = n * PIECE / RATE / (1 + drift)
        while now - start > heard + 0.04:
            heard, start = (heard + 0.04, start) if pushed >= heard + 0.04 else (heard, start + 0.04)
        piece, over = puppet.hear(pcm, RATE, pushed - heard if heard else None)
        assert not over
        out.append(piece)
        pushed += len(piece) / RATE
        late.append(pushed - heard)
    smooth = np.convolve(late, np.full(100, 0.01), "valid")
    return smooth[500], smooth[-1], np.concatenate(stream), np.concatenate(out)


@pytest.mark.parametrize("drift", [0.002, -0.002, 0.0])
def test_a_clock_that_runs_away_is_caught_in_the_pauses(drift):
    """CLK-5: without it two minutes at 2,000 ppm are 240 ms; not a sample of speech is touched."""
    first, last, given, got = spoken_for(2.0, drift)
    assert abs(last - first) < 0.06
    assert np.array_equal(given[np.abs(given) > 4], got[np.abs(got) > 4])
    assert (len(got) - len(given)) / RATE == pytest.approx(-120 * drift, abs=0.061)


def test_a_viewer_who_stops_speaking_lets_the_session_be_silent(tmp_path):
    """API-2: a microphone that was used once does not make the session speak for ever; each phrase is a segment."""

    async def go():
        async with running(settings(tmp_path)) as server:
            session = server.at.session(await server.opened())
            heard = server.at.microphone(session)
            for phrase in range(2):
                stream = np.concatenate([tone(0.3), np.zeros(round((0.8, 0.1)[phrase] * RATE), np.int16)])
                for at in range(0, len(stream), PIECE):
                    await heard(stream[at : at + PIECE], RATE)
            await heard(stream[:0], RATE)  # switched off
            async with asyncio.timeout(15):
                while [e.name for e in session.happenings].count("speak.finished") < 2 or session.state != "idle":
                    await asyncio.sleep(0.02)
            return session.speech.total / RATE

    assert asyncio.run(go()) == pytest.approx(0.3 + 0.6 + 0.3 + 0.1, abs=0.25)
