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

from liveavatar.serving.background import Background
from liveavatar.serving.packets import Level
from liveavatar.serving.problems import Problem, TooLarge, Unprocessable
from liveavatar.serving.ssrf import Unresolved, check, request

TRIES, FIRST_WAIT, WAIT_FACTOR = 5, 1.0, 4.0  # seconds: 1, 4, 16, 64, each with jitter
TRY_SECONDS = 10.0  # for one answer
SCHEMES = ("https", "http")
WAITING = 256  # events of one target; beyond, the oldest goes
QUIET = frozenset({"stats"})  # too many of them to be posted

log = structlog.get_logger("liveavatar.webhooks")


class DeliveryFailed(Exception):
    """The target could not be reached or answered no 2xx."""


@dataclass(slots=True)
class Target:
    """Where the events of a session or channel go. secret: known to the client and us; never shown, never logged.

    about: stands in every body: {"session": id} or {"channel": name}. id: with an event's number what is different for each event.
    """

    id: str
    url: str
    secret: str = field(repr=False)
    about: dict[str, str]


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256 over timestamp, a dot and the body, in hex: what the client recomputes, and refuses old timestamps."""
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Webhook:
    """Delivers to one target, one event after the other. post: (url, body, headers) -> None, raising DeliveryFailed or Problem (ssrf).

    Refused, or failed five times: it is dropped. Too many that wait: the oldest goes, counted in `drops`. count(outcome): of
    each delivery: delivered, retried, failed, refused.
    """

    def __init__(self, target: Target, post: Callable[[str, bytes, dict[str, str]], Awaitable[None]], *,
                 count: Callable[[str], None] = lambda outcome: None, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
                 clock: Callable[[], float] = time.time):  # fmt: skip
        self._target, self._post, self._count, self._sleep, self._clock = target, post, count, sleep, clock
        self._waiting: deque[dict] = deque()
        self._something, self._ending = asyncio.Event(), False
        self.drops = 0

    def put(self, event: dict) -> None:
        """event: {n, type, t, ...}; returns at once."""
        if event["type"] in QUIET:
            return
        if len(self._waiting) >= WAITING:
            self._waiting.popleft()
            self.drops += 1
        self._waiting.append(event)
        self._something.set()

    def level(self) -> Level:
        """Events that wait."""
        return Level(len(self._waiting), WAITING, self.drops)

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
            self._count(await self._deliver(self._waiting.popleft()))

    async def _deliver(self, event: dict) -> str:
        body = json.dumps({**self._target.about, **event}, separators=(",", ":")).encode()
        for attempt in range(TRIES):
            if attempt:
                self._count("retried")
                await self._sleep(FIRST_WAIT * WAIT_FACTOR ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                await self._post(self._target.url, body, self._headers(event, body))
                return "delivered"
            except DeliveryFailed as error:
                log.info("webhook_failed", **self._target.about, attempt=attempt + 1, reason=str(error))
            except Problem as problem:  # its address is not allowed (any more): no try helps
                log.warning("webhook_refused", **self._target.about, reason=problem.kind)
                return "refused"
        return "failed"

    def _headers(self, event: dict, body: bytes) -> dict[str, str]:
        stamp = str(int(self._clock()))
        return {
            "Content-Type": "application/json",
            "LiveAvatar-Timestamp": stamp,
            "LiveAvatar-Event": f"{self._target.id}:{event['n']}",
            "LiveAvatar-Signature": f"v1={signature(self._target.secret, stamp, body)}",
        }


class Webhooks:
    """All targets of one server; deliveries end with their session or channel. private: networks that are allowed although not public.

    count(outcome): told of each delivery: delivered, retried, failed, refused. edge: watches a queue (Metrics.edge).
    """

    def __init__(self, private: tuple[str, ...] = (), count: Callable[[str], None] = lambda outcome: None,
                 edge: Callable[[str, Callable[[], Level]], Callable[[], None]] = lambda name, read: lambda: None):  # fmt: skip
        self._private, self._count, self._edge, self._deliveries = private, count, edge, Background()

    def reload(self, private: tuple[str, ...]) -> None:
        """Other networks that are allowed, from the next try on."""
        self._private = private

    async def check(self, url: str) -> None:
        """Raises Invalid, Forbidden (ssrf) for a URL that nothing may be posted to."""
        await check(url, SCHEMES, private=self._private)

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> None:
        """One try, to the address that was checked, without following anybody anywhere."""
        try:
            status, _ = await request("POST", url, body=body, headers=headers, seconds=TRY_SECONDS, private=self._private)
        except (TooLarge, Unprocessable, Unresolved) as problem:
            raise DeliveryFailed(problem.detail) from None
        if not 200 <= status < 300:
            raise DeliveryFailed(f"status {status}")

    def follow(self, session, url: str, secret: str) -> None:
        """Post this session's events from its first one on."""
        self._deliveries.spawn(_fill(self.open(Target(session.id, url, secret, {"session": session.id})), session))

    def open(self, target: Target) -> Webhook:
        """One that delivers what is put into it until its end()."""
        hook = Webhook(target, self._post, count=self._count)
        unwatch = self._edge("webhooks", hook.level)
        self._deliveries.spawn(hook.run()).add_done_callback(lambda task: unwatch())
        return hook

    async def close(self, seconds: float) -> None:
        """Give what waits so many seconds, then forget it."""
        await self._deliveries.close(seconds)


async def _fill(hook: Webhook, session) -> None:
    async for event in session.events():
        hook.put({**event.data, "n": event.number, "type": event.name, "t": event.t})
    hook.end()
