"""Decisions of the scheduler under a fake clock; no chain, no task."""

import dataclasses

import pytest

from liveavatar.runtime.scheduler import Candidate, Decision, PipeTime, Playout, Scheduler


def offline(name: str, **fields) -> Candidate:
    return Candidate(**{"session": name, "ready": True, "in_flight": 0, **fields})


def live(name: str, deadline: float | None, **fields) -> Candidate:
    return offline(name, live=True, deadline=deadline, **fields)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(credits=2, cushion=0.1, pipe_time=PipeTime(initial=1.0))


def test_nobody_there(scheduler):
    assert scheduler.decide(0.0, []) == Decision()


def test_offline_goes_when_audio_and_credit_are_there(scheduler):
    assert scheduler.decide(0.0, [offline("a")]).admit == "a"
    assert scheduler.decide(0.0, [offline("a", ready=False)]) == Decision()
    assert scheduler.decide(0.0, [offline("a", in_flight=2)]) == Decision()
    assert scheduler.decide(0.0, [offline("a", gated=True)]) == Decision()


def test_offline_sessions_take_turns(scheduler):
    asked, order = {"a": 0.0, "b": 0.0, "c": 0.0}, []
    for tick in range(1, 7):
        chosen = scheduler.decide(tick, [offline(n, asked=t) for n, t in asked.items()]).admit
        order.append(chosen)
        asked[chosen] = float(tick)
    assert order == ["a", "b", "c", "a", "b", "c"]


def test_live_block_is_admitted_just_in_time(scheduler):
    block = live("a", deadline=10.0)  # pipe 1.0 + cushion 0.1: not before 8.9
    decision = scheduler.decide(8.0, [block])
    assert decision.admit is None and decision.wake == pytest.approx(8.9)
    assert scheduler.decide(decision.wake, [block]).admit == "a"


def test_earliest_deadline_first(scheduler):
    assert scheduler.decide(20.0, [live("a", 12.0), live("b", 11.0), live("c", 13.0)]).admit == "b"
    assert scheduler.decide(20.0, [live("a", 12.0), live("b", 11.0, in_flight=2), live("c", 13.0)]).admit == "a"


def test_live_before_offline_only_when_due(scheduler):
    both = [offline("file"), live("talk", 10.0)]
    early = scheduler.decide(1.0, both)
    assert early.admit == "file" and early.wake == pytest.approx(8.9)
    assert scheduler.decide(8.9, both).admit == "talk"


def test_live_audio_that_is_missing_is_called_late_when_due(scheduler):
    silent = live("a", 10.0, ready=False)
    assert scheduler.decide(8.0, [silent]).late is None
    assert scheduler.decide(9.0, [silent]).late == "a"
    assert scheduler.decide(0.0, [live("a", None, ready=False)]).late == "a"


def test_pipe_time_is_a_high_percentile_of_the_last_blocks():
    pipe = PipeTime(initial=2.0, window=20)
    assert pipe.seconds == 2.0
    for _ in range(19):
        pipe.observe(0.5)
    pipe.observe(3.0)
    assert pipe.seconds == 0.5  # one in twenty may be late
    for _ in range(2):
        pipe.observe(3.0)
    assert pipe.seconds == 3.0
    for _ in range(20):
        pipe.observe(0.25)
    assert pipe.seconds == 0.25  # and it forgets


def test_slow_pipe_asks_earlier(scheduler):
    scheduler.pipe_time.observe(4.0)
    assert scheduler.decide(0.0, [live("a", 10.0)]).wake == pytest.approx(5.9)


def test_playout_follows_what_was_shown():
    playout = Playout()
    assert playout.deadline(0.0) is None
    playout.admitted(5.0, 0.0, 1.0)
    playout.admitted(5.1, 0.48, 1.0)
    assert playout.deadline(0.48) == pytest.approx(6.48)
    playout.shown(7.0, 0.0)
    assert playout.deadline(0.96) == pytest.approx(7.96)
    playout.shown(7.2, 0.48)  # taken ahead of time: the clock does not run backwards
    assert playout.deadline(0.96) == pytest.approx(7.96)
    playout.shown(9.0, 0.96)  # an underrun moves everything after it
    assert playout.deadline(1.44) == pytest.approx(9.48)


def test_a_live_stream_stays_ahead_by_the_cushion_and_never_fills_the_pipe():
    """One session, a pipe of fixed 1.2 s, the client shows each block when it is due."""
    scheduler, playout, clock = Scheduler(credits=6, cushion=0.1, pipe_time=PipeTime(initial=1.2)), Playout(), 0.0
    inside, arrived, next_block, shown, slack = [], [], 0, 0, []
    while shown < 40:
        arrived += [b for at, b in inside if at <= clock]
        inside = [(at, b) for at, b in inside if at > clock]
        due = playout.deadline(shown * 0.48)
        if arrived and (shown == 0 or clock >= due - 1e-9):
            playout.shown(clock, arrived.pop(0) * 0.48)
            slack.append(len(arrived))
            shown += 1
        candidate = live("a", playout.deadline(next_block * 0.48), in_flight=len(inside) + len(arrived))
        while scheduler.decide(clock, [candidate]).admit:
            playout.admitted(clock, next_block * 0.48, 1.2)
            inside.append((clock + 1.2, next_block))
            next_block += 1
            candidate = live("a", playout.deadline(next_block * 0.48), in_flight=len(inside) + len(arrived))
        clock += 0.01
    assert max(slack) <= 1 and clock < 1.2 + 40 * 0.48 + 0.5
    assert playout.origin == pytest.approx(1.2, abs=0.05)  # no underrun


def test_hitches_do_not_make_pictures_wait_for_longer_than_a_block():
    """CLK-4, serving.md 4: whatever the pipe's worst blocks take, one that takes what most do is ready a block ahead at most."""
    scheduler, playout, clock = Scheduler(credits=6, pipe_time=PipeTime(initial=0.3)), Playout(), 0.0
    inside, arrived, next_block, shown, early, seen = [], [], 0, 0, [], set()
    while shown < 200:
        for item in [i for i in inside if i[1] <= clock]:
            inside.remove(item)
            arrived.append(item[2])
            scheduler.pipe_time.observe(clock - item[0])
        due = playout.deadline(shown * 0.48)
        if arrived and arrived[0] not in seen:
            seen.add(arrived[0])
            early.append(0.0 if due is None else playout.deadline(arrived[-1] * 0.48) - clock)
        if arrived and (due is None or clock >= due - 1e-9):
            playout.shown(clock, arrived.pop(0) * 0.48)
            shown += 1
        candidate = live("a", playout.deadline(next_block * 0.48), in_flight=len(inside) + len(arrived))
        while scheduler.decide(clock, [candidate]).admit:
            playout.admitted(clock, next_block * 0.48, 0.3)
            takes = 1.5 if next_block % 9 == 8 else 0.3
            inside.append((clock, max([clock + takes, *(done for _, done, _ in inside)]), next_block))
            next_block += 1
            candidate = live("a", playout.deadline(next_block * 0.48), in_flight=len(inside) + len(arrived))
        clock += 0.01
    assert sorted(early)[len(early) // 2] <= 0.48 + 0.02  # it was 1.3


def test_decisions_have_no_memory(scheduler):
    candidates = [live("a", 10.0), offline("b")]
    before = dataclasses.asdict(scheduler.decide(3.0, candidates))
    scheduler.decide(100.0, candidates)
    assert dataclasses.asdict(scheduler.decide(3.0, candidates)) == before
