"""Which PCM belongs to which block, what is sent, what comes out: pure bookkeeping, no chain."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import speech
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar.core import Audio, CleanLatent, Frames, Geometry, InputError, Interrupt, Refresh
from liveavatar.runtime.intake import Intake
from liveavatar.runtime.timeline import Timeline

GEOMETRY, AHEAD, BLOCK = Geometry(height=64, width=64), 1320, 7680


def timeline(refresh_block: int = 0, slices: int = 1) -> Timeline:
    return Timeline("s", GEOMETRY, lookahead=AHEAD, refresh_block=refresh_block, refresh_slices=slices)


def pictures(value: int) -> torch.Tensor:
    return torch.full((12, 2, 2, 3), value % 256, dtype=torch.uint8)


def run_out(t: Timeline, heard: list | None = None) -> list:
    """Admit and answer until nothing is left; returns the outputs."""
    outputs = []
    while t.has_audio and not t.gated:
        messages = t.admit(0.0)
        if heard is not None:
            heard += messages
        t.frames(Frames("s", index=messages[-1].index, pictures=pictures(messages[-1].index)))
        outputs.append(t.take())
    return outputs


class Listener:
    """A conditioner's PCM memory: what it would hear for each block, look-ahead included."""

    def __init__(self):
        self.pcm, self.windows = np.zeros(0, np.float32), {}

    def hear(self, messages) -> None:
        for m in messages:
            if isinstance(m, Interrupt):
                self.pcm = self.pcm[: m.sample]
            if isinstance(m, Audio):
                assert m.start == len(self.pcm), "PCM must be contiguous"
                self.pcm = np.concatenate([self.pcm, m.pcm.numpy()])
                self.windows[m.index] = self.pcm[m.index * BLOCK : (m.index + 1) * BLOCK + AHEAD].copy()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=12))
def test_any_chunking_gives_the_same_messages_and_outputs(cuts):
    pcm = speech(sum(cuts) / 16000)
    whole, pieces, heard_whole, heard_pieces = timeline(), timeline(), [], []
    whole.push(pcm)
    whole.end()
    expected = run_out(whole, heard_whole)
    got, at = [], 0
    for size in cuts:
        pieces.push(pcm[at : at + size])
        at += size
        got += run_out(pieces, heard_pieces)
    pieces.end()
    got += run_out(pieces, heard_pieces)
    assert [o.pts for o in got] == [o.pts for o in expected] and whole.done and pieces.done
    assert all(np.array_equal(a.pcm, b.pcm) and a.pictures.shape == b.pictures.shape for a, b in zip(got, expected))
    assert len(heard_whole) == len(heard_pieces)
    assert all(torch.equal(a.pcm, b.pcm) and (a.index, a.start) == (b.index, b.start) for a, b in zip(heard_whole, heard_pieces))


@pytest.mark.parametrize("samples", [1, 640, 641, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + AHEAD, 5 * BLOCK - 639])
def test_outputs_hold_the_very_samples_and_end_with_the_audio(samples):
    t, pcm = timeline(), speech(1 + samples / 16000)[:samples]
    t.push(pcm)
    t.end()
    outputs = run_out(t)
    sound = np.concatenate([o.pcm for o in outputs])
    assert np.array_equal(sound[:samples], pcm) and not sound[samples:].any()
    assert all(len(o.pcm) == 640 * len(o.pictures) for o in outputs)
    assert sum(len(o.pictures) for o in outputs) == -(-samples // 640)
    shown = [o.pts for o in outputs]
    assert shown == [Fraction(12 * i, 25) for i in range(len(outputs))] and t.done


def test_a_block_waits_for_its_look_ahead_unless_the_audio_ended():
    t = timeline()
    t.push(np.zeros(BLOCK + AHEAD - 1, np.float32))
    assert not t.has_audio
    t.push(np.zeros(1, np.float32))
    assert t.has_audio
    t.admit(0.0)
    assert not t.has_audio  # the look-ahead alone is no block
    t.end()
    assert t.has_audio and not t.done


def test_refresh_goes_just_before_its_block_and_holds_it_back():
    t = timeline(refresh_block=2)
    t.push(speech(4))
    first = [t.admit(0.0) for _ in range(2)]
    assert [len(m) for m in first] == [1, 1] and t.gated
    latent = torch.randn(16, 1, 8, 8)
    t.clean(CleanLatent("s", index=0, latent=latent))
    assert not t.gated
    refresh, audio = t.admit(0.0)
    assert isinstance(refresh, Refresh) and torch.equal(refresh.reference, latent) and audio.index == 2
    assert len(t.admit(0.0)) == 1 and t.renew() is None
    t.refresh()  # ahead of its block, where the chain has time for it
    assert torch.equal(t.renew().reference, latent) and t.renew() is None and len(t.admit(0.0)) == 1


def test_refresh_on_demand_and_new_portrait():
    t = timeline(refresh_block=4)
    t.refresh()
    t.push(speech(8))
    t.admit(0.0)
    assert t.gated  # before block 1, and block 0 is not clean yet
    t.clean(CleanLatent("s", index=0, latent=torch.zeros(1)))
    assert isinstance(t.admit(0.0)[0], Refresh)
    t.new_portrait()  # from block 2 on
    t.clean(CleanLatent("s", index=0, latent=torch.zeros(1)))
    t.refresh()
    t.admit(0.0)
    assert t.gated, "the old portrait's latent must not come back"
    t.clean(CleanLatent("s", index=2, latent=torch.ones(1)))
    assert t.admit(0.0)[0].reference.item() == 1.0
    assert [len(t.admit(0.0)) for _ in range(3)] == [1, 1, 1]  # the automatic one is off


def slices_of(t: Timeline, blocks: int) -> dict[int, list[tuple[int, bool]]]:
    """By block: which slices go before it, and whether the sink is whole then."""
    sent = [t.admit(0.0) for _ in range(blocks)]
    return {audio.index: [(m.slice, m.complete) for m in before] for *before, audio in sent if before}


def test_slices_of_a_new_sink_go_before_one_block_each_and_only_a_portrait_ends_them():
    t = timeline(refresh_block=2, slices=3)
    t.push(speech(20))
    assert slices_of(t, 2) == {} and t.gated
    t.clean(CleanLatent("s", index=0, latent=torch.zeros(1)))
    assert slices_of(t, 1) == {2: [(0, False)]}
    t.refresh()  # is under way
    assert t.renew().slice == 1 and t.renew() is None, "a slice too goes ahead of its block"
    t.interrupt()
    t.push(speech(20))
    assert slices_of(t, 4) == {4: [(2, True)]}
    t.refresh()
    assert slices_of(t, 2) == {7: [(0, False)], 8: [(1, False)]}
    t.new_portrait()
    assert slices_of(t, 4) == {}
    t.refresh()
    t.clean(CleanLatent("s", index=9, latent=torch.ones(1)))
    assert slices_of(t, 4) == {13: [(0, False)], 14: [(1, False)], 15: [(2, True)]}


def test_interrupt_drops_audio_pictures_and_what_is_inside():
    t, listener = timeline(), Listener()
    t.push(speech(3))
    for _ in range(3):
        listener.hear(t.admit(0.0))
    t.frames(Frames("s", index=0, pictures=pictures(0)))
    assert t.take().epoch == 0
    t.frames(Frames("s", index=1, pictures=pictures(1)))
    message = t.interrupt()
    assert (message.epoch, message.sample) == (1, 3 * BLOCK) and t.take() is None and t.queued_seconds == 0
    listener.hear([message])
    new = speech(2, seed=9)
    t.push(new)
    listener.hear(t.admit(0.0))
    assert np.array_equal(listener.windows[3], new[: BLOCK + AHEAD])
    t.frames(Frames("s", index=2, pictures=pictures(2)))
    assert t.take() is None and t.in_flight == 1
    t.frames(Frames("s", index=3, epoch=1, pictures=pictures(3)))
    out = t.take()
    assert (out.index, out.epoch, out.pts) == (3, 1, Fraction(12, 25)) and np.array_equal(out.pcm, new[:BLOCK])


def test_idle_keeps_arriving_speech_whole_and_mends_the_look_ahead():
    t, listener, pcm = timeline(), Listener(), speech(2)
    t.push(pcm[:500])
    t.idle()
    listener.hear(t.admit(0.0))
    t.push(pcm[500:600])
    t.idle()
    listener.hear(t.admit(0.0))
    assert not listener.windows[0][:BLOCK].any() and np.array_equal(listener.windows[0][BLOCK : BLOCK + 500], pcm[:500])
    t.push(pcm[600 : BLOCK + AHEAD])
    listener.hear(t.admit(0.0))
    assert np.array_equal(listener.windows[2], pcm[: BLOCK + AHEAD])


@pytest.mark.parametrize("left", [1, 500, BLOCK, BLOCK + AHEAD - 1])
def test_the_end_of_an_utterance_goes_after_one_idle_block(left):
    t, listener, pcm = timeline(), Listener(), speech(2)
    t.push(pcm[:left])
    for _ in range(4):
        t.idle()
        listener.hear(t.admit(0.0))
    heard = np.concatenate([listener.windows[index][:BLOCK] for index in range(4)])
    assert not heard[:BLOCK].any() and np.array_equal(heard[BLOCK : BLOCK + left], pcm[:left]) and not heard[BLOCK + left :].any()
    assert t.queued_seconds == 0
    t.push(pcm)
    listener.hear(t.admit(0.0))
    assert np.array_equal(listener.windows[4], pcm[: BLOCK + AHEAD])


def test_memory_is_what_waits():
    t = timeline()
    for _ in range(300):
        t.push(speech(0.48))
        run_out(t)
    assert len(t._pcm) < 2 * BLOCK and not t._inside and len(t._ahead) == AHEAD and t._pcm.base is None


def test_a_pushed_head_goes_picture_by_picture_with_the_blocks():
    t, heard = timeline(), []
    t.push(speech(5 * 0.48 + 0.1))
    poses = np.arange(30 * 3, dtype=np.float32).reshape(30, 3)
    t.push_head(poses[:5])
    t.push_head(poses[5:])
    heard += t.admit(0.0)
    t.interrupt()
    t.push(speech(4 * 0.48 + 0.1))
    run_out(t, heard)
    said = [m.head_pose for m in heard if isinstance(m, Audio)]
    assert np.array_equal(torch.cat(said[:3])[:30], poses) and not said[2][6:].any() and said[3] is None
    assert [s.shape for s in said[:3]] == [(12, 3)] * 3


# ---------------------------------------------------------------- intake


def test_int16_and_float_mean_the_same():
    pcm = (speech(0.1) * 32767).astype(np.int16)
    assert np.array_equal(Intake().push(pcm, 16000), pcm.astype(np.float32) / 32768)
    assert np.array_equal(Intake().push(torch.from_numpy(pcm), 16000), pcm.astype(np.float32) / 32768)


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampling_leaves_no_trace_of_the_chunks(rate):
    t = np.arange(rate) / rate
    tone = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    whole, pieces = Intake(), Intake()
    one = np.concatenate([whole.push(tone, rate), whole.flush()])
    cut = np.split(tone, [7, 1000, 1001, rate // 2, rate - 3])
    many = np.concatenate([*(pieces.push(p, rate) for p in cut), pieces.flush()])
    assert np.array_equal(one, many) and abs(len(one) - 16000) <= 32
    ideal = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(one)) / 16000)
    assert np.abs(one - ideal)[400:-400].max() < 0.02


@pytest.mark.parametrize("bad, rate, why", [
    (np.zeros((2, 5), np.float32), 16000, "mono"), (np.zeros(5, np.int64), 16000, "int64"), (np.array([np.nan], np.float32), 16000, "NaN"),
    (np.zeros(5, np.float32), 0, "rate"), (np.zeros(5, np.float32), 16000.0, "rate"),
])  # fmt: skip
def test_audio_that_cannot_be_used_is_refused(bad, rate, why):
    with pytest.raises(InputError, match=why):
        Intake().push(bad, rate)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 20_000), st.just("idle"), st.just("settle"), st.just("interrupt")), max_size=20))
def test_every_block_says_which_pushed_samples_it_begins_with(script):
    t, pushed, position = timeline(), np.zeros(0, np.float32), 0
    for act in script:
        if isinstance(act, int):
            fresh = np.arange(len(pushed) + 1, len(pushed) + act + 1, dtype=np.float32)
            pushed = np.concatenate([pushed, fresh])
            t.push(fresh)
        elif act == "idle":
            t.idle()
        elif act == "settle":
            t.settle()
        else:
            t.interrupt()
            position = len(pushed)
        while act == "idle" or t.has_audio:
            index = t.admit(0.0)[-1].index
            t.frames(Frames("s", index=index, epoch=t.epoch, pictures=pictures(0)))
            out = t.take()
            start, stop = out.source
            assert start == position and np.array_equal(out.pcm[: stop - start], pushed[start:stop]) and not out.pcm[stop - start :].any()
            act, position = None, stop
    assert t.received == len(pushed)


def test_a_settled_utterance_ends_without_a_hole():
    t = timeline()
    t.push(np.ones(BLOCK + 100, np.float32))
    t.settle()
    for index in (0, 1):
        t.idle()
        t.admit(0.0)
        t.frames(Frames("s", index=index, pictures=pictures(index)))
    first, second = t.take(), t.take()
    assert first.pcm.all() and first.source == (0, BLOCK)
    assert second.source == (BLOCK, BLOCK + 100) and second.pcm[:100].all() and not second.pcm[100:].any()
