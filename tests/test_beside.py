"""Decode on a rank with steps: the same pictures whether it runs beside them or after them."""

import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from test_register import config_of, played, script

from liveavatar.core import Block, Close, Frames, Refresh, SetPrompt, Span
from liveavatar.runtime.beside import Decoding, DecoderBeside, decoder_on
from liveavatar.runtime.links import QueueLink
from liveavatar.runtime.pump import Pump
from liveavatar.runtime.roles import Decoder
from liveavatar.runtime.stage_roles import build_stage
from liveavatar.runtime.worktime import Work, Worktimes


def frames(heard: dict) -> dict:
    return {key: [(m.index, m.epoch, m.pictures.clone()) for m in messages] for key, messages in heard.items() if key[1] == "Frames"}


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys() and one
    for key in one:
        for mine, theirs in zip(one[key], two[key], strict=True):
            assert mine[:2] == theirs[:2] and torch.equal(mine[2], theirs[2])


def test_on_a_cpu_decode_follows_the_step(tiny_folder):
    decoder = Decoder(None)
    assert decoder_on(decoder, torch.device("cpu"), shares=True) is decoder
    same(frames(played(config_of(tiny_folder, decode_beside=True), script())[0]), frames(played(config_of(tiny_folder), script())[0]))


class Happening:
    """A CUDA event that happens at `at` ms of the device's own clock, which reads 0 when the host's reads `Happening.zero` s."""

    now = zero = 0.0  # s, of the host

    def __init__(self, at: float):
        self.at = at

    def query(self) -> bool:
        return Happening.zero + self.at / 1000 <= Happening.now

    def synchronize(self) -> None:
        Happening.now = max(Happening.now, Happening.zero + self.at / 1000)

    def elapsed_time(self, end) -> float:
        return end.at - self.at


def test_a_decode_is_told_as_its_own_work_not_as_what_the_rank_does_meanwhile(monkeypatch):
    holder, spans = DecoderBeside.__new__(DecoderBeside), []
    holder.decoder, pictures = Decoder(None), torch.zeros(12, 2, 2, 3, dtype=torch.uint8)
    work = [Work(Happening(at), Happening(at + 80), 100.0) for at in (200, 500)]
    holder._queued = deque(Decoding(Block("s", index=n), pictures, w) for n, w in zip((4, 5), work))
    pump = Pump([holder], QueueLink(), None, spans.append, traced=0)
    monkeypatch.setattr(pump._worktimes, "_clock", lambda: Happening.now)
    Happening.zero, Happening.now = 100.0, 100.6
    pump._advance(0)
    assert [(type(m), m.index) for m in spans] == [(Span, 4), (Frames, 4)] and spans[0].end - spans[0].start == pytest.approx(0.08)


def test_times_of_a_gpu_are_told_when_it_is_done_and_nobody_waits():
    """The first is as late as it was seen; from then on the device's clock counts, whatever the host was at."""
    told, times = [], Worktimes(lambda: Happening.now)
    Happening.zero = 50.0
    tell = lambda *span: told.append([round(t, 4) for t in span])  # noqa: E731

    def at(now: float) -> list:
        Happening.now = now
        times.read()
        return told

    Happening.now = 50.0
    times.add(Work(Happening(10), Happening(110), 50.005), tell)
    times.add(Work(Happening(110), Happening(310), 50.01), tell)
    assert at(50.1) == [] and len(times) == 2
    assert at(50.112) == [[50.012, 50.112]]
    assert at(60.0)[1:] == [[50.112, 50.312]] and not times, "2 ms late as the first, not as the host was"
    Happening.now = 60.2
    times.add(Work(Happening(10_000), Happening(10_199), 60.0), tell)
    assert told[2:] == [[60.001, 60.2]], "what was seen to be over was over: the reckoning is that much nearer"
    times.add(Work(None, None, 60.0), tell)
    assert told[3:] == [[60.0, 60.2]], "the host's own work is over when it is given"


class Ticks(Happening):
    def query(self) -> bool:
        return True


def test_a_drifting_clock_is_held_between_what_the_host_knows():
    """A device whose clock gains or loses a second in 1000: after 2000 blocks of 480 ms its times are as near as after one."""
    for rate in (1.001, 0.999):
        told, now = [], 0.0
        times = Worktimes(lambda: now)
        for n in range(2000):
            given, now = 0.48 * n, 0.48 * n + 0.3
            times.add(Work(Ticks(1000 * rate * given), Ticks(1000 * rate * (given + 0.295)), given), lambda *span: told.append(span))
        assert max(abs(start - 0.48 * n) for n, (start, _) in enumerate(told)) < 0.006


class Steps:
    """The roles before a decode: notes when a block begins."""

    def __init__(self, events: list):
        self.events = events

    def __call__(self, message):
        self.events.append(("step", message.index))
        return [message]


def device(at_work: dict[int, bool]):
    """A DecoderBeside whose device works on block n while at_work[n]; waits for it are noted as such."""
    holder, waited = DecoderBeside.__new__(DecoderBeside), []
    holder.decoder, holder._queued, pictures = Decoder(None), deque(), torch.zeros(12, 2, 2, 3, dtype=torch.uint8)

    def queue(block):
        done = SimpleNamespace(query=lambda: not at_work[block.index], synchronize=lambda: at_work[block.index] and waited.append(block.index))
        return Decoding(block, pictures, Work(done, done, 0.0))

    holder._decode = queue
    return holder, waited


def test_a_block_that_comes_while_another_is_decoded_is_taken_at_once():
    at_work, heard = {0: True, 1: True, 2: False}, []
    holder, waited = device(at_work)
    inbox = QueueLink()
    pump = Pump([Steps(heard), holder], inbox, None, lambda m: heard.append(("frames", m.index)))
    running = threading.Thread(target=pump.run)
    running.start()

    def reached(count: int) -> list:
        end = time.monotonic() + 20
        while len(heard) < count and time.monotonic() < end:
            time.sleep(0.001)
        return heard

    inbox.send(Block("s", index=0))
    assert reached(1) == [("step", 0)]
    inbox.send(Block("s", index=1))  # nobody waits for block 0: it is taken, and both are under way
    assert reached(2) == [("step", 0), ("step", 1)] and not waited
    time.sleep(0.02)
    assert len(heard) == 2 and pump.doing()[0] == "Decoder on Block 0 at step 0 of session 's'", "a device that hangs is seen"
    at_work[0] = False
    assert reached(3)[2:] == [("frames", 0)]
    at_work[1] = False
    assert reached(4)[3:] == [("frames", 1)] and not waited
    pump.stop()
    running.join()


def test_only_who_opens_or_closes_waits_for_a_decode():
    """A slice of a new sink before each block would keep decoding from ever running beside the steps."""
    holder, waited = device({0: True})
    holder(Block("s", index=0))
    assert [holder.holds_back(m) for m in (Refresh("s"), SetPrompt("s"), Close("t"), Close("s"))] == [False, False, False, True]
    assert holder(Refresh("s")) == [] and not waited


def test_what_the_device_has_done_leaves_between_two_roles():
    """The host may be at the next block's steps for long where it launches them one by one."""
    heard = []
    holder, _ = device({0: False, 1: False})
    pump = Pump([Steps(heard), Steps(heard), holder], QueueLink(), None, lambda m: heard.append(("frames", m.index)))
    pump._pass(Block("s", index=0))
    pump._pass(Block("s", index=1))
    assert heard == [("step", 0)] * 2 + [("frames", 0)] + [("step", 1)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runtime", [{}, {"shift_register": True, "batch": 2}])
def test_on_a_gpu_decode_beside_the_steps_gives_the_same_pictures(runtime, tiny_folder):
    from dataclasses import replace

    def run(beside: bool) -> dict:
        config = config_of(tiny_folder, decode_beside=beside, **runtime)
        config = replace(config, model=replace(config.model, device="cuda"))
        roles, messages, heard = build_stage(config, config.chain, torch.device("cuda")), script(), {}
        assert isinstance(roles[-1], DecoderBeside) == beside
        inbox = QueueLink(len(messages))
        for message in messages:
            inbox.send(message)
        inbox.close()
        Pump(roles, inbox, None, lambda m: heard.setdefault((m.session, type(m).__name__), []).append(m)).run()
        assert all(m.pictures.is_cpu for (_, kind), came in heard.items() if kind == Frames.__name__ for m in came)
        return frames(heard)

    same(run(True), run(False))
