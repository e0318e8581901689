"""Encode once, fan out: how often, how large, and who can follow (BP-2 and 7.3 of serving.md)."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")

from test_live import Viewer

from liveavatar.serving.broadcast import Broadcast
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.packets import H264, TICK_SAMPLES, Tick
from liveavatar.serving.settings import MediaConfig

SIDE = 384


def named(name: str) -> Viewer:
    viewer = Viewer(H264)
    viewer.name = name
    return viewer


def sizes(packets) -> list[int]:
    """Width of every picture, as a decoder that began with the first sees it."""
    decoder = av.CodecContext.create("h264", "r")
    return [frame.width for packet in (*packets, None) for frame in decoder.decode(packet and av.Packet(packet.data))]


def test_a_newcomer_looks_at_the_last_keyframe_until_the_next_may_come():
    """Section 20: first picture < 0.5 s although keyframes come at most twice a second (7.3); never one of before an interruption."""
    greeted = {}

    async def run():
        with ThreadPoolExecutor(1) as pool:
            sending = Broadcast(64, 64, MediaConfig(preset="ultrafast", keyframe_seconds=10.0), pool, lambda: now, Metrics(version="1"))

            async def send(ticks: range, epoch: int = 0) -> None:
                nonlocal now
                for n in ticks:
                    now = n / 25
                    await sending.send(Tick(n, epoch, "idle", np.full((64, 64, 3), 2 * n, np.uint8), np.zeros(TICK_SAMPLES, np.int16)))

            def joins(name: str):
                greeted[name] = []
                viewer = named(name)
                viewer.greet = greeted[name].append
                sending.add(viewer)
                return viewer

            first = joins("webrtc:1")
            await send(range(4))
            second, _ = joins("webrtc:2"), joins("record:1")
            await send(range(4, 14))
            await send(range(14, 16), epoch=1)
            joins("webrtc:3")  # the last keyframe, of tick 13, is of before the interruption
            await send(range(16, 40), epoch=1)
            joins("webrtc:4")  # a keyframe comes with the next tick
            return first, second

    now = 0.0
    first, second = asyncio.run(run())
    (still,) = greeted["webrtc:2"]
    assert (still.pts, still.made, still.keyframe, still.data) == (3 * 3600, 3 / 25, True, first.items[0].data)
    assert [name for name, stills in greeted.items() if stills] == ["webrtc:2"]
    assert next(p.pts for p in second.items if p.keyframe) // 3600 == 13  # as soon as the pause is over
    assert sizes([still, *(p for p in second.items if p.pts >= 13 * 3600)])[:2] == [64, 64]


def test_fewer_and_smaller_pictures_for_browsers_and_whole_ones_as_soon_as_somebody_cannot_follow():
    async def run():
        with ThreadPoolExecutor(1) as pool:
            sending = Broadcast(SIDE, SIDE, MediaConfig(preset="ultrafast"), pool, lambda: 0.0, Metrics(version="1"))
            sending.add(browser := named("webrtc:1"))
            index = 0

            async def send(count: int) -> list:
                nonlocal index
                before = len(browser.items)
                for index in range(index, index + count):
                    picture = np.full((SIDE, SIDE, 3), index, np.uint8)
                    await sending.send(Tick(index, 0, "idle", picture, np.zeros(TICK_SAMPLES, np.int16)))
                index += 1
                return browser.items[before:]

            whole = await send(4)
            sending.every = 2
            fewer = await send(4)
            sending.small = True
            small = await send(4)
            sending.add(named("record:1"))
            again = await send(4)
            return whole, fewer, small, again

    whole, fewer, small, again = asyncio.run(run())
    assert [p.pts // 3600 for p in whole + fewer] == [0, 1, 2, 3, 4, 6] and [p.duration for p in fewer] == [7200, 7200]
    assert small[0].keyframe and again[0].keyframe and not any(p.keyframe for p in fewer)
    assert sizes(whole + fewer + small + again) == [SIDE] * 6 + [SIDE // 2] * 2 + [SIDE] * 2
