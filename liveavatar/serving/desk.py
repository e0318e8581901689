"""The front desk: opens sessions for whoever may, knows whose each is, and ends those nobody uses (API-1, API-2)."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import structlog

from liveavatar.core import LiveAvatarError
from liveavatar.serving.access import Principal
from liveavatar.serving.answers import as_problem
from liveavatar.serving.feeder import Feeder
from liveavatar.serving.happenings import Event
from liveavatar.serving.live import LiveSession
from liveavatar.serving.moderation import Moderation
from liveavatar.serving.problems import Capacity, Conflict, Invalid, NotFound, Problem, RateLimited, Unprocessable
from liveavatar.serving.quotas import Quotas
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.studio import Studio
from liveavatar.telemetry import now as monotonic

Usable = Callable[[str, str, Callable[[str], bool]], Path]
OVER = ("closing", "closed", "failed")
REMEMBERED = 200  # sessions that are over and can still be asked about
EPOCHS_AHEAD = 1000  # a client may be
TICK_SECONDS = 0.5  # between two looks at all leases

log = structlog.get_logger("liveavatar.sessions")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A session somebody wants. idle_seconds, length_seconds: None: the server's; 0 never comes from a client. endless: a channel's,
    which neither of them ends (API-2)."""

    avatar: str
    mode: str | None = None
    profile: str | None = None
    prompt: str | None = None
    emotion: str = ""
    idle_seconds: float | None = None
    length_seconds: float | None = None
    endless: bool = False
    metadata: dict[str, str] = field(default_factory=dict)


def refusal(error: LiveAvatarError) -> str:
    """Why a session was not opened: a label of sessions_rejected_total."""
    kind = as_problem(error).kind
    if kind.startswith("consent"):
        return "consent"
    return kind if kind in ("capacity", "draining", "engine", "quota", "rate") else "invalid"


class Ended:
    """What can still be asked of a session that is over. It holds nothing of the session itself, which is gone."""

    def __init__(self, session: LiveSession):
        self.id, self.avatar, self.state, self.reason, self.epoch = session.id, session.avatar, session.state, session.reason, session.epoch
        self.width, self.height, self._happenings, self._stats = session.width, session.height, session.happenings, session.stats()

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        """As LiveSession's: whoever was away reads the last ones."""
        return self._happenings.read(after)

    def stats(self) -> dict:
        """The last ones."""
        return self._stats


@dataclass(eq=False, kw_only=True)
class Lease:
    """A session that somebody has. opened, seen: clock seconds. created: Unix seconds.

    holders: of what keeps it from being idle (an agent's room). sockets: that are open; streams hold it with what they
    say, as a client that hangs says nothing. segments: number of the next one. tasks: end with it.
    """

    session: LiveSession | Ended
    owner: str
    key: str
    wish: Wish
    mode: str
    opened: float
    seen: float
    created: float
    idle_seconds: float
    length_seconds: float
    feeder: Feeder | None = None
    holders: int = 0
    sockets: int = 0
    segments: int = 0
    reason: str | None = None
    tasks: list[asyncio.Task] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.session.id

    @property
    def over(self) -> bool:
        return self.session.state in OVER

    def segment(self, number: int | None) -> int:
        """The number of a segment: the client's, or the next one."""
        number = self.segments if number is None else number
        self.segments = max(self.segments, number + 1)
        return number

    def epoch(self, number: int | None) -> int:
        """The epoch speech is for: the client's, or the one that runs. Raises Invalid for one that is far off: it would be the last."""
        now = self.session.epoch
        if number is not None and number > now + EPOCHS_AHEAD:
            raise Invalid(f"epoch {number}: the session is at {now}")
        return now if number is None else number

    def need_running(self) -> None:
        """Raise Conflict for a session that takes nothing any more."""
        if self.over:
            raise Conflict(f"the session is {self.session.state}")

    def need_room(self, most: int) -> None:
        """Raise RateLimited where so many streams are open already."""
        if self.sockets >= most:
            raise RateLimited("too many streams of this session", kind="quota")


class Desk:
    """All leases of one server; used from its event loop alone.

    told(name, data): of each session that begins or ends. usable(avatar id, mode, whether it sees an owner): the portrait, or
    a Problem for an avatar that may not be used.
    """

    def __init__(self, studio: Studio, settings: ServeConfig, quotas: Quotas, usable: Usable, moderation: Moderation, *,
                 told: Callable[[str, dict], None] = lambda name, data: None, clock: Callable[[], float] = monotonic,
                 wall: Callable[[], float] = time.time, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep):  # fmt: skip
        self.studio, self.settings, self.quotas, self._usable, self._told = studio, settings, quotas, usable, told
        self._moderation = moderation
        self._clock, self._wall, self._sleep = clock, wall, sleep
        self._leases: dict[str, Lease] = {}
        self._past: OrderedDict[str, Lease] = OrderedDict()
        self._building: Counter[str] = Counter()  # sessions of a key that are being opened: they count already
        self._started = False

    # ------------------------------------------------------------ whose is it

    def lease(self, principal: Principal, session_id: str, *scopes: str) -> Lease:
        """The lease of a session that runs or ran. Raises NotFound, also for somebody else's, and Forbidden without one of the scopes."""
        lease = self._leases.get(session_id) or self._past.get(session_id)
        if lease is None or not principal.sees(lease.owner, session_id):
            raise NotFound("no such session")
        if scopes:
            principal.need(*scopes)
        return lease

    def running(self, principal: Principal, session_id: str, *scopes: str) -> Lease:
        """As `lease`, and it still takes something, else Conflict. Whoever asks keeps it from being idle."""
        lease = self.lease(principal, session_id, *scopes)
        lease.need_running()
        self.touch(lease)
        return lease

    def leases(self, principal: Principal) -> list[Lease]:
        """Those that run and that this one may see."""
        return [lease for lease in self._leases.values() if principal.sees(lease.owner, lease.id)]

    def using(self, avatar_id: str) -> list[Lease]:
        """Sessions that show this avatar."""
        return [lease for lease in self._leases.values() if lease.wish.avatar == avatar_id]

    # ------------------------------------------------------------ open and close

    async def open(self, principal: Principal, wish: Wish) -> Lease:
        """A new session of the asker's. Slots are reserved before anything is built; what fails leaves nothing behind.

        Raises Forbidden, NotFound (avatar), RateLimited (quota, rate), Capacity, InputError (prompt), and what Moderation.check raises.
        """
        try:
            return await self._open(principal, wish)
        except LiveAvatarError as error:
            self.studio.metrics.session_rejected(refusal(error))
            raise

    async def _open(self, principal: Principal, wish: Wish) -> Lease:
        principal.need_key()
        if self.studio.draining:
            raise Capacity("the server is shutting down", kind="draining", retry_after=30)
        config = self._settings_of(wish.profile)
        mode = wish.mode or config.mode
        role = Role(avatar=wish.avatar, picture=self.portrait(principal, wish.avatar, mode), prompt=wish.prompt or "", owner=principal.owner,
                    metadata=wish.metadata)  # fmt: skip
        self.quotas.sessions(principal.key, self._held(principal.key))
        self._building[principal.key] += 1
        try:
            if wish.prompt:
                await self._moderation.check("prompt", wish.prompt, **self._judged(principal, wish, mode))
            session = await self.studio.open(role, mode=mode, config=config)
        finally:
            self._building[principal.key] -= 1
        return self._admit(principal, wish, session)

    def _judged(self, principal: Principal, wish: Wish, mode: str) -> dict:
        """How strictly, and for whom, what a session says is judged."""
        return {"closed": wish.endless or mode == "livestream", "owner": principal.owner, "prefix": principal.key, "avatar": wish.avatar}

    def _settings_of(self, profile: str | None) -> ServeConfig:
        """Those of sessions with this profile. Raises Unprocessable."""
        if profile is not None and profile not in self.settings.profiles:
            raise Unprocessable(f"no profile {profile!r}: /v1/server names those there are", kind="profile")
        return self.settings if profile is None else self.settings.under(profile)

    def portrait(self, principal: Principal, avatar_id: str, mode: str | None) -> Path:
        """The picture of an avatar this one may show in this mode. Raises NotFound, Forbidden (consent_...)."""
        return self._usable(avatar_id, mode or self.settings.mode, lambda owner: principal.sees(owner, principal.session))

    def _revoked(self, lease: Lease) -> bool:
        """Whether the face may not be shown any more: consents expire, and one may be revoked while its session is being opened."""
        try:
            self._usable(lease.wish.avatar, lease.mode, lambda owner: True)
        except Problem:
            return True
        return False

    def _held(self, key: str) -> int:
        return self._building[key] + sum(lease.key == key for lease in self._leases.values())

    def _admit(self, principal: Principal, wish: Wish, session: LiveSession) -> Lease:
        limits, now = self.settings.sessions, self._clock()
        idle, length = (min(wished or most, most) for wished, most in ((wish.idle_seconds, limits.idle_seconds),
                                                                       (wish.length_seconds, limits.length_seconds)))  # fmt: skip
        if wish.endless:
            idle = length = math.inf
        lease = Lease(session=session, owner=principal.owner, key=principal.key, wish=wish, mode=session.mode,
                      opened=now, seen=now, created=self._wall(), idle_seconds=idle, length_seconds=length)  # fmt: skip

        def failed(error: Exception) -> None:
            problem = as_problem(error)
            log.warning("speech_failed", session=session.id, kind=problem.kind)
            session.happenings.add("error", code=problem.kind, status=problem.status, detail=problem.detail, retryable=problem.status >= 500)

        lease.feeder, session.spend = Feeder(session, failed, errors=(LiveAvatarError,)), partial(self.quotas.speech, lease.key)
        session.moderate = partial(self._moderation.check, session=session.id, **self._judged(principal, wish, session.mode))
        self._leases[session.id] = lease
        self.spawn(lease, lease.feeder.run())
        facts = {"session": session.id, "owner": lease.owner, "prefix": lease.key, "avatar": wish.avatar, "mode": lease.mode}
        log.info("session_opened", **facts)
        self._told("session.opened", facts)
        return lease

    def spawn(self, lease: Lease, work) -> asyncio.Task:
        """A task that ends with the session."""
        task = asyncio.get_running_loop().create_task(work)
        lease.tasks.append(task)
        return task

    def change(self, lease: Lease, **changes) -> None:
        """What its owner wants differently."""
        lease.wish = replace(lease.wish, **changes)

    async def close(self, lease: Lease, reason: str = "closed") -> None:
        """End it; harmless when it is over. reason: closed, idle, length, drain, failed, consent."""
        if self._leases.pop(lease.id, None) is None:
            return
        lease.reason = lease.reason or reason
        self._past[lease.id] = lease
        while len(self._past) > REMEMBERED:
            self._past.popitem(last=False)
        await lease.session.close(reason)
        for task in lease.tasks:
            task.cancel()
        lease.session, lease.feeder = Ended(lease.session), None
        lease.tasks.clear()
        facts = {"session": lease.id, "owner": lease.owner, "avatar": lease.wish.avatar, "reason": lease.reason,
                 "seconds": round(self._clock() - lease.opened, 1)}  # fmt: skip
        log.info("session_ended", **facts)
        self._told("session.ended", facts)

    # ------------------------------------------------------------ leases

    def touch(self, lease: Lease) -> None:
        """Somebody is there."""
        lease.seen = self._clock()

    def ends(self, lease: Lease) -> tuple[float, float]:
        """Unix seconds at which it ends anyway, and at which it ends if nobody comes."""
        to_wall = self._wall() - self._clock()
        return lease.opened + lease.length_seconds + to_wall, lease.seen + lease.idle_seconds + to_wall

    async def tick(self) -> None:
        """Look at every lease once."""
        now = self._clock()
        for lease in tuple(self._leases.values()):
            if lease.id not in self._leases:  # ended by somebody else while we waited for another one's end
                continue
            if lease.holders or lease.feeder.busy or lease.session.speech.waiting > 0:
                lease.seen = now
            lease.seen = max(lease.seen, lease.session.used_at)  # somebody watches, or pushed speech
            if lease.over:
                await self.close(lease, "failed" if lease.session.state == "failed" else "closed")
            elif self._revoked(lease):
                await self.close(lease, "consent")
            elif now - lease.opened >= lease.length_seconds:
                await self.close(lease, "length")
            elif now - lease.seen >= lease.idle_seconds:
                await self.close(lease, "idle")

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await self._sleep(TICK_SECONDS)
            await self.tick()

    @property
    def started(self) -> bool:
        """The chain was up at least once."""
        self._started = self._started or self.studio.alive
        return self._started

    # ------------------------------------------------------------ drain

    def refuse(self) -> None:
        """From now on no session is opened (17.2)."""
        if not self.studio.draining:
            self.studio.draining = True
            log.info("draining", sessions=len(self._leases))

    async def drain(self) -> None:
        """Refuse new sessions, wait for the others as long as sessions.drain_seconds, close what is left."""
        self.refuse()
        end = self._clock() + self.settings.sessions.drain_seconds
        while self._leases and self._clock() < end:
            await self._sleep(TICK_SECONDS / 2)
        await self.close_all("drain")

    async def close_all(self, reason: str) -> None:
        """Now."""
        for lease in tuple(self._leases.values()):
            await self.close(lease, reason)
