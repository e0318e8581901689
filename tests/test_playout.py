"""The media clock and what each tick shows: pure, so hours pass in milliseconds (CLK-1, CLK-2, BP-3, BRG-1, ENG-4)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar.serving.packets import TICK_SAMPLES
from liveavatar.serving.playout import FADE_SAMPLES, HOLD_TICKS, LATE_SECONDS, Pacer, Playout, Slot, bounce

STILL = np.full((4, 4, 3), 7, np.uint8)


def slot(number: int, kind: str = "idle", epoch: int = 0, source: tuple[int, int] = (0, 0)) -> Slot:
    loud = 1000 + number if kind == "speech" else 0
    return Slot(epoch, kind, np.full((4, 4, 3), number % 256, np.uint8), np.full(TICK_SAMPLES, loud, np.int16), source, number // 12)


def said(first: int, count: int = 12, epoch: int = 0) -> list[Slot]:
    return [slot(n, "speech", epoch, (n * 640, n * 640 + 640)) for n in range(first, first + count)]


def test_eight_hours_with_jitter_do_not_drift_by_a_millisecond():
    rng, wall = np.random.default_rng(0), 100.0
    pacer = Pacer(wall)
    for n in range(8 * 3600 * 25):
        wall = max(wall, pacer.due) + rng.uniform(0, 0.004)
        assert pacer.tick(wall) < 0.005
    assert pacer.reanchors == 0 and abs(wall - 100.0 - n / 25) < 0.006


def test_a_stall_moves_the_clock_once_and_nothing_bursts():
    pacer = Pacer(0.0)
    for _ in range(10):
        pacer.tick(pacer.due)
    assert pacer.tick(pacer.due + 5.0) == pytest.approx(5.0)
    assert pacer.reanchors == 1 and pacer.due == pytest.approx(10 / 25 + 5.0 + 1 / 25)
    late = pacer.due + LATE_SECONDS / 2  # a short hitch is caught up with
    pacer.tick(late)
    assert pacer.reanchors == 1 and pacer.due < late


def test_before_anything_was_made_the_portrait_stands():
    playout = Playout(STILL)
    for _ in range(100):
        shown = playout.next()
        assert shown.kind == "filler" and np.array_equal(shown.picture, STILL) and not shown.sound.any()


def test_picture_and_sound_of_a_slot_never_part():
    playout = Playout(STILL)
    playout.push(said(0))
    for n in range(12):
        shown = playout.next()
        assert shown.picture[0, 0, 0] == n and (shown.sound == 1000 + n).all()
    assert playout.next().kind == "filler" and not playout.next().sound.any()


def test_without_blocks_the_last_picture_holds_then_a_loop_of_idle_ones_moves_and_comes_back_without_a_jump():
    playout = Playout(STILL)
    playout.push([slot(n) for n in range(40, 88)])
    shown = [int(playout.next().picture[0, 0, 0]) for _ in range(48 + HOLD_TICKS + 200)]
    assert shown[48 : 48 + HOLD_TICKS] == [87] * HOLD_TICKS
    loop = shown[48 + HOLD_TICKS :]
    assert min(loop) == 40 and max(loop) == 87 and max(abs(a - b) for a, b in zip(loop, loop[1:])) <= 2  # 2: blended and rounded
    playout.push([slot(n) for n in range(200, 212)])
    back = [int(playout.next().picture[0, 0, 0]) for _ in range(12)]
    assert back[0] < 140 and back[4:] == list(range(204, 212)) and playout.counts.filled == 200


def test_an_interruption_fades_and_lets_nothing_old_through():
    playout = Playout(STILL)
    playout.push(said(0))
    for _ in range(3):
        playout.next()
    playout.interrupt(1)
    playout.push(said(12))  # a block of the old epoch that was on its way
    first, second = playout.next(), playout.next()
    tail = first.sound[:FADE_SAMPLES].astype(int)
    assert tail[0] == 1003 and tail[-1] == 0 and (np.diff(tail) <= 0).all() and not first.sound[FADE_SAMPLES:].any()
    assert not second.sound.any() and first.epoch == second.epoch == 1 and playout.counts.stale == 9 + 12
    playout.push(said(100, epoch=1))
    assert (playout.next().sound == 1100).all()
    playout.interrupt(2)
    playout.push(said(200, epoch=2))  # who answers at once is heard at once, and what he cuts off still fades
    first = playout.next().sound.astype(int)
    assert first[0] == 1101 + 1200 and (np.diff(first[:FADE_SAMPLES]) <= 0).all() and (first[FADE_SAMPLES:] == 1200).all()


@pytest.mark.parametrize("mode", ["conversation", "livestream"])
def test_a_late_block_in_the_midst_of_speech(mode):
    """BP-3: a livestream speaks on for 200 ms and skips the pictures of it; a conversation waits and loses nothing."""
    playout = Playout(STILL, mode=mode, ahead=lambda stop: np.full(TICK_SAMPLES, 1000 + stop // 640, np.int16))
    playout.push(said(0))
    heard = [int(playout.next().sound[0]) for _ in range(12 + 7)]
    playout.push(said(12))
    heard += [int(playout.next().sound[0]) for _ in range(12)]
    spoken = [h for h in heard if h]
    assert spoken == [1000 + n for n in range(29 if mode == "livestream" else 24)]  # each sample once and in order; the last 5 ahead again
    assert playout.counts.skipped == (HOLD_TICKS if mode == "livestream" else 0)


@given(st.integers(2, 60), st.integers(0, 1000))
def test_the_loop_has_no_seam(length, step):
    assert abs(bounce(step, length) - bounce(step + 1, length)) == 1 and 0 <= bounce(step, length) < length


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["block", "idle", "tick", "tick", "tick", "interrupt"]), max_size=120), st.sampled_from(["conversation", "livestream"]))
def test_speech_is_conserved_in_order_whatever_happens(script, mode):
    """ENG-11: of each epoch what is heard is a run of what was made, each sample once; a tick always has something to show."""
    position, epoch, made, heard = 0, 0, {0: []}, {0: []}
    playout = Playout(STILL, mode=mode)
    for act in script:
        if act == "block":
            fresh = said(position, epoch=epoch)
            made[epoch] += [int(s.sound[0]) for s in fresh]
            playout.push(fresh)
            position += 12
        elif act == "idle":
            playout.push([slot(n, epoch=epoch) for n in range(12)])
        elif act == "interrupt":
            epoch += 1
            made[epoch], heard[epoch] = [], []
            playout.interrupt(epoch)
        else:
            shown = playout.next()
            assert shown.picture.shape == STILL.shape and shown.epoch == epoch
            if shown.kind == "speech":
                heard[epoch].append(int(shown.sound[-1]))  # the first samples may hold the fading end of the epoch before
    assert all(heard[e] == made[e][: len(heard[e])] for e in made)
