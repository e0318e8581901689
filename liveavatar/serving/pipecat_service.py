"""Pipecat (11): LiveAvatarVideoService goes between the voice and the transport, `..., tts, avatar, transport.output(), ...`.

It swallows the voice's sound and gives it back with pictures, in step. Needs pipecat-ai (extra `pipecat`), tested with
1.14. In the transport's parameters: video_out_enabled, video_out_is_live=False (PC-1: with True pictures are paced apart
from the sound), video_out_framerate=25 and the avatar's width and height, else every picture is resized.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import numpy as np

try:
    from pipecat.frames.frames import (
        CancelFrame, EndFrame, Frame, InterruptionFrame, OutputImageRawFrame, OutputTransportReadyFrame, StartFrame, TTSAudioRawFrame,
        TTSStartedFrame, TTSStoppedFrame,
    )  # fmt: skip
    from pipecat.processors.frame_processor import FrameDirection
    from pipecat.services.ai_service import AIService
    from pipecat.services.settings import ServiceSettings
except ImportError as error:
    raise ImportError("LiveAvatarVideoService needs Pipecat: pip install 'liveavatar[pipecat]'") from error

from liveavatar.core import LiveAvatarError
from liveavatar.serving.live import LiveSession
from liveavatar.serving.packets import SOUND_RATE, Edge, Mark, Tick
from liveavatar.serving.voices import say_to

EDGE_SECONDS = 0.4  # of ticks that may wait for the pipeline; beyond, the oldest go
DRAIN_SECONDS = 30.0  # at the end of the pipeline, for what is still being said
FIRST_SEGMENT = 1 << 20


class AvatarClient(Protocol):
    """An avatar somewhere: speech in, ticks out. open and close may be called often."""

    async def open(self) -> None: ...

    async def say(self, pcm: np.ndarray, rate: int, segment: int, end: bool) -> None:
        """int16 [n] mono; waits while the avatar is full."""

    async def interrupt(self) -> int:
        """Silence; returns the epoch from which on ticks count."""

    def ticks(self) -> AsyncIterator[Tick]:
        """Until close()."""

    async def close(self) -> None: ...


class InProcess:
    """A session of this process. make: opens it, e.g. lambda: studio.open(role); it is closed with the pipeline."""

    def __init__(self, make: Callable[[], Awaitable[LiveSession]]):
        self._make, self.session = make, None
        self._edge = _Ticks("pipecat", seconds=EDGE_SECONDS)

    async def open(self) -> None:
        """Raises Capacity, InputError."""
        if self.session is None:
            self.session = await self._make()
            self.session.add_sink(self._edge)

    async def say(self, pcm: np.ndarray, rate: int, segment: int, end: bool) -> None:
        """See AvatarClient. Raises Conflict when the session is over."""
        await say_to(self.session, (pcm, rate), segment=segment, end=end)

    async def interrupt(self) -> int:
        """See AvatarClient."""
        return (await self.session.interrupt(reason="pipecat")).epoch

    async def ticks(self) -> AsyncIterator[Tick]:
        """See AvatarClient."""
        while (tick := await self._edge.get()) is not None:
            yield tick

    async def close(self) -> None:
        """The session ends."""
        session, self.session = self.session, None
        if session is not None:
            session.remove_sink(self._edge)
            self._edge.close()
            await session.close("the pipeline ended")


class _Ticks(Edge):
    wants = frozenset({"raw"})


class LiveAvatarVideoService(AIService):
    """See the module. client: InProcess, or remote.RemoteAvatar; it is opened with the pipeline and closed with it."""

    Settings = ServiceSettings

    def __init__(self, client: AvatarClient, *, settings: ServiceSettings | None = None, **kwargs):
        super().__init__(settings=settings or ServiceSettings(model="liveavatar"), **kwargs)
        self._client = client
        self._pump_task: asyncio.Task | None = None
        self._epoch, self._transport_ready = 0, False
        self._next_segment = FIRST_SEGMENT
        self._segments: dict[str | None, int] = {}  # contexts that are being said, by Pipecat's id
        self._contexts: dict[int, str | None] = {}  # of segments not yet heard to their end
        self._held: dict[int, TTSStoppedFrame] = {}  # PC-2: until the last sound of its segment has left
        self._speaking: int | None = None  # segment whose sound leaves now
        self._silent = asyncio.Event()
        self._silent.set()

    def can_generate_metrics(self) -> bool:
        """TTFB: from the voice's beginning to the first picture that speaks."""
        return True

    # ------------------------------------------------------------ lifecycle, each harmless when repeated

    async def start(self, frame: StartFrame) -> None:
        """Open the avatar. What fails is an error of the pipeline."""
        await super().start(frame)
        if self._pump_task is None:
            try:
                await self._client.open()
            except LiveAvatarError as error:
                await self.push_error(error_msg=f"the avatar could not be opened: {error}", exception=error)
                return
            self._pump_task = self.create_task(self._pump(), "pump")

    async def stop(self, frame: EndFrame) -> None:
        """Let what is being said be heard, then close."""
        await super().stop(frame)
        try:
            await asyncio.wait_for(self._silent.wait(), DRAIN_SECONDS)
        except TimeoutError:
            await self.push_error(error_msg=f"the avatar was still speaking {DRAIN_SECONDS:g} s after the end")
        await self._shut()

    async def cancel(self, frame: CancelFrame) -> None:
        """Close now."""
        await super().cancel(frame)
        await self._shut()

    async def cleanup(self) -> None:
        """Close, if nobody did."""
        await super().cleanup()
        await self._shut()

    async def _shut(self) -> None:
        task, self._pump_task = self._pump_task, None
        if task is not None:
            await self.cancel_task(task)
        await self._client.close()

    # ------------------------------------------------------------ frames that come

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Swallow the voice's sound, hold its end back, pass everything else on."""
        await super().process_frame(frame, direction)
        match frame:
            case TTSAudioRawFrame() if self._pump_task is not None:
                await self._say(frame)
                return
            case TTSStoppedFrame() if frame.context_id in self._segments:
                await self._stopped(frame)
                return
            case TTSStartedFrame():
                await self.start_ttfb_metrics()
            case InterruptionFrame() if self._pump_task is not None:
                await self._interrupt()
            case OutputTransportReadyFrame():
                self._transport_ready = True
        await self.push_frame(frame, direction)

    async def _say(self, frame: TTSAudioRawFrame) -> None:
        segment = self._segments.get(frame.context_id)
        if segment is None:
            segment = self._segments[frame.context_id] = self._next_segment
            self._next_segment += 1
            self._contexts[segment] = frame.context_id
            self._silent.clear()
        pcm = np.frombuffer(frame.audio, "<i2").reshape(-1, frame.num_channels)
        await self._client.say(np.rint(pcm.mean(axis=1)).astype(np.int16), frame.sample_rate, segment, False)

    async def _stopped(self, frame: TTSStoppedFrame) -> None:
        segment = self._segments.pop(frame.context_id)
        self._held[segment] = frame
        await self._client.say(np.zeros(0, np.int16), SOUND_RATE, segment, True)

    async def _interrupt(self) -> None:
        self._segments.clear()
        self._contexts.clear()
        self._held.clear()
        self._speaking = None
        self._epoch = await self._client.interrupt()
        self._silent.set()

    # ------------------------------------------------------------ ticks that leave

    async def _pump(self) -> None:
        """25 a second, as the avatar's clock gives them (PC-3)."""
        async for tick in self._client.ticks():
            if tick.epoch >= self._epoch:  # an interruption overtook it
                await self._leave(tick)

    async def _leave(self, tick: Tick) -> None:
        for mark in tick.marks:
            if mark.name == "started" and mark.segment in self._contexts:
                self._speaking = mark.segment
                await self.stop_ttfb_metrics()
        if self._transport_ready:
            await self._show(tick)
        if self._speaking is not None:
            context = self._contexts.get(self._speaking)
            await self.push_frame(TTSAudioRawFrame(audio=tick.sound.tobytes(), sample_rate=SOUND_RATE, num_channels=1, context_id=context))
        for mark in tick.marks:
            if mark.name == "finished":
                await self._finished(mark)

    async def _show(self, tick: Tick) -> None:
        height, width, _ = tick.picture.shape
        image = OutputImageRawFrame(image=tick.picture.tobytes(), size=(width, height), format="RGB")
        image.sync_with_audio = self._speaking is not None  # shown when all sound before it was played: the picture goes first
        await self.push_frame(image)

    async def _finished(self, mark: Mark) -> None:
        if mark.segment not in self._contexts:
            return
        del self._contexts[mark.segment]
        if self._speaking == mark.segment:
            self._speaking = None
        if (held := self._held.pop(mark.segment, None)) is not None:
            await self.push_frame(held)
        if not self._contexts:
            self._silent.set()
