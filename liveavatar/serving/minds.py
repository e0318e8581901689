"""Who answers: any server that speaks OpenAI's /chat/completions, or a small companion of rules that needs no key.

A mind gets the conversation as it was really heard and gives its answer in pieces of text; `sentences` makes of them
what a voice can say, the first as early as possible.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from liveavatar.serving import tls
from liveavatar.serving.problems import Problem

MIND_SECONDS = 60.0  # a mind that says nothing for so long has failed
ANSWER_LIMIT = 8000  # characters of one answer; the rest is not said
SENTENCE_LIMIT = 300  # characters; a longer sentence is said in parts
INSTRUCTIONS = ("You speak through a live avatar: your words are spoken, not read. Answer in one to three short sentences of plain speech, "
                "without lists, markup or emoji. A text that breaks off with '...' was interrupted there.")  # fmt: skip


class MindFailed(Problem):
    """The answering side cannot be reached, refused, or broke off."""

    status, kind, title = 502, "mind", "The answering side failed"


@dataclass(frozen=True)
class Said:
    """One turn of a conversation. role: "user" or "assistant". cut: the rest of it was never heard."""

    role: str
    text: str
    cut: bool = False

    @property
    def content(self) -> str:
        """As a mind reads it."""
        return f"{self.text}..." if self.cut else self.text


class Mind(Protocol):
    """The conversation, its last turn the user's -> the answer in pieces. Leaving the iteration early stops the work."""

    def answer(self, history: Sequence[Said]) -> AsyncIterator[str]: ...


def open_mind(url: str | None, *, model: str, key: str | None = None) -> Mind:
    """Of a server; None: the companion."""
    return Companion() if url is None else EndpointMind(url, model=model, key=key)


# ---------------------------------------------------------------- a server


class EndpointMind:
    """POST {url}/chat/completions, streamed. url: the operator's, e.g. https://api.openai.com/v1 or http://127.0.0.1:11434/v1."""

    def __init__(self, url: str, *, model: str, key: str | None = None, instructions: str = INSTRUCTIONS):
        self.url, self.model, self.instructions = url.rstrip("/"), model, instructions
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def answer(self, history: Sequence[Said]) -> AsyncIterator[str]:
        """See Mind. Raises MindFailed."""
        import httpx

        turns = [{"role": said.role, "content": said.content} for said in history]
        body = {"model": self.model, "stream": True, "messages": [{"role": "system", "content": self.instructions}, *turns]}
        try:
            async with httpx.AsyncClient(timeout=MIND_SECONDS, verify=await tls.context()) as client:
                async with client.stream("POST", f"{self.url}/chat/completions", json=body, headers=self._headers) as answer:
                    if answer.status_code != 200:
                        detail = (await answer.aread())[:200].decode("utf-8", "replace")
                        raise MindFailed(f"{self.url}: status {answer.status_code}: {detail}")
                    async for line in answer.aiter_lines():
                        if text := self._delta(line):
                            yield text
        except httpx.HTTPError as error:
            raise MindFailed(f"{self.url}: {type(error).__name__}: {error}") from None

    def _delta(self, line: str) -> str:
        """The text of one line of server-sent events; comments, other fields and the end have none."""
        if not line.startswith("data:") or line[5:].strip() in ("", "[DONE]"):
            return ""
        try:
            event = json.loads(line[5:])
            if "error" in event:
                raise MindFailed(f"{self.url}: {str(event['error'])[:200]}")
            return "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices", ()))
        except (ValueError, AttributeError, TypeError):
            raise MindFailed(f"{self.url}: not a chat completion chunk: {line[:200]}") from None


# ---------------------------------------------------------------- without any key

NUMBERS = {word: n for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split())}
NUMBERS |= {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
SIGNS = {"plus": "+", "and": "+", "minus": "-", "less": "-", "times": "*", "multiplied by": "*", "x": "*", "divided by": "/", "over": "/"}
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
GREETING = "Hello. I am a small companion made of rules. Ask me what I can do."
ABILITIES = "I can tell the time and the date, do sums, remember your name and what you said, and count. Interrupt me whenever you like."


class Companion:
    """A few rules and the memory of this conversation: no language model, and it says so. clock: local time."""

    def __init__(self, clock: Callable[[], datetime] = datetime.now):
        self._clock = clock

    async def answer(self, history: Sequence[Said]) -> AsyncIterator[str]:
        """See Mind. One sentence at a time."""
        for sentence in re.split(r"(?<=[.!?]) ", self.reply(history)):
            yield sentence + " "

    def reply(self, history: Sequence[Said]) -> str:
        """The whole answer: one to each sentence of the question that a rule knows."""
        asked, earlier = history[-1].text, [said.text for said in history[:-1] if said.role == "user"]
        parts = [part for part in re.split(r"(?<=[.!?])\s+", asked) if _spoken(part)]
        answers = [self._reply(part, earlier + parts[:n]) for n, part in enumerate(parts)]
        known = list(dict.fromkeys(filter(None, answers)))
        greeting = known and known[0] == GREETING and len(known) > 1
        return " ".join(["Hello.", *known[1:]] if greeting else known) or (
            f"I heard: {asked.strip().rstrip('.!?')}. I am a small program of rules without a language model, so that is all I can do with it. "
            "Connect one, and I will be its voice and face.")  # fmt: skip

    def _reply(self, asked: str, earlier: Sequence[str]) -> str:
        words = re.sub(r"[^\w\s'+*/.-]", " ", asked.lower().replace("’", "'")).strip(" .")
        for pattern, rule in self._rules():
            if (found := re.search(pattern, words)) and (answer := rule(found, asked, earlier)):
                return answer
        return ""

    def _rules(self) -> tuple:
        return (
            (r"\bmy name is (?!what)([\w'-]+)|\bcall me ([\w'-]+)", lambda m, *_: f"Pleased to meet you, {(m[1] or m[2]).title()}."),
            (r"\b(what is|what's|do you (know|remember)|tell me) my name\b|\bwho am i\b", lambda m, a, earlier: _name(earlier)),
            (r"\bwhat did i (just )?(say|ask)|\brepeat (that|what i)", lambda m, a, earlier: _last(earlier)),
            (r"\bcount (up )?(to|from one to) ([\w-]+)", lambda m, *_: _count(m[3])),
            (r"\bwhat time|\bthe time\b|\bwhat's the time", lambda *_: f"It is {self._clock():%H:%M} here."),
            (r"\b(what|which) (day|date)|\btoday's date|\bthe date\b", lambda *_: f"Today is {self._clock():%A, %B} {self._clock().day}."),
            (r"\bwhat can you do|\bhelp\b|\bwhat do you do", lambda *_: f"I am a small program of rules, not a language model. {ABILITIES}"),
            (r"\bwho are you|\bwhat are you|\byour name|\bare you (a |an )?(human|real|person|robot|machine|ai)\b",
             lambda *_: "I am the live avatar's own companion: a machine with a few rules, no person and no language model."),
            (r"\d|\b(" + "|".join(NUMBERS) + r")\b", lambda m, asked, _: _sum(asked)),
            (r"\bthank", lambda *_: "You are welcome."),
            (r"\b(good ?bye|bye|see you|good night)\b", lambda *_: "Goodbye. It was good to talk to you."),
            (r"\bhow are you", lambda *_: "All my parts are running. Thank you for asking."),
            (r"\b(hello|hi|hey|good (morning|afternoon|evening))\b", lambda *_: GREETING),
        )  # fmt: skip


def _name(earlier: Sequence[str]) -> str:
    for said in reversed(earlier):
        if found := re.search(r"\b(?:my name is|call me) ([\w'-]+)", said, re.IGNORECASE):
            return f"Your name is {found[1].title()}. You told me."
    return "You have not told me your name yet."


def _last(earlier: Sequence[str]) -> str:
    return f"You said: {earlier[-1].strip().rstrip('.!?')}." if earlier else "This is the first thing you said to me."


def _count(word: str) -> str:
    end = int(word) if word.isdecimal() else NUMBERS.get(word, 0)
    return ". ".join(str(n) for n in range(1, end + 1)) + "." if 0 < end <= 100 else "I can count up to one hundred."


def _sum(asked: str) -> str:
    """"What is seven times 8?" -> its value; "" for anything else."""
    text = re.sub(r"[^\w\s'+*/.-]", " ", asked.lower().replace("×", "*").replace("÷", "/").replace("’", "'"))
    text = re.sub(r"^.*?\b(what is|what's|calculate|how much is)\b", "", text.strip(" .?"))
    for words, sign in SIGNS.items():
        text = re.sub(rf"(?<=[\w.])\s+{words}\s+(?=[\w-])", f" {sign} ", text)
    text = re.sub(r"\b([a-z]+ty)[ -]([a-z]+)\b", lambda m: str(NUMBERS.get(m[1], 0) + NUMBERS[m[2]]) if m[2] in NUMBERS else m[0], text)
    text = re.sub(r"\b[a-z]+\b", lambda m: str(NUMBERS[m[0]]) if m[0] in NUMBERS else m[0], text)
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return ""
    return f"That is {value:.10g}."


def _value(node: ast.expr) -> float:
    """Of a sum of plain numbers; ValueError for anything else, also for a lone number."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = (side.value if isinstance(side, ast.Constant) and type(side.value) in (int, float) else _value(side)
                       for side in (node.left, node.right))  # fmt: skip
        if max(abs(left), abs(right)) > 1e12:
            raise ValueError("too large")
        return OPERATIONS[type(node.op)](left, right)
    raise ValueError("not a sum")


# ---------------------------------------------------------------- text -> sentences

SHORT_FORMS = frozenset("mr mrs ms dr prof st vs etc e.g i.e no fig approx inc ltd u.s a.m p.m".split())
ENDS = re.compile(r"[.!?…]+[\"”’)\]]*(?=\s)|[。！？]+[」”’)]*|\n+")  # only what is followed by something is known to be an end


async def sentences(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Text in pieces of any size -> sentences, each as soon as the next begins; at most ANSWER_LIMIT characters in all."""
    buffer, total = "", 0
    async for piece in pieces:
        piece = piece[: max(0, ANSWER_LIMIT - total)]
        total += len(piece)
        buffer += piece
        while (cut := _end(buffer)) is not None:
            sentence, buffer = buffer[:cut].strip(), buffer[cut:]
            if _spoken(sentence):
                yield sentence
        if total >= ANSWER_LIMIT:
            break
    if _spoken(buffer):
        yield buffer.strip()


def _spoken(text: str) -> bool:
    return any(c.isalnum() for c in text)


def _end(text: str) -> int | None:
    """Where the first sentence of `text` ends; None while that is not known."""
    for found in ENDS.finditer(text):
        words = text[: found.start()].split()
        bare = words[-1].lstrip("(\"'“‘").lower() if words else ""
        numbered = len(words) == 1 and bare.isdigit()  # "1. First": the number of what follows
        if found[0][0] != "." or not (numbered or bare in SHORT_FORMS or re.fullmatch(r"[a-z]", bare)):
            return found.end()
    if len(text) <= SENTENCE_LIMIT:
        return None
    at = max(text.rfind(mark, 0, SENTENCE_LIMIT) for mark in (", ", "; ", ": ", " - ", "，"))
    return at + 1 if at > 0 else text.rfind(" ", 0, SENTENCE_LIMIT) + 1 or SENTENCE_LIMIT
