"""Two hundred sessions come and go, each watched, spoken through and given up: nothing of them stays."""

import asyncio
import gc
import os
import threading
from pathlib import Path

import psutil
from api_server import running, settings

from liveavatar.serving.live import LiveSession

WARM, CYCLES = 100, 100  # caches and the list of those that ended fill in the first ones


def held() -> dict[str, int]:
    """What a session could leave behind in this process."""
    gc.collect()
    alive = sum(isinstance(thing, LiveSession) for thing in gc.get_objects())
    return {"sessions": alive, "tasks": len(asyncio.all_tasks()), "threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}


async def at_rest() -> dict[str, int]:
    """held() as soon as it no longer falls: the last outputs take their time to end."""
    last, now = None, held()
    while now != last:
        await asyncio.sleep(1)
        last, now = now, held()
    return now


async def cycle(server, number: int) -> None:
    made = await server.http.post("/v1/sessions", json={"avatar_id": "default"})
    assert made.status_code == 201, made.text
    home = "/v1/sessions/" + made.json()["id"]
    said = await server.http.post(home + "/audio?rate=16000", content=bytes(6400), headers={"content-type": "audio/pcm"})
    assert said.status_code == 202, said.text
    if number % 4 == 0:
        assert (await server.http.post(home + "/outputs", json={"kind": "hls"})).status_code == 201
    assert (await server.http.delete(home)).status_code == 204


async def cycles(folder: Path) -> None:
    limits = {"sessions_per_minute": 100_000, "requests_per_minute": 100_000}
    async with running(settings(folder, access=limits)) as server:
        process = psutil.Process()
        for number in range(WARM):
            await cycle(server, number)
        before, memory = await at_rest(), process.memory_info().rss
        for number in range(CYCLES):
            await cycle(server, number)
        after, grown = await at_rest(), process.memory_info().rss - memory
        assert server.studio.sessions == {} and all(after[name] <= before[name] + 4 for name in before), (before, after)
        assert grown < 25e6, grown


def as_server(rank: int, folder: Path) -> None:
    asyncio.run(cycles(folder))


def test_two_hundred_sessions_leave_nothing_behind(tmp_path, forker):
    """In a process of its own, whose memory no other test has used."""
    forker.run(as_server, tmp_path, world=1)
