"""Two hundred sessions come and go, each watched, spoken through and given up: nothing of them stays."""

import asyncio
import gc
import os
import threading

import psutil
from api_server import running, settings

from liveavatar.serving.live import LiveSession

WARM, CYCLES = 100, 100  # caches and the list of those that ended fill in the first ones


def held() -> dict[str, int]:
    """What a session could leave behind in this process."""
    gc.collect()
    alive = sum(isinstance(thing, LiveSession) for thing in gc.get_objects())
    return {"sessions": alive, "tasks": len(asyncio.all_tasks()), "threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}


def test_two_hundred_sessions_leave_nothing_behind(tmp_path):
    async def cycle(server, number: int):
        made = await server.http.post("/v1/sessions", json={"avatar_id": "default"})
        assert made.status_code == 201, made.text
        home = "/v1/sessions/" + made.json()["id"]
        said = await server.http.post(home + "/audio?rate=16000", content=bytes(6400), headers={"content-type": "audio/pcm"})
        assert said.status_code == 202, said.text
        if number % 4 == 0:
            assert (await server.http.post(home + "/outputs", json={"kind": "hls"})).status_code == 201
        assert (await server.http.delete(home)).status_code == 204

    async def story():
        limits = {"sessions_per_minute": 100_000, "requests_per_minute": 100_000}
        async with running(settings(tmp_path, access=limits)) as server:
            process = psutil.Process()
            for number in range(WARM):
                await cycle(server, number)
            await asyncio.sleep(0.5)
            before, memory = held(), process.memory_info().rss
            for number in range(CYCLES):
                await cycle(server, number)
            await asyncio.sleep(0.5)
            after, grown = held(), process.memory_info().rss - memory
            assert server.studio.sessions == {} and all(after[name] <= before[name] + 4 for name in before), (before, after)
            assert grown < 25e6, grown

    asyncio.run(story())
