"""A conversation with an avatar: ears, recogniser, mind and voice round one LiveSession, in the order conversation.py says.

One actor takes every input, one at a time: what ears hear, what the recogniser read, what the mind says, what the
voice handed over, what the viewer heard. Thinking and voicing are tasks of the present turn; barge-in ends both before
the avatar is interrupted, so nothing stale can follow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np

from liveavatar.core import SAMPLE_RATE, LiveAvatarError
from liveavatar.serving.conversation import Conversation, Exchange, Hush, Order, Speak, Think
from liveavatar.serving.ears import Began, Ears, Ended, Recogniser
from liveavatar.serving.happenings import Event
from liveavatar.serving.live import LiveSession
from liveavatar.serving.minds import Mind, Said, sentences
from liveavatar.serving.problems import Conflict
from liveavatar.serving.voices import Voice, say_to
from liveavatar.telemetry import now as monotonic

INBOX = 256  # inputs; who puts waits
TURNS_WAITING = 4  # turns said and not yet recognised; the oldest goes: nobody wants an answer to what was said minutes ago
SENTENCES = 4096  # segments are numbered turn * this + sentence; an answer (minds.ANSWER_LIMIT) has fewer
SILENCE = np.zeros(0, np.int16), 16_000
HEARD = ("speak.started", "speak.finished", "epoch")  # events of the avatar that tell what the viewer hears

Tell = Callable[[str, dict], None]


class Talk:
    """See the module. Made with a session that runs; `run` holds it, or `async with` starts and ends it. The session stays open.

    tell: (name, data) of what happens: talk.state{state}, talk.question{turn, text}, talk.answer{turn, text, cut},
    talk.latency{turn, ...seconds}, talk.failed{reason}.
    """

    def __init__(self, avatar: LiveSession, *, mind: Mind, voice: Voice, recogniser: Recogniser | None = None, ears: Ears | None = None,
                 clock: Callable[[], float] = monotonic, tell: Tell = lambda name, data: None):  # fmt: skip
        self.avatar, self.mind, self.voice, self.recogniser, self.ears, self.tell = avatar, mind, voice, recogniser, ears, tell
        self.conversation = Conversation(clock)
        self._inbox: asyncio.Queue[Callable[[], list[Order]]] = asyncio.Queue(INBOX)
        self._spoken: asyncio.Queue[np.ndarray] = asyncio.Queue(TURNS_WAITING)
        self._sentences: asyncio.Queue[Speak] = asyncio.Queue(SENTENCES)
        self._work: list[asyncio.Task] = []  # of the present turn: its mind, its voice
        self._tasks: list[asyncio.Task] = []
        self._epoch = 0  # of the avatar when the present turn began: what is made for it belongs there
        self._seen = 0  # number of the avatar's last event that was taken
        self._told_state, self._told_turn, self._told_over = "", 0, (0, 0.0)  # the last: turn, and when its answer was over

    async def __aenter__(self) -> Talk:
        self._seen = self.avatar.happenings.last
        self._tasks = [asyncio.create_task(run) for run in (self._act(), self._recognise(), self._watch())]
        return self

    async def __aexit__(self, *exception) -> None:
        await _end(self._tasks + self._work)

    async def run(self) -> None:
        """Hold the conversation until the avatar's session is over. An error of ours is raised."""
        async with self:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    # ------------------------------------------------------------ the user

    async def hear(self, pcm, rate: int) -> None:
        """The microphone's next samples [n], float or int16. Raises InputError."""
        await self._heard(self.ears.hear(pcm, rate))

    async def hear_end(self) -> None:
        """The microphone is off: a turn under way is over."""
        await self._heard(self.ears.end())

    async def _heard(self, events: list[Began | Ended]) -> None:
        for event in events:
            if isinstance(event, Began):
                await self._inbox.put(self.conversation.began)
                continue
            await self._inbox.put(partial(self.conversation.ended, event.quiet))
            forgotten = self._spoken.full() and self._spoken.get_nowait() is not None
            self._spoken.put_nowait(event.pcm)
            if forgotten:
                await self._inbox.put(partial(self.conversation.said, ""))

    async def read(self, text: str) -> None:
        """A turn that was typed."""
        for put in (self.conversation.began, self.conversation.ended, partial(self.conversation.said, text)):
            await self._inbox.put(put)

    async def _recognise(self) -> None:
        while True:
            pcm, text = await self._spoken.get(), ""
            try:
                with self.avatar.spend(len(pcm) / SAMPLE_RATE):
                    text = await self.recogniser.recognise(pcm)
            except LiveAvatarError as error:
                self.tell("talk.failed", {"reason": str(error)})
            await self._inbox.put(partial(self.conversation.said, text))

    # ------------------------------------------------------------ the actor

    async def _act(self) -> None:
        while True:
            put = await self._inbox.get()
            orders = put()
            while orders:
                orders = [follow for order in orders for follow in await self._carry_out(order)]
            self._tell_progress()
            if self.avatar.state in ("closing", "closed", "failed"):
                return
            if self._inbox.empty():  # else it may be over already: turns that were typed
                with contextlib.suppress(Conflict):  # as in _hush
                    await self.avatar.hears(self.conversation.hearing)

    async def _carry_out(self, order: Order) -> list[Order]:
        match order:
            case Think():
                await self._begin(self._think(order))
            case Speak():
                if not self._work:  # an answer taken up again: no mind is asked
                    await self._begin()
                self._sentences.put_nowait(order)
            case Hush():
                return await self._hush(order)
        return []

    async def _begin(self, *work) -> None:
        await self._stop()
        self._sentences, self._epoch = asyncio.Queue(SENTENCES), self.avatar.epoch
        self._work = [asyncio.create_task(one) for one in (*work, self._speak(self._sentences, self._epoch))]

    async def _stop(self) -> None:
        work, self._work = self._work, []
        await _end(work)
        for task in work:
            if not task.cancelled():
                task.result()  # an error of ours ends the conversation

    async def _hush(self, order: Hush) -> list[Order]:
        await self._stop()
        with contextlib.suppress(Conflict):  # the session is closing: nobody hears anything any more
            await self.avatar.interrupt(reason="viewer")
        return self._catch_up() + self.conversation.hushed(order.turn)

    def _tell_progress(self) -> None:
        if self.conversation.state != self._told_state:
            self._told_state = self.conversation.state
            self.tell("talk.state", {"state": self._told_state})
        exchange = self.conversation.exchange
        if exchange is not None and exchange.turn != self._told_turn:
            self._told_turn = exchange.turn
            self.tell("talk.question", {"turn": exchange.turn, "text": exchange.question})
        if exchange is not None and "over" in exchange.times and self._told_over != (exchange.turn, exchange.times["over"]):
            self._told_over = exchange.turn, exchange.times["over"]
            self._tell_exchange(exchange)

    def _tell_exchange(self, exchange: Exchange) -> None:
        self.tell("talk.answer", {"turn": exchange.turn, "text": exchange.answer, "cut": exchange.cut})
        self.tell("talk.latency", {"turn": exchange.turn, **{name: round(at, 3) for name, at in exchange.latency.items()}})

    # ------------------------------------------------------------ the tasks of a turn

    async def _think(self, order: Think) -> None:
        try:
            async for sentence in sentences(self.mind.answer(order.history)):
                await self._inbox.put(partial(self.conversation.sentence, order.turn, sentence))
        except LiveAvatarError as error:
            self.tell("talk.failed", {"reason": str(error)})
        await self._inbox.put(partial(self.conversation.answered, order.turn))

    async def _speak(self, queue: asyncio.Queue, epoch: int) -> None:
        while True:
            order = await queue.get()
            try:
                await self._voice(order, epoch)
            except LiveAvatarError as error:
                self.tell("talk.failed", {"reason": str(error)})
                await self._inbox.put(partial(self.conversation.mute, order.turn, order.number))
                return

    async def _voice(self, order: Speak, epoch: int) -> None:
        """A segment per sentence: its end is spoken at once, also while the mind still thinks about the next."""
        segment = order.turn * SENTENCES + order.number
        await self.avatar.moderate("speech", order.text)
        async for pcm, rate in self.voice.speak(order.text):
            await say_to(self.avatar, (pcm, rate), segment=segment, epoch=epoch)
            await self._inbox.put(partial(self.conversation.voiced, order.turn, order.number, 1000 * len(pcm) / rate))
        await self._inbox.put(partial(self.conversation.voiced, order.turn, order.number, 0.0, done=True))
        await say_to(self.avatar, SILENCE, segment=segment, epoch=epoch, end=True)

    # ------------------------------------------------------------ the avatar

    async def _watch(self) -> None:
        async for event in self.avatar.events(self._seen):
            if event.name in HEARD:
                await self._inbox.put(self._catch_up)
        await self._inbox.put(self._catch_up)  # the session is over: wakes the actor, which sees it

    def _catch_up(self) -> list[Order]:
        """Everything the avatar has told so far: an interruption must not overtake what was heard before it."""
        orders = []
        for event in self.avatar.happenings:
            if event.number > self._seen:
                self._seen = event.number
                orders += self._take(event)
        if self._work and self.avatar.epoch != self._epoch:  # interrupted, by whomever: mind and voice of this turn end too
            for task in self._work:
                task.cancel()
            orders += self.conversation.hushed(self.conversation.turn)
        return orders

    def _take(self, event: Event) -> list[Order]:
        if event.name == "speak.started":
            return self.conversation.started(event.data["segment"] // SENTENCES)
        if event.name == "speak.finished":
            return self.conversation.finished(*divmod(event.data["segment"], SENTENCES), event.data["position_ms"], event.data["interrupted"])
        return []


async def _end(tasks: list[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def transcript(history: list[Said]) -> str:
    """For people, a line per turn."""
    return "\n".join(f"{'you' if said.role == 'user' else 'avatar'}: {said.content}" for said in history)
