"""LiveKit: real rtc.Room clients on the test SFU, the official agent classes, a LiveSession over the test card.

Rules of serving.md 10.2 by number, BRG-1 to BRG-3, the drop-in endpoints of 10.4, the plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time

import numpy as np
import pytest

pytest.importorskip("livekit.agents", reason="needs livekit-agents: pip install 'liveavatar[livekit]'")

import livekit_sfu
from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd
from livekit_people import FACE, Agent, Viewer, avatar_token, frames, run, studio, token, tone, until

from liveavatar.core import FPS
from liveavatar.serving import livekit_worker
from liveavatar.serving.livekit_video import SessionVideo, Source
from liveavatar.serving.livekit_worker import join
from liveavatar.serving.packets import SOUND_RATE, TICK_SAMPLES
from liveavatar.serving.role import Role


@pytest.fixture(scope="module")
def sfu():
    """Address of an SFU in a process of its own."""
    with livekit_sfu.running() as url:
        yield url


# ---------------------------------------------------------------- what is heard, computed


def test_source_knows_what_was_heard():
    source, sound = Source(), np.arange(TICK_SAMPLES, dtype=np.int16)
    source.push(np.zeros(TICK_SAMPLES, np.int16), False, 10.0)
    source.push(sound, True, 10.0)
    assert source.waiting(10.0) == pytest.approx(0.08)
    rest, spoken = source.unheard(10.03)
    assert len(rest) == 2400 and spoken == pytest.approx(0.04)
    rest, spoken = source.unheard(10.06)
    np.testing.assert_array_equal(rest, sound[-960:])
    assert spoken == pytest.approx(0.02) and source.unheard(11.0)[1] == 0.0
    source.push(sound, True, 11.0)  # it had run dry: time that passed is not owed
    assert source.waiting(11.0) == pytest.approx(0.04)


class Pictures:
    """A video source for the real AVSynchronizer that notes (time, picture), and a sink that notes the last epoch of every picture."""

    name, wants = "notes", frozenset({"raw"})

    def __init__(self):
        self.shown, self.epochs = [], {}

    def capture_frame(self, frame: rtc.VideoFrame) -> None:
        self.shown.append((time.monotonic(), bytes(frame.data)))

    def put(self, tick) -> None:
        self.epochs[tick.picture.tobytes()] = tick.epoch

    def flush(self, epoch: int) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def played(**limits):
    """A SessionVideo on a live session, taken as AvatarRunner takes it, without a room. Yields (video, session, pictures, notes)."""
    async with studio(**limits) as place:
        session = await place.open(Role(avatar="a", picture=FACE))
        video, pictures, notes = SessionVideo(session), Pictures(), []
        session.add_sink(pictures)
        sounds = rtc.AudioSource(SOUND_RATE, 1, queue_size_ms=160)
        video.sync = rtc.AVSynchronizer(audio_source=sounds, video_source=pictures, video_fps=FPS, video_queue_size_ms=160)

        async def take() -> None:
            async for frame in video:
                if isinstance(frame, AudioSegmentEnd):
                    notes.append(("end", video.outcome))
                    continue
                await video.sync.push(frame)
                if isinstance(frame, rtc.AudioFrame):
                    notes.append(("sound", session.epoch))

        taking = asyncio.create_task(take())
        await until(lambda: len(pictures.shown) > 3)
        yield video, session, pictures, notes
        await session.close()
        await taking
        await video.sync.aclose()
        await sounds.aclose()


def ended(notes: list) -> bool:
    return any(name == "end" for name, _ in notes)


def speaking(notes: list) -> bool:
    return any(name == "sound" for name, _ in notes)


async def pushed(video: SessionVideo, seconds: float, rate: int = 16_000, channels: int = 1) -> None:
    for frame in frames(tone(seconds, rate), rate, channels):
        await video.push_audio(frame)
    await video.push_audio(AudioSegmentEnd())


def test_idle_pictures_without_sound_and_one_end_per_segment():
    """Rules 1, 2, 3, 7: pictures flow in silence and none is spoken; segments of any rate, one of them empty, end once each, in order."""

    async def scene():
        async with played() as (video, session, pictures, notes):
            assert not notes and session.stats()["viewers"] == 2  # we and the notes
            await pushed(video, 0.4, 16_000)
            await pushed(video, 0.6, 44_100, channels=2)
            await video.push_audio(AudioSegmentEnd())  # of nothing: nobody waits for it
            await pushed(video, 0.2, 48_000)
            await until(lambda: [name for name, _ in notes].count("end") == 3)
            await until(lambda: len({picture for _, picture in pictures.shown}) > 20)
            assert not video.speaking and video.begun == 3
            return notes

    notes = run(scene())
    assert [outcome for name, outcome in notes if name == "end"] == [(pytest.approx(x, abs=0.01), False) for x in (0.4, 0.6, 0.2)]
    assert [name for name, _ in notes].count("sound") == pytest.approx(30, abs=3)  # 40 ms each: nothing is spoken but speech


def test_nothing_of_an_epoch_after_it_was_cleared():
    """BRG-3, rules 3 and 4: when clear_buffer returned, no sound and no picture of what was said leaves any more, and no end comes."""

    async def scene():
        async with played() as (video, session, pictures, notes):
            for _ in range(5):
                await pushed(video, 2.0)
                await until(lambda: speaking(notes))
                await asyncio.sleep(0.13)
                await video.clear_buffer()
                shown, said, position = len(pictures.shown), len(notes), video.outcome[0]
                assert video.outcome[1] and 0.0 < position < 1.5 and not video.speaking
                await until(lambda: len(pictures.shown) > shown + 4)
                assert all(pictures.epochs[picture] == session.epoch for _, picture in pictures.shown[shown:])
                assert len(notes) == said
                notes.clear()
            await pushed(video, 0.2)
            await until(lambda: ended(notes))

    run(scene())


def test_somebody_else_interrupts():
    """The operator or the API interrupts the session: the agent's segment ends as interrupted, what it still sends is not spoken."""

    async def scene():
        async with played() as (video, session, pictures, notes):
            for frame in frames(tone(2.0, 16_000), 16_000):
                await video.push_audio(frame)
            await until(lambda: speaking(notes))
            await session.interrupt()
            await until(lambda: ended(notes))
            position, interrupted = notes[-1][1]
            assert interrupted and position < 1.5
            notes.clear()
            await pushed(video, 1.0)  # the rest of the same stream
            await asyncio.sleep(0.3)
            assert not notes
            await pushed(video, 0.2)
            await until(lambda: ended(notes))
            assert notes[-1][1] == (pytest.approx(0.2, abs=0.01), False)

    run(scene())


def test_a_stream_may_be_closed_long_after_its_sound():
    """A slow voice: the segment ends when the agent says so, with what was heard of it; silence between its parts does not count."""

    async def scene():
        async with played() as (video, _, _, notes):
            for seconds in (0.4, 0.2):
                for frame in frames(tone(seconds, 16_000), 16_000):
                    await video.push_audio(frame)
                await until(lambda: speaking(notes))
                await asyncio.sleep(1.2)
            assert not ended(notes) and video.speaking
            await video.push_audio(AudioSegmentEnd())
            await until(lambda: ended(notes))
            return notes[-1][1], [name for name, _ in notes].count("sound")

    outcome, sounds = run(scene())
    assert outcome == (pytest.approx(0.6, abs=0.01), False) and sounds == pytest.approx(15, abs=3)


def test_a_full_buffer_makes_the_agent_wait():
    """Speech comes faster than it is spoken and beyond sessions.audio_seconds: none is lost, none is refused to the agent."""

    async def scene():
        async with played(audio_seconds=0.5) as (video, session, _, notes):
            began = time.monotonic()
            await pushed(video, 1.4)
            assert time.monotonic() - began > 0.7
            await until(lambda: ended(notes))
            return notes[-1][1]

    assert run(scene()) == (pytest.approx(1.4, abs=0.01), False)


# ---------------------------------------------------------------- rooms


@contextlib.asynccontextmanager
async def scene_in(sfu: str, room: str, *, viewer: bool = True):
    """A studio, an agent and perhaps a viewer in a room, and the avatar's worker. Yields (place, agent, viewer, worker)."""
    async with studio() as place:
        agent = await Agent().enter(sfu, room)
        watcher = await Viewer().enter(sfu, room) if viewer else None
        worker = await join(await place.open(Role(avatar="a", picture=FACE)), sfu, avatar_token(room))
        yield place, agent, watcher, worker
        await asyncio.gather(agent.room.disconnect(), *([watcher.room.disconnect()] if watcher else []))
        await worker.aclose()


def test_an_avatar_in_a_room(sfu):
    """Rules 1, 2, 6 and 7 and the protocol of 10.1: an empty room costs nothing; tracks, pictures at 25 a second, playback events."""

    async def scene():
        async with studio() as place:
            agent = await Agent().enter(sfu, "stage", auto_subscribe=False)
            session = await place.open(Role(avatar="a", picture=FACE))
            worker = await join(session, sfu, avatar_token("stage"))
            await until(lambda: "avatar" in agent.room.remote_participants and agent.room.remote_participants["avatar"].track_publications)
            await asyncio.sleep(0.3)
            assert session.stats()["viewers"] == 0  # rule 1: nobody has subscribed
            viewer = await Viewer().enter(sfu, "stage")
            await until(lambda: len(viewer.pictures) > 5)
            assert viewer.tracks == ["avatar_audio", "avatar_video"] and session.stats()["viewers"] == 1
            await until(lambda: viewer.room.remote_participants["avatar"].attributes.get("ai_generated") == "true")  # WM-2
            began = time.monotonic()
            await agent.say(2.0)
            finished = await agent.output.wait_for_playout()
            ended = time.monotonic()
            await asyncio.sleep(0.3)
            assert agent.names() == ["started", "finished"] and not finished.interrupted
            assert finished.playback_position == pytest.approx(2.0, abs=0.005)
            loud = viewer.loud(began)
            assert 1.9 < ended - agent.events[0][1] < 2.6 and loud[-1] - loud[0] == pytest.approx(2.0, abs=0.25)
            assert ended > loud[-1] - 0.2  # finished means heard
            await agent.say(0.5, 48_000, channels=2)  # rule 7
            assert (await agent.output.wait_for_playout()).playback_position == pytest.approx(0.5, abs=0.005)
            times = [at for at, *_ in viewer.pictures if at > began]
            rate = (len(times) - 1) / (times[-1] - times[0])
            assert rate > 17, f"{rate:.1f} pictures a second: the SDK's preset for this size would be 15"
            red = viewer.pictures[-1][2][4, :, 0].astype(int)
            assert red[-8:].mean() - red[:8].mean() > 30  # RGB came through as RGB
            await agent.room.disconnect()
            assert await worker.over() == "the agent left" and session.state == "closed" and not place.sessions
            await viewer.room.disconnect()

    run(scene())


def test_interruptions_are_heard_at_once(sfu):
    """BRG-1, BRG-2, BRG-3, rules 4 to 6: silence at the viewer, positions, no event after finished."""
    silences, errors = [], []

    async def scene():
        async with scene_in(sfu, "barge") as (_, agent, viewer, worker):
            for turn in range(6):
                await asyncio.sleep(0.1)
                agent.events.clear()
                began = time.monotonic()
                await agent.say(2.0)
                await until(lambda: len(viewer.loud(began)) > 20 + 7 * turn)
                asked = time.monotonic()
                agent.output.clear_buffer()
                event = await agent.output.wait_for_playout()
                finished = time.monotonic()
                await asyncio.sleep(0.4)
                loud = viewer.loud(began)
                silences.append(loud[-1] - asked)
                errors.append(abs(0.01 * len(loud) - event.playback_position))
                assert event.interrupted and finished - asked < 1.0 and agent.names() == ["started", "finished"]
            await agent.say(0.4)
            assert (await agent.output.wait_for_playout()).playback_position == pytest.approx(0.4, abs=0.005)
            assert worker.video.drops == 0

    run(scene())
    figures = f"silence {[round(1000 * s) for s in silences]} ms, positions off by {[round(1000 * e) for e in errors]} ms"
    print(figures)
    busy = os.getloadavg()[0] > 2 * os.cpu_count()  # the viewer's jitter buffer grows then; what is ours does not
    assert statistics.median(silences) < (0.5 if busy else 0.25) and statistics.median(errors) < 0.06, figures


def test_two_hundred_interruptions_do_not_stop_the_sound(sfu):
    """Rule 10 (LiveKit #3434, #3237, #7007): a bounded soak over the real data streams and RPC."""

    async def scene():
        async with scene_in(sfu, "soak", viewer=False) as (_, agent, _, worker):
            for turn in range(200):
                await agent.say(0.1)
                await asyncio.sleep(0.008 * (turn % 5))  # before, while and after it is heard
                agent.output.clear_buffer()
                await asyncio.wait_for(agent.output.wait_for_playout(), 1.9)  # below the agent's own deadline of 2 s
            agent.events.clear()
            await agent.say(0.3)
            event = await agent.output.wait_for_playout()
            assert not event.interrupted and event.playback_position == pytest.approx(0.3, abs=0.005)
            return worker.session.stats()["interrupts"], len(worker.video._cuts)

    began = time.monotonic()
    interrupts, left = run(scene())
    print(f"200 interruptions in {time.monotonic() - began:.1f} s")
    assert interrupts == 200 and not left


def test_rooms_do_not_hear_each_other(sfu):
    """Rule 9: agents of the same name in two rooms, another agent in the first; each clears its own avatar alone."""

    async def scene():
        async with scene_in(sfu, "left", viewer=False) as (_, left, _, _), scene_in(sfu, "right", viewer=False) as (_, right, _, worker):
            stranger = await Agent("stranger").enter(sfu, "right")
            await left.say(3.0)
            await right.room.local_participant.perform_rpc(destination_identity="avatar", method="lk.clear_buffer", payload="")
            answer = await stranger.room.local_participant.perform_rpc(destination_identity="avatar", method="lk.clear_buffer", payload="")
            assert answer == "reject"
            before = worker.session.epoch
            await asyncio.sleep(0.3)
            left.output.clear_buffer()
            await asyncio.sleep(0.3)
            assert worker.session.epoch == before
            await stranger.room.disconnect()

    run(scene())


def test_how_a_stay_ends(sfu, monkeypatch):
    """API-2: the session ends with the stay and the stay with the session; an agent that never comes, or sends nonsense, costs nothing for long."""

    async def scene():
        async with studio() as place:

            async def enter(room: str):
                return await join(await place.open(Role(avatar="a", picture=FACE)), sfu, avatar_token(room))

            monkeypatch.setattr(livekit_worker, "AGENT_SECONDS", 0.5)
            alone = await enter("alone")
            assert await alone.over() == "the agent did not come" and not place.sessions
            room = rtc.Room()
            await room.connect(sfu, token("agent", "ends", "agent"))
            worker = await enter("ends")
            await until(lambda: "avatar" in room.remote_participants)
            await worker.session.close("the operator")
            assert await worker.over() == "the session ended" and not place.sessions
            await until(lambda: not room.remote_participants)
            await room.disconnect()
            agent = await Agent().enter(sfu, "nonsense")
            worker = await enter("nonsense")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(agent.output.capture_frame(rtc.AudioFrame(bytes(200), 100, 1, 100)), 5)  # 100 Hz
            assert await worker.over() == "the worker failed" and not place.sessions
            await agent.room.disconnect()

    run(scene())
