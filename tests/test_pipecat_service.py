"""The Pipecat service in Pipecat's own harness, over a real session with the test card: PC-1, PC-2, PC-3."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

pytest.importorskip("pipecat")

from pipecat.frames.frames import (
    InterruptionFrame, MetricsFrame, OutputImageRawFrame, OutputTransportReadyFrame, TextFrame, TTSAudioRawFrame, TTSStartedFrame, TTSStoppedFrame,
)  # fmt: skip
from pipecat.pipeline.worker import PipelineParams
from pipecat.tests.utils import SleepFrame, run_test

from liveavatar.serving.packets import Mark, Tick
from liveavatar.serving.pipecat_service import InProcess, LiveAvatarVideoService
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.studio import Studio
from liveavatar.serving.testcard import read_code

RATE = 24_000


@asynccontextmanager
async def service(portrait):
    studio = Studio(ServeConfig(engine_kind="testcard"))
    await studio.start()
    try:
        yield studio, LiveAvatarVideoService(InProcess(lambda: studio.open(Role(avatar="a", picture=portrait))))
    finally:
        await studio.aclose()


def said(seconds: float, context: str = "c1", channels: int = 1) -> list[TTSAudioRawFrame]:
    tone = (8000 * np.sin(np.arange(round(RATE * seconds)) * 2 * np.pi * 440 / RATE)).astype("<i2").repeat(channels)
    step = RATE // 5 * channels
    return [TTSAudioRawFrame(audio=tone[at : at + step].tobytes(), sample_rate=RATE, num_channels=channels, context_id=context)
            for at in range(0, len(tone), step)]  # fmt: skip


def harness(portrait, frames, **settings):
    """(what left downstream, the studio's sessions at the end)."""
    async def go():
        async with service(portrait) as (studio, avatar):
            down, _ = await run_test(avatar, frames_to_send=[OutputTransportReadyFrame(), *frames], start_timeout=15.0, **settings)
            return down, len(studio.sessions)

    down, left = asyncio.run(asyncio.wait_for(go(), 60))
    return down, left


def kinds(frames, *classes):
    return [frame for frame in frames if isinstance(frame, classes)]


def test_sound_comes_back_whole_with_pictures_before_its_end_is_told(portrait):
    frames = [TTSStartedFrame(context_id="c1"), *said(0.5, channels=2), TTSStoppedFrame(context_id="c1"), TextFrame("on"), SleepFrame(0.9)]
    down, left = harness(portrait, frames, pipeline_params=PipelineParams(enable_metrics=True))
    sound = kinds(down, TTSAudioRawFrame)
    heard = np.concatenate([np.frombuffer(frame.audio, "<i2") for frame in sound])
    assert {(frame.sample_rate, frame.context_id) for frame in sound} == {(48_000, "c1")} and left == 0
    loud = np.flatnonzero(np.abs(heard.astype(int)) > 3000)
    assert abs((loud[-1] - loud[0]) / 48_000 - 0.5) < 0.01  # all of it, once
    at = down.index(kinds(down, TTSStoppedFrame)[0])
    assert len(kinds(down, TTSStoppedFrame)) == 1 and max(down.index(frame) for frame in sound) < at  # PC-2: held back
    assert down.index(kinds(down, TextFrame)[0]) < at  # everything else went through at once
    assert down.index(kinds(down, TTSStartedFrame)[0]) < down.index(sound[0])
    ttfb = [data for frame in kinds(down, MetricsFrame) for data in frame.data if type(data).__name__ == "TTFBMetricsData" and data.value]
    assert ttfb and 0 < ttfb[0].value < 2


def test_speaking_pictures_are_locked_to_their_sound_and_idle_ones_are_not(portrait):
    down, _ = harness(portrait, [SleepFrame(0.4), *said(0.4), TTSStoppedFrame(context_id="c1"), SleepFrame(0.8)])
    media = kinds(down, OutputImageRawFrame, TTSAudioRawFrame)
    speaking = [n for n, frame in enumerate(media) if isinstance(frame, TTSAudioRawFrame)]
    assert all(isinstance(media[n - 1], OutputImageRawFrame) and media[n - 1].sync_with_audio for n in speaking)  # PC-1
    idle = [frame for frame in kinds(down, OutputImageRawFrame) if not frame.sync_with_audio]
    assert idle and all(frame.size == (128, 128) and frame.format == "RGB" for frame in idle)
    numbers = [read_code(np.frombuffer(media[n - 1].image, np.uint8).reshape(128, 128, 3))[0] for n in speaking]
    assert numbers == sorted(numbers) and len(set(numbers)) > len(numbers) // 2  # in order; the playout may hold one while the next is made


def test_an_interruption_leaves_nothing_of_what_was_said(portrait):
    frames = [*said(3.0), TTSStoppedFrame(context_id="c1"), SleepFrame(0.7), InterruptionFrame(), SleepFrame(0.3),
              *said(0.2, "c2"), TTSStoppedFrame(context_id="c2"), SleepFrame(0.8)]  # fmt: skip
    down, _ = harness(portrait, frames)
    cut = down.index(kinds(down, InterruptionFrame)[0])
    assert {frame.context_id for frame in kinds(down[cut:], TTSAudioRawFrame, TTSStoppedFrame)} == {"c2"}
    assert 0 < len(kinds(down[:cut], TTSAudioRawFrame)) < 40 and not kinds(down[:cut], TTSStoppedFrame)


def test_the_end_of_the_pipeline_waits_for_the_last_word_and_no_picture_leaves_too_early(portrait):
    async def go():
        async with service(portrait) as (studio, avatar):
            down, _ = await run_test(avatar, frames_to_send=[SleepFrame(0.3), *said(0.6), TTSStoppedFrame(context_id="c1")], start_timeout=15.0)
            return down, avatar, studio

    down, _, studio = asyncio.run(asyncio.wait_for(go(), 60))
    assert not kinds(down, OutputImageRawFrame)  # nobody said that the transport is ready
    assert 14 <= len(kinds(down, TTSAudioRawFrame)) <= 17 and isinstance(down[-1], TTSStoppedFrame)
    assert not studio.sessions


def test_a_server_that_breaks_down_leaves_nobody_waiting():
    pytest.importorskip("aiortc")
    from websockets.asyncio.client import connect
    from websockets.asyncio.server import serve

    from liveavatar.serving.remote import AHEAD_SECONDS, RemoteAvatar, RemoteFailed

    async def go():
        async def breaks(socket):
            await socket.send('{"type": "stats", "edges": {"audio_in": {"depth": %f}}}' % (2 * AHEAD_SECONDS))
            await socket.recv()
            socket.transport.abort()

        async with serve(breaks, "127.0.0.1", 0) as server:
            avatar = RemoteAvatar("http://nowhere", "key")
            avatar._socket = await connect(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            listening = asyncio.create_task(avatar._listen())
            while not avatar._ahead:
                await asyncio.sleep(0.01)
            waiting = asyncio.create_task(avatar.say(np.zeros(160, np.int16), 16_000, 1, False))  # the server has enough: it waits
            await asyncio.sleep(0.01)
            await avatar._socket.send("break down")
            with pytest.raises(RemoteFailed):
                await waiting
            assert [tick async for tick in avatar.ticks()] == []
            await listening

    asyncio.run(asyncio.wait_for(go(), 10))


def test_what_a_stalled_pipeline_did_not_take_does_not_cost_the_end_of_a_segment():
    """The oldest ticks go; the marks they carried move on, else TTSStoppedFrame would be held for ever (PC-2)."""

    async def go():
        edge = InProcess(None)._edge
        for n in range(30):  # 0.4 s fit in
            marks = {3: (Mark("started", 1),), 9: (Mark("finished", 1),), 25: (Mark("started", 2),)}.get(n, ())
            edge.put(Tick(n, 0, "idle", np.zeros((2, 2, 3), np.uint8), np.zeros(1920, np.int16), marks=marks))
        edge.close()
        got = []
        while (tick := await edge.get()) is not None:
            got += [(tick.index, mark.name, mark.segment) for mark in tick.marks]
        return got, edge.drops

    assert asyncio.run(go()) == ([(20, "started", 1), (20, "finished", 1), (25, "started", 2)], 20)


def test_an_avatar_on_another_machine_is_the_same_service(tmp_path):
    pytest.importorskip("aiortc")
    from api_server import on_port, settings

    from liveavatar.serving.remote import RemoteAvatar, RemoteFailed

    async def go():
        async with on_port(settings(tmp_path)) as (server, port):
            with pytest.raises(RemoteFailed, match="status 401"):
                await RemoteAvatar(f"http://{port}", "wrong").open()
            avatar = LiveAvatarVideoService(RemoteAvatar(f"http://{port}", server.key))
            frames = [OutputTransportReadyFrame(), SleepFrame(1.0), *said(3.0), SleepFrame(1.2), InterruptionFrame(), SleepFrame(0.5),
                      TTSStartedFrame(context_id="c2"), *said(0.6, "c2"), TTSStoppedFrame(context_id="c2")]  # fmt: skip
            down, _ = await run_test(avatar, frames_to_send=frames, start_timeout=15.0)
            return down, len(server.studio.sessions)

    down, left = asyncio.run(asyncio.wait_for(go(), 90))
    cut = down.index(kinds(down, InterruptionFrame)[0])
    before, after = (np.concatenate([np.frombuffer(f.audio, "<i2") for f in kinds(part, TTSAudioRawFrame)]) for part in (down[:cut], down[cut:]))
    assert {frame.context_id for frame in kinds(down[cut:], TTSAudioRawFrame)} == {"c2"} and left == 0
    assert 0.2 < len(before) / 48_000 < 2.5  # of 3 s, cut
    loud = np.flatnonzero(np.abs(after.astype(int)) > 2000)
    assert abs((loud[-1] - loud[0]) / 48_000 - 0.6) < 0.15  # whole, through Opus
    assert isinstance(down[-1], TTSStoppedFrame) and len(kinds(down, OutputImageRawFrame)) > 40
