"""A conversation as a state machine: who speaks, what comes next, and what was really heard.

listening -> (the user said something) thinking -> (the avatar is heard) speaking -> listening. The user speaking ends
every other state: barge-in. Pure: inputs in, orders out, the clock is an argument; talk.py carries the orders out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from liveavatar.serving.minds import Said

LISTENING, THINKING, SPEAKING = STATES = ("listening", "thinking", "speaking")
HISTORY = 40  # turns a mind is reminded of; older ones are forgotten
MS_PER_CHARACTER = 65.0  # of a voice, where a sentence is cut before all of its sound was made
NEARLY_MS = 120.0  # a sentence of which no more than this is missing was heard to its end


# ---------------------------------------------------------------- orders


@dataclass(frozen=True)
class Think:
    """Ask the mind; give back sentence() for each, then answered()."""

    turn: int
    history: tuple[Said, ...]


@dataclass(frozen=True)
class Speak:
    """Voice this sentence into the avatar, as a segment of its own, after those before it; give back voiced(), or mute()."""

    turn: int
    number: int
    text: str


@dataclass(frozen=True)
class Hush:
    """Stop mind and voice of `turn` and interrupt the avatar; give back finished() for what that cut, then hushed()."""

    turn: int


Order = Think | Speak | Hush


# ---------------------------------------------------------------- an answer


@dataclass
class Answer:
    """What the avatar says in one turn. before: of it, said in a turn that a noise broke off. whole: the mind is done.

    heard: sentences heard to their end. into: ms heard of the one after those, once it was cut.
    """

    turn: int
    before: str = ""
    sentences: list[str] = field(default_factory=list)
    spans: list[float] = field(default_factory=list)  # ms of sound handed over, per sentence
    voiced: int = 0  # sentences all of whose sound was handed over
    heard: int = 0
    into: float = 0.0
    whole: bool = False

    @property
    def left(self) -> list[str]:
        """Known sentences that were not heard to their end."""
        return self.sentences[self.heard :]

    @property
    def over(self) -> bool:
        """Nothing of it is still to be heard."""
        return self.whole and not self.left

    def cut(self, number: int, position_ms: float) -> None:
        """Its sentence `number` was broken off there; one of which the voice could make no more than a piece does not count."""
        if number >= len(self.sentences):
            self.heard, self.into = len(self.sentences), 0.0
            return
        nearly = number < self.voiced and position_ms + NEARLY_MS >= self._ms(number)
        self.heard, self.into = (number + 1, 0.0) if nearly else (number, position_ms)

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(filter(None, (self.before, *self.sentences)))

    @property
    def heard_text(self) -> str:
        """Whole sentences, and of one that was cut its whole words, as many as its share of the sound."""
        parts = [self.before, *self.sentences[: self.heard]]
        if self.into and self.heard < len(self.sentences):
            words = self.sentences[self.heard].split()
            parts.append(" ".join(words[: int(len(words) * self.into / self._ms(self.heard))]))
        return " ".join(filter(None, parts))

    def _ms(self, number: int) -> float:
        given = self.spans[number] if number < len(self.spans) else 0.0
        return given if number < self.voiced and given else max(given, MS_PER_CHARACTER * len(self.sentences[number]))


@dataclass
class Exchange:
    """A question and its answer, for people and figures. times: clock seconds at which things happened."""

    turn: int
    question: str
    answer: str = ""
    cut: bool = False
    times: dict[str, float] = field(default_factory=dict)

    @property
    def latency(self) -> dict[str, float]:
        """Seconds from the end of the question to each later step."""
        start = self.times.get("asked")
        return {} if start is None else {name: at - start for name, at in self.times.items() if name != "asked"}


# ---------------------------------------------------------------- the machine


class Conversation:
    """See the module. Each method is one input and returns the orders that follow from it."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self.state, self.turn = LISTENING, 0  # turn: of the last question, or of its answer taken up again
        self.history: list[Said] = []
        self.exchange: Exchange | None = None
        self._answer: Answer | None = None  # being made or spoken
        self._stopped: Answer | None = None  # by speech of which we do not know yet whether it says anything
        self._mouths = 0  # beginnings of speech whose text has not come yet
        self._silent_since = 0.0

    @property
    def hearing(self) -> bool:
        """The user speaks, or what they said is not yet read."""
        return self._mouths > 0

    # ------------------------------------------------------------ from the user

    def began(self) -> list[Order]:
        """The user speaks: whatever the avatar does, it stops."""
        self._mouths += 1
        if self.state == LISTENING:
            return []
        self.state = LISTENING
        return [Hush(self.turn)]

    def ended(self, quiet: float = 0.0) -> list[Order]:
        """The user is silent, for so many seconds already; the text will follow."""
        self._silent_since = self._clock() - quiet
        return []

    def said(self, text: str) -> list[Order]:
        """The text of what began() announced; empty: it was a noise, and what it stopped goes on."""
        self._mouths = max(0, self._mouths - 1)
        text = " ".join(text.split())
        self.hushed(self.turn)  # how much was heard was never told: no more than we know
        if text:
            self._stopped = None
            self._remember(text)
        return [] if self._mouths else self._go()

    def _remember(self, text: str) -> None:
        if self.history and self.history[-1].role == "user":  # nothing was heard in between: it is one question
            text = f"{self.history.pop().text} {text}"
        self.history.append(Said("user", text))
        del self.history[:-HISTORY]

    def _go(self) -> list[Order]:
        stopped, self._stopped = self._stopped, None
        if stopped is not None and stopped.left and (stopped.whole or stopped.heard_text):  # else the mind is asked again
            return self._again(stopped)
        if not self.history or self.history[-1].role != "user":
            return []
        self.turn += 1
        self.state, self._answer = THINKING, Answer(self.turn)
        self.exchange = Exchange(self.turn, self.history[-1].text, times={"asked": self._silent_since, "understood": self._clock()})
        return [Think(self.turn, tuple(self.history))]

    def _again(self, stopped: Answer) -> list[Order]:
        """Take up an answer that a noise broke off, from the beginning of the sentence that was cut, as far as the mind had got."""
        if self.history[-1].role == "assistant":
            self.history.pop()
        self.turn += 1
        self.exchange.times.pop("over")
        before = " ".join(filter(None, (stopped.before, *stopped.sentences[: stopped.heard])))
        self.state, self._answer = THINKING, Answer(self.turn, before, stopped.left, whole=True)
        return [Speak(self.turn, number, text) for number, text in enumerate(self._answer.sentences)]

    # ------------------------------------------------------------ from the mind and the voice

    def sentence(self, turn: int, text: str) -> list[Order]:
        """The mind has said one more sentence."""
        if not self._current(turn) or self._answer.whole:
            return []
        self._mark("first sentence")
        self._answer.sentences.append(text)
        return [Speak(turn, len(self._answer.sentences) - 1, text)]

    def answered(self, turn: int) -> list[Order]:
        """The mind has said all, or cannot go on."""
        if self._current(turn):
            self._answer.whole = True
            self._settle()
        return []

    def voiced(self, turn: int, number: int, ms: float, done: bool = False) -> list[Order]:
        """So much more sound of a sentence was handed to the avatar; done: all of it."""
        if self._current(turn):
            self._mark("first sound")
            spans = self._answer.spans
            spans.extend([0.0] * (number + 1 - len(spans)))
            spans[number] += ms
            self._answer.voiced = number + 1 if done else self._answer.voiced
        return []

    def mute(self, turn: int, number: int) -> list[Order]:
        """The voice failed at this sentence: nothing from there on will be heard."""
        if self._current(turn):
            self._answer.whole = True
            del self._answer.sentences[number:]
            self._settle()
        return []

    def _current(self, turn: int) -> bool:
        return self._answer is not None and self._answer.turn == turn and self.state != LISTENING

    # ------------------------------------------------------------ from the avatar

    def started(self, turn: int) -> list[Order]:
        """The viewer hears the answer."""
        if self._current(turn):
            self.state = SPEAKING
            self._mark("heard")
        return []

    def finished(self, turn: int, number: int, position_ms: float, interrupted: bool) -> list[Order]:
        """A sentence was heard to its end, or was cut there."""
        answer = self._answer
        if answer is None or answer.turn != turn:
            return []
        if interrupted:
            answer.cut(number, position_ms)
            return self.hushed(turn)
        answer.heard = max(answer.heard, number + 1)
        self._settle()
        return []

    def hushed(self, turn: int) -> list[Order]:
        """The avatar is silent and nothing more comes of this turn."""
        answer = self._answer
        if answer is not None and answer.turn == turn:
            if self._mouths:
                self._stopped = answer
            self._close()
        return []

    def _settle(self) -> None:
        if self.state != LISTENING and self._answer.over:
            self._close()

    def _close(self) -> None:
        answer, self._answer = self._answer, None
        text, cut = answer.heard_text, not answer.over
        if text:
            self.history.append(Said("assistant", text, cut=cut))
        if self.exchange is not None:
            self.exchange.answer, self.exchange.cut = text, cut
            self._mark("over")
        self.state = LISTENING

    def _mark(self, name: str) -> None:
        if self.exchange is not None:
            self.exchange.times.setdefault(name, self._clock())
