"""Looks at what is aired, once a second: is it black, does it stand still, can its mark be read, is it still that face (15, 19.3)?

Pictures are taken as a viewer gets them: encoded ones are decoded again, each second the last keyframe, and now and then all
up to the next one, for the mark is no longer whole in a keyframe alone. Everything costly is done in a thread, one
session after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

import av
import numpy as np
import structlog

from liveavatar.core import InputError
from liveavatar.serving.live import LiveSession
from liveavatar.serving.metrics import Metrics, sink_kind
from liveavatar.serving.packets import Packet, Tick
from liveavatar.serving.role import Role
from liveavatar.serving.spread import PAYLOAD_BITS
from liveavatar.serving.studio import Studio
from liveavatar.serving.watermark import GROUP, Detector, Reading

LOOK_SECONDS = 1.0
CHANGED = 8  # of 255: a pixel whose brightness differs by more has changed; what coding alone does is less
MARK_LOOKS = 30  # from one reading of the mark to the next, where all pictures must be decoded for it
MARK_PICTURES = 4 * GROUP  # a mark that cannot be read in so many pictures is not there

Aired = Tick | tuple[Packet, ...]  # see Broadcast.aired
Judge = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] -> float32 [E], of length 1: whose face it is

log = structlog.get_logger("liveavatar.inspection")


def decoded(packets: Sequence[Packet]) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each of some H.264 packets, the first of which is a keyframe. Raises av.FFmpegError."""
    context = av.CodecContext.create("h264", "r")
    for packet in (*(av.Packet(packet.data) for packet in packets), None):
        for frame in context.decode(packet):
            yield frame.to_ndarray(format="rgb24")


class MarkCheck:
    """Reads the mark of one session back. ratio: of its bits that were right at the last reading, None before. height: of pictures when
    they are marked. failed: told when it is not there."""

    def __init__(self, key: bytes, height: int, failed: Callable[[], None]):
        self.ratio: float | None = None
        self._key, self._height, self._failed = key, height, failed
        self._detector, self._shape = Detector(key, (height,)), None

    @property
    def under_way(self) -> bool:
        """Some pictures were read, and more are needed."""
        return self._detector.pictures > 0

    def add(self, pictures: Iterable[np.ndarray], payload: int) -> None:
        """uint8 [H, W, 3] each: those that were aired next. payload: what their mark should say."""
        before = self._detector.pictures // GROUP
        for picture in pictures:
            if picture.shape != self._shape:
                self._begin()
                self._shape = picture.shape
            self._detector.add(picture)
        if self._detector.pictures // GROUP > before:
            self._judge(self._detector.read(), payload)

    def _begin(self) -> None:
        self._detector = Detector(self._key, (self._height,))

    def _judge(self, reading: Reading, payload: int) -> None:
        good = reading.found and reading.payload == payload
        if good or reading.pictures >= MARK_PICTURES:
            self.ratio = 1 - (reading.payload ^ payload).bit_count() / PAYLOAD_BITS
            self._begin()
            if not good:
                self._failed()


class Eye:
    """On the pictures of one session. luma: mean brightness, 0..1. change: share of pixels that differ from the look before. likeness: to
    the portrait, 1: the same. None: not seen yet, or nobody judges it."""

    def __init__(self, mark: MarkCheck | None, judge: Judge | None):
        self.luma: float | None = None
        self.change: float | None = None
        self.likeness: float | None = None
        self.role: Role | None = None  # whose face it should be
        self.face: np.ndarray | None = None
        self._mark, self._judge, self._looks = mark, judge, 0
        self._seen: Aired | None = None
        self._before: np.ndarray | None = None

    @property
    def marked(self) -> float | None:
        """Share of the mark's bits that were read back right."""
        return self._mark and self._mark.ratio

    def fresh(self, aired: Aired | None) -> bool:
        """Whether this shows something that was not looked at before."""
        return bool(aired) and aired is not self._seen

    def look(self, aired: Aired, payload: int) -> None:
        """aired: what left last. payload: of its mark. Takes milliseconds, with a mark to read as long as a second of decoding."""
        self._seen = aired
        pictures = [aired.picture] if isinstance(aired, Tick) else list(decoded(aired if self._due() else aired[:1]))
        self._looks += 1
        if self._mark is not None and (isinstance(aired, Tick) or len(pictures) > 1):
            self._mark.add(pictures, payload)
        self._measure(pictures[-1])

    def _due(self) -> bool:
        return self._mark is not None and (self._looks % MARK_LOOKS == 0 or self._mark.under_way)

    def _measure(self, picture: np.ndarray) -> None:
        luma = picture.astype(np.float32) @ np.float32((0.2126, 0.7152, 0.0722))
        same = self._before is not None and self._before.shape == luma.shape
        self.luma = float(luma.mean()) / 255
        self.change = float((np.abs(luma - self._before) > CHANGED).mean()) if same else None
        self._before = luma
        if self.face is not None:
            self.likeness = float(self._judge(picture) @ self.face)


GAUGES = {"frame_luma_mean": "luma", "frame_change_ratio": "change", "watermark_selfcheck_ratio": "marked", "identity_similarity": "likeness"}


class Inspector:
    """Of one server. key: of the mark; None: nothing is marked. payload: what the mark of a role says. judge: None: nobody says whose
    face it is. sleep: waits so many seconds."""

    def __init__(self, metrics: Metrics, studio: Studio, *, key: bytes | None, payload: Callable[[Role], int], judge: Judge | None = None,
                 sleep: Callable[[float], Awaitable] = asyncio.sleep):  # fmt: skip
        self._metrics, self._studio, self._key, self._payload, self._judge, self._sleep = metrics, studio, key, payload, judge, sleep
        self._eyes: dict[str, Eye] = {}
        for name, fact in GAUGES.items():
            metrics.watch(name, lambda fact=fact: self._facts(fact))

    def _facts(self, fact: str) -> list[tuple[tuple[str, ...], float]]:
        """By kind of who watches; what nobody sees is not exported."""
        return [((kind,), value) for id, session in tuple(self._studio.sessions.items())
                if (value := getattr(self._eyes.get(id), fact, None)) is not None
                for kind in {sink_kind(sink) for sink in session.broadcast.sinks}]  # fmt: skip

    async def run(self) -> None:
        """Look for ever; cancel to end."""
        while True:
            await self._sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """At every session once."""
        for gone in self._eyes.keys() - self._studio.sessions.keys():
            del self._eyes[gone]
        for id, session in tuple(self._studio.sessions.items()):
            eye = self._eyes.get(id) or self._eyes.setdefault(id, self._eye(session))
            if eye.fresh(aired := session.broadcast.aired):
                try:
                    await self._know(eye, session.role)
                    await asyncio.to_thread(eye.look, aired, self._payload(session.role))
                except (av.FFmpegError, InputError) as error:  # no picture; a portrait that was erased
                    log.error("inspection_failed", session=id, reason=str(error))

    async def _know(self, eye: Eye, role: Role) -> None:
        """Whose face it should be, where somebody can tell."""
        if self._judge is not None and (eye.role is None or eye.role.picture is not role.picture):
            portrait = (await self._studio.engine.fitted(role.picture)).pixels.permute(1, 2, 0).numpy()
            eye.role, eye.face = role, await asyncio.to_thread(self._judge, portrait)

    def _eye(self, session: LiveSession) -> Eye:
        def failed() -> None:
            log.error("watermark_unreadable", session=session.id)
            self._metrics.provenance_failed("watermark")

        return Eye(None if self._key is None else MarkCheck(self._key, session.broadcast.size[1], failed), self._judge)
