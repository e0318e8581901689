"""Idempotency-Key: a repeated POST gives the first answer again and does nothing."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.responses import Response

from liveavatar.serving.problems import Conflict, Invalid

LONGEST_KEY = 128
REPLAYED = "Idempotent-Replayed"


@dataclass(slots=True)
class Kept:
    """One answer. asked: what it answered. answer: None while it is being made."""

    asked: bytes
    at: float
    answer: tuple[int, bytes, dict[str, str]] | None = None


class Idempotency:
    """Answers by tenant, route and key, for `seconds`, the oldest dropped beyond `most`. In memory: sessions, too, end with the process.

    Only successes are kept: what was refused may be tried again with the same key.
    """

    def __init__(self, seconds: float = 86_400.0, most: int = 10_000, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._most, self._clock = seconds, most, clock
        self._kept: OrderedDict[tuple[str, str, str], Kept] = OrderedDict()

    async def once(self, owner: str, route: str, key: str | None, asked: bytes, make: Callable[[], Awaitable[Response]]) -> Response:
        """The answer of `make`, or what it was the first time. asked: the request's content.

        Raises Conflict (kind idempotency) for the same key with another request, or while the first is under way.
        """
        if key is None:
            return await make()
        if not 0 < len(key) <= LONGEST_KEY:
            raise Invalid(f"Idempotency-Key: 1 to {LONGEST_KEY} characters")
        place, digest = (owner, route, key), await asyncio.to_thread(_digest, asked)
        self._forget()
        if (kept := self._kept.get(place)) is not None:
            return _again(kept, digest)
        self._kept[place] = kept = Kept(digest, self._clock())
        try:
            answer = await make()
            kept.answer = (answer.status_code, bytes(answer.body), dict(answer.headers))
            return answer
        finally:
            if kept.answer is None and self._kept.get(place) is kept:
                del self._kept[place]

    def _forget(self) -> None:
        old = self._clock() - self._seconds
        while self._kept and (len(self._kept) >= self._most or next(iter(self._kept.values())).at < old):
            self._kept.popitem(last=False)


def _digest(asked: bytes) -> bytes:
    """Of the 10 MB of a picture it takes 6 ms, and more without SHA instructions: not on the event loop, which keeps the media clocks."""
    return hashlib.sha256(asked).digest()


def _again(kept: Kept, asked: bytes) -> Response:
    if kept.asked != asked:
        raise Conflict("this Idempotency-Key was used for another request", kind="idempotency")
    if kept.answer is None:
        raise Conflict("the first request with this Idempotency-Key is still under way", kind="idempotency")
    status, body, headers = kept.answer
    return Response(body, status, {**headers, REPLAYED: "true"})
