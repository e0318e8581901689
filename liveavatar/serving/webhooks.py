"""Events to a URL of the client's (API-6): signed, in order, tried five times, to checked addresses alone."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from liveavatar.serving.problems import Problem

TRIES, FIRST_WAIT, WAIT_FACTOR = 5, 1.0, 4.0  # seconds: 1, 4, 16, 64, each with jitter
WAITING = 256  # events of one target; beyond, the oldest goes
QUIET = frozenset({"stats"})  # too many of them to be posted

log = structlog.get_logger("liveavatar.webhooks")


class DeliveryFailed(Exception):
    """The target could not be reached or answered no 2xx."""


@dataclass(slots=True)
class Target:
    """Where one session's events go. secret: known to the client and us; never shown, never logged."""

    session: str
    url: str
    secret: str = field(repr=False)


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256 over timestamp, a dot and the body, in hex: what the client recomputes, and refuses old timestamps."""
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Webhook:
    """Delivers to one target, one event after the other. post: (url, body, headers) -> None, raising DeliveryFailed or Problem (ssrf).

    What is full, refused or failed five times is dropped and counted in `outcomes` (delivered, failed, dropped).
    """

    def __init__(self, target: Target, post: Callable[[str, bytes, dict[str, str]], Awaitable[None]], *,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep, clock: Callable[[], float] = time.time):  # fmt: skip
        self._target, self._post, self._sleep, self._clock = target, post, sleep, clock
        self._waiting: deque[dict] = deque()
        self._something, self._ending = asyncio.Event(), False
        self.outcomes = {"delivered": 0, "failed": 0, "dropped": 0}

    def put(self, event: dict) -> None:
        """event: {n, type, t, ...}; returns at once."""
        if event["type"] in QUIET:
            return
        if len(self._waiting) >= WAITING:
            self._waiting.popleft()
            self.outcomes["dropped"] += 1
        self._waiting.append(event)
        self._something.set()

    def end(self) -> None:
        """run() returns when what waits has been delivered."""
        self._ending = True
        self._something.set()

    async def run(self) -> None:
        """Deliver until end()."""
        while self._waiting or not self._ending:
            if not self._waiting:
                self._something.clear()
                await self._something.wait()
                continue
            outcome = await self._deliver(self._waiting.popleft())
            self.outcomes[outcome] += 1

    async def _deliver(self, event: dict) -> str:
        body = json.dumps({"session": self._target.session, **event}, separators=(",", ":")).encode()
        for attempt in range(TRIES):
            if attempt:
                await self._sleep(FIRST_WAIT * WAIT_FACTOR ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                await self._post(self._target.url, body, self._headers(event, body))
                return "delivered"
            except DeliveryFailed as error:
                log.info("webhook_failed", session=self._target.session, attempt=attempt + 1, reason=str(error))
            except Problem as problem:  # its address is not allowed (any more): no try helps
                log.warning("webhook_refused", session=self._target.session, reason=problem.kind)
                return "failed"
        return "failed"

    def _headers(self, event: dict, body: bytes) -> dict[str, str]:
        stamp = str(int(self._clock()))
        return {
            "Content-Type": "application/json",
            "LiveAvatar-Timestamp": stamp,
            "LiveAvatar-Event": f"{self._target.session}:{event['n']}",
            "LiveAvatar-Signature": f"v1={signature(self._target.secret, stamp, body)}",
        }


class Webhooks:
    """All targets of one server. check(url): raises a Problem for an address that is not allowed. Deliveries end with their session."""

    def __init__(self, post: Callable[[str, bytes, dict[str, str]], Awaitable[None]], check: Callable[[str], Awaitable[None]]):
        self._post, self.check = post, check
        self._tasks: set[asyncio.Task] = set()

    def follow(self, session, url: str, secret: str) -> None:
        """Post this session's events from its first one on."""
        hook = Webhook(Target(session.id, url, secret), self._post)
        for work in (_fill(hook, session), hook.run()):
            task = asyncio.get_running_loop().create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self, seconds: float) -> None:
        """Give what waits so many seconds, then forget it."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


async def _fill(hook: Webhook, session) -> None:
    async for event in session.events():
        hook.put({**event.data, "n": event.number, "type": event.name, "t": event.t})
    hook.end()
