"""A channel on air: a session that is opened again whenever it ends, with its outputs, saying what is due and moving in between.

The chain may die under a session without ending it (studio.py, live.py), and an output may lose its far end (egress.py): both
come back by themselves. What is left to do here is a session that fails, a server that comes up again, an output that was
refused, and an entry that nobody could say: tried again, with pauses that grow (EGR-2), and told in `troubles`.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
import structlog

from liveavatar.core import ConfigError, LiveAvatarError
from liveavatar.serving.access import ANYBODY, CONTROL, Principal
from liveavatar.serving.channel_store import ChannelStore
from liveavatar.serving.channels import Channel, Entry, Hook, SoundFile, Turn, begun, due, ended
from liveavatar.serving.desk import Desk, Lease, Wish
from liveavatar.serving.egress import STEADY_SECONDS, longest_wait
from liveavatar.serving.feeder import Utterance
from liveavatar.serving.live import LiveSession
from liveavatar.serving.outputs import Output, Outputs, Wanted
from liveavatar.serving.problems import Capacity, Problem, Unprocessable
from liveavatar.serving.quotas import Quotas
from liveavatar.serving.recorded import pieces
from liveavatar.serving.targets import Target
from liveavatar.serving.voices import Sound, Speak, VoiceFailed
from liveavatar.serving.webhooks import Target as Receiver
from liveavatar.serving.webhooks import Webhook, Webhooks
from liveavatar.telemetry import now as monotonic

LOOK_SECONDS = 0.25  # between two looks at what is due

log = structlog.get_logger("liveavatar.channels")


@dataclass(frozen=True, kw_only=True)
class Crew:
    """What every channel works with. speak: None: the server has no voice. clock: for pauses; wall: Unix seconds, for the schedule."""

    desk: Desk
    outputs: Outputs
    quotas: Quotas
    store: ChannelStore
    speak: Speak | None
    webhooks: Webhooks
    clock: Callable[[], float] = monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    rng: random.Random = random.Random()


def tenant(channel: Channel) -> Principal:
    """As whom a channel opens its sessions, for as long as it stands: its key may be revoked meanwhile, which is how keys are renewed."""
    return Principal(owner=channel.owner, scopes=frozenset({CONTROL}), key=channel.key)


def no_voice() -> Unprocessable:
    """The refusal of text where no voice says it."""
    return Unprocessable("this server has no voice: see speech.voice", kind="voice")


class Runner:
    """Keeps one channel on air from run() to end(), or until the server drains: then, when no other session is left, the entry on air is
    heard to its end (17.2).

    lease: of its session; None: it is not on air. entry: the name of what is being said. sessions: how many it has had.
    troubles: what went wrong last, by "session", "entry", or the name of an output that was refused.
    """

    def __init__(self, crew: Crew, channel_id: str):
        self._crew, self._id = crew, channel_id
        self.progress = crew.store.progress(channel_id)
        self.lease: Lease | None = None
        self.entry: str | None = None
        self.sessions = 0
        self.troubles: dict[str, str] = {}
        self._live: LiveSession | None = None  # the lease lets go of it when it is over
        self._outputs: dict[str, tuple[Wanted, Output]] = {}
        self._failures: Counter[str] = Counter()  # in a row, of sessions and of entries
        self._opened, self._rested = 0.0, 0.0  # when the session was, when the last entry had been said
        self._ending = False
        self._hook: tuple[Hook | None, Webhook | None] = (None, None)  # as its owner wants it, and what delivers
        self._run, self._told = f"{channel_id}-{secrets.token_hex(4)}", 0  # numbers of events begin anew with each run

    @property
    def channel(self) -> Channel:
        """As its owner wants it now."""
        return self._crew.store.now(self._id)

    def output(self, name: str) -> Output | None:
        """The one of this name, where it runs."""
        return self._outputs[name][1] if name in self._outputs else None

    @property
    def _leaving(self) -> bool:
        """Whoever takes over from a server that drains must wait until it is gone: so channels leave last."""
        desk = self._crew.desk
        last = self.lease is None or all(lease.wish.endless for lease in desk.leases(ANYBODY))
        return self._ending or desk.studio.draining and last

    # ------------------------------------------------------------ sessions

    async def run(self) -> None:
        """One session after the other."""
        try:
            while not self._leaving:
                if self._crew.desk.studio.alive:
                    await self._session()
                await self._crew.sleep(LOOK_SECONDS)
        finally:
            self._hooked(None)

    async def end(self) -> None:
        """Off air; run() returns."""
        self._ending = True
        if self.lease is not None:
            await self._crew.desk.close(self.lease)  # wakes whoever waits for what it says

    async def switch(self, entry: str | None, cut: bool) -> None:
        """entry: is said next. cut: what is being said ends now."""
        self.progress = replace(self.progress, jump=entry or self.progress.jump)
        if cut and self.entry is not None and self._live is not None:
            await self._live.interrupt()

    async def _session(self) -> None:
        """From its opening to its end, and the pause after one that nobody wanted to end."""
        try:
            await self._open()
            await self._programme()
            reason = self._live.reason
        except LiveAvatarError as error:
            reason = str(error)
        finally:
            await self._leave()
        if not self._leaving:
            self._trouble("session", reason)
            await self._pause("session")

    async def _open(self) -> None:
        channel, desk = self.channel, self._crew.desk
        wish = Wish(avatar=channel.avatar, mode=channel.mode, prompt=channel.prompt or desk.settings.engine.prompt, endless=True,
                    metadata={"channel": channel.name})  # fmt: skip
        self.lease = await desk.open(tenant(channel), wish)
        self._live, self.sessions = self.lease.session, self.sessions + 1
        self._opened = self._rested = self._crew.clock()
        self._tell("channel.on_air", session=self.lease.id)
        desk.spawn(self.lease, self._keep_outputs(self.lease))
        desk.spawn(self.lease, self._pass_on(self.lease.id, self._live))

    async def _leave(self) -> None:
        lease, self.lease, live, self._live = self.lease, None, self._live, None
        self._outputs = {}
        if lease is not None:
            if self._crew.clock() - self._opened > STEADY_SECONDS:
                self._failures["session"] = 0
            await self._crew.desk.close(lease, "failed" if live.state == "failed" else "closed")
            self._tell("channel.off_air", session=lease.id, reason=lease.reason)

    def _trouble(self, what: str, reason: str) -> None:
        self._failures[what] += 1
        self.troubles[what] = reason
        self._tell("channel.trouble", what=what, reason=reason, failures=self._failures[what])
        log.warning("channel_trouble", channel=self._id, what=what, reason=reason, failures=self._failures[what])

    async def _pause(self, what: str) -> None:
        """The longer, the more failures there were."""
        crew = self._crew
        until = crew.clock() + crew.rng.uniform(0, longest_wait(crew.desk.settings.outputs, self._failures[what]))
        while not self._leaving and crew.clock() < until:
            await crew.sleep(LOOK_SECONDS)

    # ------------------------------------------------------------ what is said

    @property
    def _over(self) -> bool:
        return self._leaving or self.lease.over

    async def _programme(self) -> None:
        while not self._over:
            channel = self.channel
            turn = due(channel.schedule, self.progress, self._crew.wall())
            if turn is not None:
                await self._take(channel, turn)
                continue
            self._live.resting = "schedule"
            await self._dress(channel.filler.prompt(self._crew.clock() - self._rested), channel)
            await self._crew.sleep(LOOK_SECONDS)

    async def _take(self, channel: Channel, turn: Turn) -> None:
        """An entry's turn. If it cannot be said there is a pause before the next one's: dead air, of which operators are told."""
        self.entry, seen, epoch = turn.entry.name, self._live.happenings.last, self._live.epoch
        self._tell("channel.entry", entry=turn.entry.name)
        self._live.resting = "degraded" if self._failures["entry"] else None
        self.progress = begun(channel.schedule, self.progress, turn)
        await self._keep()
        try:
            await self._dress(turn.entry.prompt, channel)
            await self._say(channel, turn.entry, seen, epoch)
            self._failures["entry"] = 0
        except Problem as problem:
            if not self._over:
                self._trouble("entry", f"{turn.entry.name}: {problem}")
        finally:
            self.entry, self._rested = None, self._crew.clock()
            self.progress = ended(channel.schedule, self.progress, self._crew.wall())
        if self._failures["entry"]:
            self._live.resting = "degraded"
            await self._pause("entry")

    async def _dress(self, prompt: str | None, channel: Channel) -> None:
        """Another prompt from the next block on, if it is another."""
        prompt = prompt or channel.prompt or self._crew.desk.settings.engine.prompt
        if prompt != self._live.role.prompt:
            await self._live.set_prompt(prompt)

    async def _say(self, channel: Channel, entry: Entry, seen: int, epoch: int) -> None:
        """Returns when it was heard, or cut since event `seen`, or the session is over. Raises Problem where there was nothing to hear."""
        self._crew.quotas.may_speak(channel.key)
        chunks, lease, live = await self._chunks(channel, entry), self.lease, self._live
        lease.need_running()
        segment = lease.segment(None)
        lease.feeder.put(Utterance(chunks, segment, epoch))
        async with aclosing(live.events(seen)) as events:
            async for event in events:
                if event.name == "epoch":
                    return
                if event.name == "speak.finished" and event.data["segment"] == segment:
                    if not event.data["position_ms"]:
                        raise VoiceFailed("it made no sound")
                    return

    async def _chunks(self, channel: Channel, entry: Entry) -> AsyncGenerator[Sound]:
        if entry.sound is not None:
            return pieces(*await asyncio.to_thread(self._crew.store.sound, channel.id, entry.sound))
        if self._crew.speak is None:
            raise no_voice()
        await self._live.moderate("speech", entry.text)
        return self._crew.speak(entry.text)

    async def _keep(self) -> None:
        """On the disk before it is said: nothing is said twice because of a crash. A full disk takes nobody off the air."""
        try:
            await asyncio.to_thread(self._crew.store.keep, self._id, self.progress)
        except OSError as error:
            log.warning("channel_progress_lost", channel=self._id, reason=error.strerror)

    # ------------------------------------------------------------ its owner is told

    def _tell(self, name: str, **data) -> None:
        """An event for its webhook, where it has one; at once."""
        self._hooked(self.channel.webhook)
        self._told += 1
        if self._hook[1] is not None:
            self._hook[1].put({**data, "n": self._told, "type": name, "t": self._crew.wall()})

    def _hooked(self, wanted: Hook | None) -> None:
        had, delivering = self._hook
        if wanted != had:
            if delivering is not None:
                delivering.end()
            to = wanted and Receiver(self._run, wanted.url, wanted.secret, {"channel": self.channel.name})
            self._hook = wanted, to and self._crew.webhooks.open(to)

    async def _pass_on(self, session_id: str, live: LiveSession) -> None:
        """What happens to its session: outputs, recordings, speech, the chain."""
        async for event in live.events():
            self._tell(event.name, **event.data, session=session_id)

    # ------------------------------------------------------------ outputs

    async def _keep_outputs(self, lease: Lease) -> None:
        """As long as the session lasts: what the owner wants runs, what is not wanted any more ends."""
        crew, again = self._crew, dict[Wanted, float]()  # again: clock seconds before which it is not tried again
        outputs = self._outputs = dict[str, tuple[Wanted, Output]]()
        while True:
            wanted = {output.name: output for output in self.channel.outputs}
            again = {output: at for output, at in again.items() if output in wanted.values()}
            for name, (had, output) in tuple(outputs.items()):
                if wanted.get(name) != had or output.task.done():
                    crew.outputs.stop(lease, output)
                    del outputs[name]
            for name in wanted.keys() - outputs.keys():
                if crew.clock() >= again.get(wanted[name], 0.0):
                    again[wanted[name]] = crew.clock() + crew.desk.settings.outputs.retry_limit_seconds
                    outputs |= await self._started(lease, wanted[name])
            await crew.sleep(LOOK_SECONDS)

    async def _started(self, lease: Lease, wanted: Wanted) -> dict[str, tuple[Wanted, Output]]:
        """By its name; nothing where it was refused."""
        try:
            output = await self._crew.outputs.start(lease, wanted)
        except (LiveAvatarError, OSError) as error:
            self.troubles[wanted.name] = reason = error.strerror if isinstance(error, OSError) else str(error)
            self._tell("channel.trouble", what=wanted.name, reason=reason)
            log.warning("channel_output_refused", channel=self._id, output=wanted.name, reason=reason)
            return {}
        self.troubles.pop(wanted.name, None)
        return {wanted.name: (wanted, output)}


class Channels:
    """All channels of one server: what their owners may do with them, and those that are on air. See Crew."""

    def __init__(self, crew: Crew):
        self.store, self._crew = crew.store, crew
        self._runners: dict[str, Runner] = {}
        self._tasks: dict[str, asyncio.Task] = {}
        self._locks = defaultdict[str, asyncio.Lock](asyncio.Lock)  # by channel, and by owner for new ones: a change at a time

    def resume(self) -> None:
        """Those that were on air when the server ended are so again, as soon as the chain is up."""
        for channel in self.store.all():
            if channel.started:
                self._run(channel.id)

    def runner(self, channel: Channel) -> Runner | None:
        """What keeps it on air."""
        return self._runners.get(channel.id)

    def lease(self, channel: Channel) -> Lease | None:
        """Of its session, where it has one that runs."""
        runner = self.runner(channel)
        return runner.lease if runner is not None and runner.lease is not None and not runner.lease.over else None

    async def check(self, channel: Channel) -> None:
        """Raises NotFound, Forbidden (avatar), Forbidden, Invalid, Unprocessable (an output, the webhook), Unprocessable (no voice)."""
        self._crew.desk.portrait(tenant(channel), channel.avatar, channel.mode)
        for wanted in channel.outputs:
            shown(wanted)
            await self._crew.outputs.check(wanted)
        if channel.webhook is not None:
            await self._crew.webhooks.check(channel.webhook.url)
        if self._crew.speak is None and any(entry.text is not None for entry in channel.schedule.entries):
            raise no_voice()

    async def add(self, channel: Channel) -> None:
        """A new one, off air. Raises what check() raises, Conflict, RateLimited."""
        await self.check(channel)
        async with self._locks[channel.owner]:
            await asyncio.to_thread(self.store.add, channel)

    async def change(self, channel: Channel, **changes) -> Channel:
        """Another one in its place, from now on. Raises NotFound for one that was erased meanwhile."""
        async with self._locks[channel.id]:
            return await self._put(channel.id, **changes)

    async def start(self, channel: Channel, key: str) -> Channel:
        """On air, on the account of this server key, until stop(), whatever happens to the server. Raises what check() raises, Capacity."""
        if self._crew.desk.studio.draining:
            raise Capacity("the server is shutting down", kind="draining", retry_after=30)
        await self.check(channel)
        async with self._locks[channel.id]:
            changed = await self._put(channel.id, started=True, key=key)
            if channel.id not in self._tasks or self._tasks[channel.id].done():
                self._run(channel.id)
        return changed

    async def stop(self, channel: Channel) -> Channel:
        """Off air; harmless when it is."""
        async with self._locks[channel.id]:
            changed = await self._put(channel.id, started=False)
            await self._end(channel.id)
        return changed

    async def erase(self, channel: Channel) -> None:
        """Off air and gone. Raises NotFound."""
        async with self._locks[channel.id]:
            await self._end(channel.id)
            await asyncio.to_thread(self.store.erase, channel.id)
        del self._locks[channel.id]

    async def add_sound(self, channel: Channel, pcm: np.ndarray, rate: int) -> SoundFile:
        """See ChannelStore."""
        async with self._locks[channel.id]:
            return await asyncio.to_thread(self.store.add_sound, channel.id, pcm, rate)

    async def erase_sound(self, channel: Channel, sound_id: str) -> None:
        """See ChannelStore."""
        async with self._locks[channel.id]:
            await asyncio.to_thread(self.store.erase_sound, channel.id, sound_id)

    async def _put(self, channel_id: str, **changes) -> Channel:
        changed = replace(self.store.now(channel_id), **changes)
        await asyncio.to_thread(self.store.put, changed)
        return changed

    async def close(self) -> None:
        """The server ends: all off air, and on air again when it comes back."""
        await asyncio.gather(*map(self._end, tuple(self._runners)))

    def _run(self, channel_id: str) -> None:
        runner = self._runners[channel_id] = Runner(self._crew, channel_id)
        task = self._tasks[channel_id] = asyncio.get_running_loop().create_task(runner.run())
        task.add_done_callback(lambda task: self._over(runner, channel_id, task))

    def _over(self, runner: Runner, channel_id: str, task: asyncio.Task) -> None:
        if not task.cancelled() and task.exception() is not None:
            runner.troubles["session"] = "internal error"
            log.error("channel_broke", channel=channel_id, exc_info=task.exception())

    async def _end(self, channel_id: str) -> None:
        runner, task = self._runners.pop(channel_id, None), self._tasks.pop(channel_id, None)
        if runner is not None:
            await runner.end()
            await asyncio.wait([task])


def shown(wanted: Wanted) -> str | None:
    """Where it goes, without keys; None: nowhere else. Raises Unprocessable for what no output can be sent to."""
    if wanted.url is None:
        return None
    try:
        return Target(kind=wanted.kind, url=wanted.url, token=wanted.token).shown
    except ConfigError as error:
        raise Unprocessable(str(error)) from None
