"""Tasks that nobody waits for until the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


class Errands:
    """Holds what it starts until that is done: the event loop alone would let it be collected."""

    def __init__(self):
        self._tasks = set[asyncio.Task]()

    def start(self, work: Coroutine) -> asyncio.Task:
        """Begin at once."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end(self, seconds: float) -> None:
        """Give all of them so many seconds, then cancel what is left. May be called often."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
