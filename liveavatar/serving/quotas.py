"""How much of it (API-3): per server key, and per address for those who guess keys."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from liveavatar.serving.problems import RateLimited
from liveavatar.serving.settings import AccessConfig

FAILURES = 20  # wrong keys or tokens a minute from one address
AUDIO_UNIT = 0.01  # seconds of audio to one count
UPLOAD_UNIT = 1000  # bytes to one count
MESSAGES = 600  # a second on one socket: 20 ms packets at twelve times real time


class OverQuota(RateLimited):
    """what: requests, sessions, offers, audio, uploads or failures."""

    def __init__(self, what: str, detail: str, kind: str, again: int):
        super().__init__(detail, kind=kind, headers={"Retry-After": str(again)})
        self.what = what


class Quotas:
    """Counts of one server, in memory: a restart forgives. What refuses raises RateLimited with Retry-After."""

    def __init__(self, settings: AccessConfig):
        from limits.storage import MemoryStorage
        from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

        storage = MemoryStorage()
        self._moving, self._fixed = MovingWindowRateLimiter(storage), FixedWindowRateLimiter(storage)
        self.limit(settings)

    def limit(self, settings: AccessConfig) -> None:
        """From now on these limits; what a changed one has counted is forgiven."""
        from limits import RateLimitItemPerDay, RateLimitItemPerMinute

        self._items = {
            "requests": RateLimitItemPerMinute(settings.requests_per_minute),
            "sessions": RateLimitItemPerMinute(settings.sessions_per_minute),
            "offers": RateLimitItemPerMinute(settings.offers_per_minute),
            "failures": RateLimitItemPerMinute(FAILURES),
        }
        self._most = settings.sessions
        self._audio = RateLimitItemPerDay(math.ceil(settings.audio_seconds_per_day / AUDIO_UNIT))
        self._uploads = RateLimitItemPerDay(math.ceil(settings.upload_bytes_per_day / UPLOAD_UNIT))

    def count(self, what: str, key: str) -> None:
        """One more of "requests", "sessions" or "offers" by this server key."""
        if not self._moving.hit(self._items[what], what, key):
            raise self._refusal(self._moving, self._items[what], what, key, kind="rate", detail=f"too many {what} a minute")

    def may_speak(self, key: str) -> None:
        """Whether anything is left of today's audio."""
        if not self._fixed.test(self._audio, "audio", key):
            raise self._refusal(self._fixed, self._audio, "audio", key, kind="quota", detail="the audio of this key for today is used up")

    @contextmanager
    def speech(self, key: str, seconds: float) -> Iterator[None]:
        """Round the taking of so much audio, which counts unless that raises; the last of a day may go over. What has no sound (an end) passes."""
        if seconds > 0:
            self.may_speak(key)
        yield
        self._fixed.hit(self._audio, "audio", key, cost=math.ceil(seconds / AUDIO_UNIT))

    def may_upload(self, key: str) -> None:
        """Whether anything is left of today's uploads."""
        if not self._fixed.test(self._uploads, "uploads", key):
            raise self._refusal(self._fixed, self._uploads, "uploads", key, kind="quota", detail="the uploads of this key for today are used up")

    def uploaded(self, key: str, size: int) -> None:
        """So many bytes have come; the last upload of a day may go over."""
        self._fixed.hit(self._uploads, "uploads", key, cost=math.ceil(size / UPLOAD_UNIT))

    def failed(self, address: str) -> None:
        """A wrong key or token came from this address."""
        self._moving.hit(self._items["failures"], "failures", _network(address))

    def sessions(self, key: str, held: int) -> None:
        """Whether this key, which has `held` sessions, may open one more."""
        self.count("sessions", key)
        if held >= self._most:
            raise OverQuota("sessions", f"{self._most} sessions at once with this key", "quota", 5)

    def check_address(self, address: str) -> None:
        """Refuse an address that has failed too often, before anything is computed for it."""
        network = _network(address)
        if not self._moving.test(self._items["failures"], "failures", network):
            raise self._refusal(self._moving, self._items["failures"], "failures", network, kind="rate", detail="too many failed attempts")

    def _refusal(self, limiter, item, *names: str, kind: str, detail: str) -> OverQuota:
        again = max(1, math.ceil(limiter.get_window_stats(item, *names).reset_time - time.time()))
        return OverQuota(names[0], detail, kind, again)


def _network(address: str) -> str:
    """Whoever has one IPv6 address has 2^64 of them."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else str(found)


class MessageRate:
    """A leaky bucket of messages on one socket; `take` says whether this one may pass. No more than twice a second's worth at once."""

    def __init__(self, per_second: float = MESSAGES):
        self._rate, self._level, self._then = per_second, 0.0, 0.0

    def take(self, now: float) -> bool:
        """now: monotonic seconds."""
        self._level = max(0.0, self._level - (now - self._then) * self._rate) + 1
        self._then = now
        return self._level <= 2 * self._rate
