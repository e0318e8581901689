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
