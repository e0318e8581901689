"""What a server leaves out when it is too slow, when, and when it gives it back (BP-2). Pure, so minutes pass in microseconds."""

import pytest

from liveavatar.serving import ladder
from liveavatar.serving.ladder import CALM_SECONDS, FEWER_STEPS, IDLE_LOOP, LOWER_FPS, PERSIST_SECONDS, SMALLER, Factor, Ladder

ALL = (FEWER_STEPS, LOWER_FPS, SMALLER, IDLE_LOOP)


def climb(stairs: Ladder, factors, now: float = 0.0, every: float = 0.5) -> list[tuple[float, int]]:
    """(when, step) of each change, for a factor at each look."""
    moved = []
    for factor in factors:
        if stairs.look(now, factor):
            moved.append((now, stairs.rung.step))
        now += every
    return moved


def test_the_factor_is_fresh_seconds_per_second_whether_the_chain_or_the_clock_is_late():
    whole, chain, clock = Factor(), Factor(), Factor()
    for n in range(1000):
        whole.tick(n / 25, False)
        chain.tick(n / 25, missing=n % 5 == 0)
        clock.tick(n / 20, False)
    assert (whole.value, chain.value, clock.value) == pytest.approx((1, 0.8, 0.8), abs=0.003)
    late = Factor()
    for n in range(10):
        late.tick(n / 25, missing=n < 4)  # four pictures of five seconds are four pictures, also in the first second
    assert late.value == pytest.approx(1 - 4 / ladder.WINDOW)


def test_it_goes_up_in_order_one_rung_at_a_time_and_no_further_than_is_worth_it():
    assert [step for _, step in climb(Ladder(ALL), [0.5] * 100)] == [1, 2, 3, 5]
    assert [when for when, _ in climb(Ladder(ALL), [0.5] * 100)] == [PERSIST_SECONDS + n * (PERSIST_SECONDS + 0.5) for n in range(4)]
    assert [step for _, step in climb(Ladder(ALL), [0.95] * 100)] == [1]  # half the pictures are worth more than five in a hundred
    assert [step for _, step in climb(Ladder(ALL), [0.85] * 100)] == [1, 2, 3]
    assert [step for _, step in climb(Ladder((LOWER_FPS, IDLE_LOOP)), [0.7] * 100)] == [2, 5]
    assert climb(Ladder(()), [0.1] * 100) == []


def test_one_hitch_is_forgiven():
    factor, stairs = Factor(), Ladder(ALL)
    for n in range(1000):
        factor.tick(n / 25 + 0.9 * (n > 500), missing=500 < n < 520)  # nearly a second of nothing, and the clock set anew
        assert not stairs.look(n / 25, factor.value)
    for n in range(1000, 4000):  # nor is a picture in a hundred anybody's degradation
        factor.tick(n / 25 + 0.9, missing=n % 100 == 0)
        assert not stairs.look(n / 25, factor.value)


def test_what_was_left_out_comes_back_when_all_is_well_for_a_while():
    stairs = Ladder(ALL)
    moved = climb(stairs, [0.7] * 54 + [1.0] * 200)
    assert [step for _, step in moved] == [1, 2, 3, 5, 3, 2, 1, 0]
    assert all(b[0] - a[0] >= CALM_SECONDS for a, b in zip(moved[4:], moved[5:]))
    assert [step for _, step in climb(Ladder(ALL), [0.7] * 14 + [0.975] * 500)] == [1]  # neither well nor slow enough: it stays


def test_a_rung_given_back_too_early_is_kept_twice_as_long():
    stairs, now, moved = Ladder((LOWER_FPS,)), 0.0, []
    while now < 400:  # without the rung it is always too slow, with it all is well
        if stairs.look(now, 1.0 if stairs.rung is LOWER_FPS else 0.6):
            moved.append((now, stairs.rung.step))
        now += 0.5
    kept = [down - up for (up, step), (down, _) in zip(moved, moved[1:]) if step]
    assert kept[:4] == pytest.approx([15, 30, 60, 120], abs=0.6)


def test_nobody_there_is_nothing_left_out():
    stairs = Ladder(ALL)
    climb(stairs, [0.5] * 40)
    assert stairs.rung.step > 1 and stairs.look(100.0, None) and stairs.rung.step == 0 and not stairs.look(100.5, None)
