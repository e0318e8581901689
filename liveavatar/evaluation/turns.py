"""Conversations: streams that are interrupted and given another portrait; how they are made, and how judged.

Waits come from the trace. What a viewer sees of an interruption and of the new portrait comes from the pictures, by the
times at which the trace says that they were sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liveavatar.conditioning.face import Face, FaceTracker
from liveavatar.conditioning.faceprint import NETWORK_SHA256, embedding
from liveavatar.conditioning.media import read_audio
from liveavatar.conditioning.phones import PAUSE, VOWELS, Phone
from liveavatar.core import FPS, SAMPLE_RATE, InputError
from liveavatar.evaluation import closure, likeness, traces
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.judge import read_portrait
from liveavatar.evaluation.landmarks import Track
from liveavatar.evaluation.report import Item, Measure, absent, bootstrap
from liveavatar.evaluation.suite import Event, Line, Rendered, Suite, SuiteItem
from liveavatar.evaluation.traces import Recording, Stream
from liveavatar.telemetry import LOUD

LEAD = 3.0  # seconds of silence before anybody speaks
SILENCE = 2.0, 3.5  # after each utterance: the lips have time to close
SPOKEN = 12.0  # asked of the renderer; an utterance is a part of it
LEAST = 3.0  # of an utterance that is not interrupted
CUT = 2.0, 3.5  # within an utterance, the earliest moment of an interruption
FLUENT = 1.0  # before an interruption nobody pauses
BREATH = 0.1  # kept of the pause that ends an utterance
FADE = SAMPLE_RATE // 100
OTHERS = 50  # from an item's person to the one in the new portrait
GRID = SAMPLE_RATE // FPS
SECOND_HALF = 0.45  # of an item, from which on the portrait changes

PUNCTUAL = 0.5  # an event further from its time was not the suite's
BEFORE = 1.0  # seconds before an interruption in which the lips must have been apart, or shut lips prove nothing
OPENING = 0.2  # the lips may part so long before the first sound
STEP = 0.2  # between pictures whose person is looked at,
CLOSELY = 3.0  # but every one for so long after the new portrait was asked for
AROUND = 10.0  # seconds before and after that
FIRM = 5  # pictures in a row that must show the new person
LIPS, WHO = "tracked gap; trace", likeness.BACKEND
LEFT_OUT = ("mouth_closed", "ttff_cold", "ttff_glass")  # found here, or of a single run alone


# ---------------------------------------------------------------- what they are made of


@dataclass(frozen=True)
class Scene:
    """A Rendered that is only spoken, with events; other: the new portrait, uint8 [S, S, 3]."""

    portrait: np.ndarray
    other: np.ndarray
    pcm: np.ndarray
    phones: tuple[Phone, ...]
    caption: str
    events: tuple[Event, ...]
    text: str = ""  # the phones say what is spoken: half of it is broken off, within words
    frames: None = None
    mumbled: None = None


def staged(render: Callable[[Line], Rendered]) -> Callable[[Line], Rendered]:
    """`render` that also knows eventful lines."""
    return lambda line: compose(line, render) if line.eventful else render(line)


def compose(line: Line, render: Callable[[Line], Rendered]) -> Scene:
    """Utterances with silence between them, every second one broken off, all on a grid of 40 ms; the portrait changes
    in the middle of the first whole one of the second half. The same line, the same scene."""
    rng = np.random.default_rng([line.seed, 0x7A1C])
    total, at, number = round(line.seconds * SAMPLE_RATE), round(LEAD * SAMPLE_RATE), 0
    pcm, phones, events = np.zeros(total, np.float32), [Phone(PAUSE, 0.0, LEAD)], []
    while True:
        made = render(replace(line, eventful=False, seed=1000 * line.seed + number, seconds=SPOKEN))
        broken = number % 2 == 1
        length = _cut(made.phones, float(rng.uniform(*CUT))) if broken else _whole(made.phones)
        after = at + length + round(float(rng.uniform(*SILENCE)) * FPS) * GRID
        if after > total - broken * round(LEAST * SAMPLE_RATE):  # what was broken off is followed by something
            if number and not broken:
                length = min(total - at, len(made.pcm))
                pcm[at : at + length] = _faded(made.pcm[:length])
                phones += _placed(made.phones, at, length, total)[:-1]
            break
        pcm[at : at + length] = _faded(made.pcm[:length])
        if broken:
            events.append(Event(time=(at + length) / SAMPLE_RATE, kind="interrupt"))
        elif at > SECOND_HALF * total and not any(event.kind == "portrait" for event in events):
            events.append(Event(time=round((at + length / 2) / GRID) / FPS, kind="portrait"))
        phones += _placed(made.phones, at, length, after)
        at, number = after, number + 1
    phones[-1] = replace(phones[-1], end=line.seconds)
    other = render(replace(line, eventful=False, identity=line.identity + OTHERS, seconds=1.0)).portrait
    return Scene(made.portrait, other, pcm, tuple(phones), "", tuple(events))


def _whole(phones: Sequence[Phone]) -> int:
    """Samples up to the first real pause."""
    end = next(p for p in phones if p.name == PAUSE and p.start >= LEAST and p.end - p.start >= 2 * BREATH)
    return math.ceil((end.start + BREATH) * FPS) * GRID


def _cut(phones: Sequence[Phone], earliest: float) -> int:
    """Samples up to the middle of the first vowel from `earliest` on that is spoken fluently, or of the most fluent."""
    rests = [p.end for p in phones if p.name == PAUSE and p.end - p.start >= BREATH]
    middles = [m for p in phones if p.name in VOWELS and (m := (p.start + p.end) / 2) >= earliest]
    fluent = {m: m - max((rest for rest in rests if rest <= m), default=0.0) for m in middles}
    return math.ceil(max(middles, key=lambda m: min(FLUENT, fluent[m])) * FPS) * GRID


def _faded(pcm: np.ndarray) -> np.ndarray:
    """Without a click at the end."""
    return pcm * np.minimum(1.0, np.arange(len(pcm), 0, -1) / FADE).astype(np.float32)


def _placed(phones: Sequence[Phone], at: int, length: int, after: int) -> list[Phone]:
    """The phones of `length` samples from `at` on, and the silence up to `after`."""
    start, end = at / SAMPLE_RATE, (at + length) / SAMPLE_RATE
    heard = [Phone(p.name, start + p.start, min(start + p.end, end)) for p in phones if start + p.start < end]
    return [*heard, Phone(PAUSE, end, after / SAMPLE_RATE)]


# ---------------------------------------------------------------- what was seen


@dataclass(frozen=True)
class Closing:
    """How the lips closed after an interruption. once: seconds until the first picture on which they are closed; stay:
    until the first from which on they are closed until new speech; None: none is. window: seconds until that speech."""

    once: float | None
    stay: float | None
    window: float


@dataclass(frozen=True)
class Change:
    """How the person changed. seconds: until the new one is seen; None: never. before: share of pictures nearer to the
    old one before the new portrait was asked for; after: to the new one once it was seen (or after CLOSELY). None: no
    face."""

    seconds: float | None
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Judged:
    """One stream: its trace and what its pictures say. closings: of the interruptions before which the mouth was open;
    shut: the others."""

    run: Recording
    closings: tuple[Closing, ...]
    shut: int
    changes: tuple[Change, ...]


def live(run: Recording, name: str) -> Recording:
    """The paced stream of a trace alone. Raises InputError unless there is one that heard and showed something."""
    streams = tuple(s for s in run.streams if s.pace == "live" and s["received"] and s["sent"])
    if len(streams) != 1:
        raise InputError(f"{name}: {len(streams)} live streams that received sound and sent pictures: must be one")
    return Recording(run.head, streams)


def origin(stream: Stream, pcm: np.ndarray, rate: int) -> float:
    """The trace's time of the item's second 0: the first speech is received as it is spoken."""
    first = next(line for line in stream["received"] if line["speech"] is not None)
    spoken = np.flatnonzero(np.abs(pcm) > LOUD)[0]
    return first["t"] - (first["stop"] - first["speech"][0]) / rate - spoken / SAMPLE_RATE


def interruptions(stream: Stream, begin: float, item: SuiteItem) -> list[float]:
    """Times of the trace. Raises InputError where they are not the item's."""
    wanted = [begin + event.time for event in item.events if event.kind == "interrupt"]
    found = [line["t"] for line in stream["interrupt"]]
    late = [abs(a - b) for a, b in zip(found, wanted, strict=False)]
    if len(found) != len(wanted) or max(late, default=0.0) > PUNCTUAL:
        at = ", ".join(f"{t - begin:.2f}" for t in found) or "none"
        raise InputError(f"{item.id}: interruptions at {at} s, not those of the suite: play it by the wall clock")
    return found


def sent_at(stream: Stream, times: np.ndarray) -> np.ndarray:
    """[T] times of the trace at which the pictures with time stamps `times` [T] left; a repeated one: so long after the
    last fresh one."""
    pts, sent, count = np.array([(line["pts"], line["t"], line["count"]) for line in stream["sent"]]).T
    last = np.maximum(np.searchsorted(pts, times + 0.5 / FPS, side="right") - 1, 0)
    return sent[last] + np.maximum(0.0, times - pts[last] - (count[last] - 1) / FPS)


def closings(track: Track, sent: np.ndarray, interrupts: Sequence[float], speech: Sequence[float],
             changed: float = math.inf) -> list[Closing | None]:
    """One for each interruption, None where the mouth was shut before. track: of pictures that left at `sent` [T].
    speech: when first pictures of utterances left; changed: when another person is seen, who has another rest."""
    closed = np.zeros(len(sent), bool)
    for part in (sent < changed, sent >= changed):
        if (part & track.seen).any():
            gap, limit = closure.lips(Track(track.times[part], track.points[part], track.faces[part]))
            closed[part] = gap < limit
    made = []
    for at in interrupts:
        end = min((t for t in speech if t > at), default=math.inf) - OPENING
        before = (sent >= at - BEFORE) & (sent <= at) & track.seen
        after = np.flatnonzero((sent > at) & (sent < end) & track.seen)
        if not (before & ~closed).any():
            made.append(None)
        elif len(after):
            waits = [float(sent[k] - at) for k in after]
            once = next((wait for wait, k in zip(waits, after, strict=True) if closed[k]), None)
            stay = int(np.flatnonzero(~closed[after])[-1]) + 1 if not closed[after].all() else 0
            made.append(Closing(once, waits[stay] if stay < len(waits) else None, waits[-1]))
    return made


def change(sent: np.ndarray, nearer: np.ndarray, asked: float) -> Change:
    """sent [T]: when the pictures looked at left; nearer [T]: distance to the old portrait less that to the new one."""
    new, after = nearer > 0, np.flatnonzero(sent > asked)

    def share(part: np.ndarray, which: np.ndarray) -> float | None:
        once = np.unique(sent[part] // STEP, return_index=True)[1]  # some moments were looked at more closely
        return float(which[part][once].mean()) if len(once) else None

    firm = [k for n, k in enumerate(after) if n + FIRM <= len(after) and new[after[n : n + FIRM]].all()]
    seen = float(sent[firm[0]] - asked) if firm else None
    return Change(seen, share(sent <= asked, ~new), share(sent >= asked + (CLOSELY if seen is None else seen), new))


def look(video: VideoFile, stream: Stream, asked: float, old: np.ndarray,
         new: np.ndarray) -> tuple[Track, np.ndarray, np.ndarray, np.ndarray]:
    """(the face; when each of its pictures left [T]; of those whose person was looked at, when they left [U] and their
    distance to the embedding `old` less that to `new` [U])."""
    tracker, times, faces, looked, nearer, due = FaceTracker(), [], [], [], [], -math.inf
    for at, picture in video.frames():
        found = tracker.follow(picture)
        times.append(at)
        faces.append(found)
        t = float(sent_at(stream, np.array([at]))[0])
        near = abs(t - asked) < AROUND and (t >= due or asked < t < asked + CLOSELY)
        if near and found and likeness.face_size(found[0]) >= likeness.MIN_FACE:
            due = t + STEP
            looked.append(t)
            nearer.append(_distance(picture, found[0], old) - _distance(picture, found[0], new))
    return Track.of(times, faces), sent_at(stream, np.array(times)), np.array(looked), np.array(nearer)


def _distance(picture: np.ndarray, face: Face, who: np.ndarray) -> float:
    return float(np.linalg.norm(embedding(picture, face) - who))


# ---------------------------------------------------------------- the judgement


def judge_turns(suite: Suite, videos: Path) -> tuple[tuple[Item, ...], tuple[Measure, ...]]:
    """Items by VIDEOS/ID.mp4 and VIDEOS/ID.trace.jsonl, and the measures over all their turns. What is missing or
    unusable fails its item."""
    items, judged = [], []
    for item in suite.manifest.items:
        path = videos / f"{item.id}.mp4"
        try:
            video = VideoFile(path)
            judged.append(judge(suite, item, video, traces.read_trace(videos / f"{item.id}.trace.jsonl")))
            found = tuple(measures(judged[-1:]))
            items.append(Item(id=item.id, video=str(path), sha256=video.sha256, picture=video.card, measures=found))
        except InputError as error:
            failed = absent("judged", str(error), status="failed")
            items.append(Item(id=item.id, video=str(path), measures=(failed,)))
    return tuple(items), tuple(measures(judged)) if judged else ()


def judge(suite: Suite, item: SuiteItem, video: VideoFile, trace: Recording) -> Judged:
    """Raises InputError where the stream did not go through what the item asks for."""
    run = live(trace, f"{item.id}.trace.jsonl")
    stream, pcm = run.streams[0], np.concatenate(list(read_audio(suite.path(item, "audio"))))
    begin = origin(stream, pcm, run.head["sample_rate"])
    interrupts = interruptions(stream, begin, item)
    event = next(event for event in item.events if event.kind == "portrait")
    if not any(step["what"] == "portrait" for step in stream["step"]):
        raise InputError(f"{item.id}: no new portrait in the trace, the suite has one at {event.time:g} s")
    asked = begin + event.time
    who = [read_portrait(path).embedding for path in (suite.path(item, "portrait"), suite.folder / event.portrait)]
    track, sent, looked, nearer = look(video, stream, asked, *who)
    seen = change(looked, nearer, asked)
    onsets = [onset.shown for onset in traces.onsets(run, stream)]
    found = closings(track, sent, interrupts, onsets, asked + (seen.seconds or 0.0))
    return Judged(run, tuple(c for c in found if c is not None), found.count(None), (seen,))


def measures(judged: Sequence[Judged]) -> list[Measure]:
    """Of one stream or of several together: what a trace tells (traces.flow), mouths and persons."""
    run = Recording(judged[0].run.head, tuple(stream for one in judged for stream in one.run.streams))
    told = [m for m in traces.flow(run) if m.name not in LEFT_OUT]
    closed = [closing for one in judged for closing in one.closings]
    changed = [change for one in judged for change in one.changes]
    return [*told, *mouths(closed, sum(one.shut for one in judged)), *persons(changed)]


def mouths(found: Sequence[Closing], shut: int) -> list[Measure]:
    """mouth_closed: interruption -> first picture sent whose lips are closed and stay closed until new speech, and its
    share of the interruptions. mouth_closed_once: -> first picture with closed lips. shut: interruptions left out."""
    names = {"mouth_closed": "stay", "mouth_closed_once": "once"}
    if not found:
        reason = f"the mouth was shut before all of {shut} interruptions" if shut else "no interruption shows a face"
        waits = [absent(name, reason, unit="s", better="lower", backend=LIPS) for name in names]
        return [*waits, absent("mouth_closed_share", reason, backend=LIPS)]
    share, n = float(np.mean([c.stay is not None for c in found])), len(found)
    told = Measure(name="mouth_closed_share", value=share, unit="", better="higher", n=n, backend=LIPS,
                   interval=closure.wilson(share, n))
    waits = {name: [(getattr(c, field), c.window) for c in found] for name, field in names.items()}
    return [*(_closing(name, seconds, shut) for name, seconds in waits.items()), told]


def _closing(name: str, found: Sequence[tuple[float | None, float]], shut: int) -> Measure:
    """Median of seconds; where there are none, the time until new speech, for it was at least that."""
    lost = sum(seconds is None for seconds, _ in found)
    if lost == len(found):
        reason = f"not before new speech, in all of {lost} interruptions"
        return absent(name, reason, unit="s", better="lower", backend=LIPS, status="failed")
    waits = [window if seconds is None else seconds for seconds, window in found]
    said = (f"{shut} left out: the mouth was shut already" if shut else "",
            f"{lost} not before new speech, the time until which stands for them" if lost else "")
    return Measure(name=name, value=float(np.median(waits)), unit="s", better="lower", n=len(waits),
                   interval=bootstrap(waits, np.median), backend=LIPS, reason="; ".join(filter(None, said)))


def persons(found: Sequence[Change]) -> list[Measure]:
    """portrait_change: median of those that came; portrait_before, portrait_after: mean shares, see Change."""
    by = {"backend": WHO, "weights_sha256": NETWORK_SHA256}
    came = [c.seconds for c in found if c.seconds is not None]
    lost = len(found) - len(came)
    never = f"in {lost} of {len(found)} the new person was never seen" if lost else ""
    if came:
        wait = Measure(name="portrait_change", value=float(np.median(came)), unit="s", better="lower", n=len(came),
                       interval=bootstrap(came, np.median), reason=never, **by)
    else:
        wait = absent("portrait_change", never, unit="s", better="lower", backend=WHO, status="failed")
    shares = {"portrait_before": [c.before for c in found], "portrait_after": [c.after for c in found]}
    return [wait, *(_share(name, values, by) for name, values in shares.items())]


def _share(name: str, values: Sequence[float | None], by: dict) -> Measure:
    known = [value for value in values if value is not None]
    if not known:
        return absent(name, "no face of a usable size", backend=WHO)
    return Measure(name=name, value=float(np.mean(known)), unit="", better="higher", n=len(known),
                   interval=bootstrap(known), **by)
