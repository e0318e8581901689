"""Encode once, fan out: every codec somebody wants has one encoder, and its packets go to all who want it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from liveavatar.core import FPS
from liveavatar.serving.encoder import AacEncoder, OpusEncoder, VideoEncoder
from liveavatar.serving.metrics import Metrics, sink_kind
from liveavatar.serving.packets import AAC, CODECS, H264, OPUS, TICK_SECONDS, VIDEO_RATE, Packet, Sink, Tick
from liveavatar.serving.settings import MediaConfig
from liveavatar.serving.traffic import watch_sink

DEAD_BAND = 0.01  # seconds a picture may be late (CLK-2)
KEYFRAME_PAUSE = 0.5  # seconds between keyframes that viewers ask for (7.3)
SMALLEST = 192  # pixels of the shorter side that a smaller picture still has: below, encoding costs nothing worth saving


class Broadcast:
    """The sinks of one session and the encoders they need. width, height: of the ticks' pictures.

    Pictures are encoded on `executor`, after sound has left; ticks go one at a time, so packets keep their order. An encoder is
    made when the first sink wants its codec and dropped with the last. encode_seconds: of the last tick, for the latency budget. filler: why
    that tick's picture is an old one (metrics.FILLERS), or None. every, small: one picture in so many is encoded, and at
    half its width and height, where all who take it are browsers, since files and servers cannot follow (ladder.py).
    """

    def __init__(self, width: int, height: int, config: MediaConfig, executor: Executor, clock: Callable[[], float], metrics: Metrics):
        self.size, self.config, self.sinks = (width, height), config, list[Sink]()
        self.encode_seconds, self.filler = 0.0, None
        self.every, self.small = 1, False
        self._executor, self._clock, self._metrics = executor, clock, metrics
        self._encoders: dict[str, VideoEncoder | OpusEncoder | AacEncoder] = {}
        self._keyframe, self._last_keyframe = False, float("-inf")
        self._sent: float | None = None  # when the tick before left
        self._last: Tick | None = None
        self._group, self._filling = tuple[Packet, ...](), list[Packet]()  # pictures from a keyframe up to the next: the last whole ones
        self._watched: dict[int, Callable[[], None]] = {}  # id of a sink -> what ends its metrics

    def add(self, sink: Sink) -> None:
        """From the next tick on; a keyframe comes as soon as one may. Raises ConfigError when nothing here can encode."""
        for codec in sink.wants & set(CODECS):
            self._encoder(codec)
        self.sinks.append(sink)
        self._watched[id(sink)] = watch_sink(self._metrics, sink, self._clock)
        if H264 in sink.wants:
            self._keyframe = True
            if sink_kind(sink) == "webrtc" and (still := self._still()) is not None:
                sink.greet(still)

    def _still(self) -> Packet | None:
        """Where KEYFRAME_PAUSE lets a newcomer wait: the last keyframe, as if it were of now, for a viewer's clock goes by its first picture. What
        followed it is not sent on, for a burst of older pictures would make a browser play later for good."""
        key = self._filling[0] if self._filling else None
        paused = self._clock() - self._last_keyframe < KEYFRAME_PAUSE
        if key is None or not paused or key.made < self._last_keyframe or key.epoch < self._last.epoch:
            return None
        return replace(key, pts=self._last.index * VIDEO_RATE // FPS, made=self._clock())

    def remove(self, sink: Sink) -> None:
        """No more for this one. May be called often."""
        if sink in self.sinks:
            self.sinks.remove(sink)
            self._watched.pop(id(sink))()
        for codec in self._encoders.keys() - self._wanted():
            del self._encoders[codec]

    def _wanted(self) -> set[str]:
        return set().union(*(sink.wants for sink in self.sinks))

    @property
    def aired(self) -> tuple[Packet, ...] | Tick | None:
        """What left last: where anybody takes encoded pictures those from one keyframe up to the next, else a tick. None, (): nothing yet."""
        return self._group if H264 in self._wanted() else self._last

    def ask_keyframe(self) -> None:
        """A viewer cannot decode: the next picture is a keyframe, at most every KEYFRAME_PAUSE seconds."""
        self._keyframe = True

    def _encoder(self, codec: str) -> None:
        """Make the one of `codec` unless it is there; that of pictures also when their size is to change."""
        if codec == H264 and (here := self._encoders.get(H264)) is not None and here.shrink != self._shrink():
            del self._encoders[H264]
        if codec not in self._encoders:
            make = {H264: lambda: VideoEncoder(*self.size, self.config, shrink=self._shrink()), OPUS: lambda: OpusEncoder(self.config),
                    AAC: lambda: AacEncoder(self.config)}  # fmt: skip
            self._encoders[codec] = make[codec]()

    def _shrink(self) -> int:
        able = all(sink_kind(sink) == "webrtc" for sink in self.sinks if H264 in sink.wants)
        return 2 if self.small and able and min(self.size) * self.config.scale >= 2 * SMALLEST else 1

    async def send(self, tick: Tick) -> None:
        """Encode a tick and hand it to every sink."""
        made = self._clock()
        if H264 in self._encoders:
            self._encoder(H264)
        left_out = tick.index % self.every > 0
        keyframe = not left_out and self._keyframe and made - self._last_keyframe >= KEYFRAME_PAUSE
        if keyframe:
            self._keyframe, self._last_keyframe = False, made
        encoders = {codec: encoder for codec, encoder in self._encoders.items() if codec in self._wanted()}
        pictures = {codec: encoders.pop(codec) for codec in (H264,) if codec in encoders}
        self._hand_out(tick, *self._encoded(encoders, tick, made, False))  # sound is encoded in no time, and regular if it waits for nothing
        if pictures and not left_out:
            packets = await asyncio.get_running_loop().run_in_executor(self._executor, self._encoded, pictures, tick, made, keyframe)
            self._keep(packets)
            self._hand_out(*packets)
        self._last, self.encode_seconds = tick, self._clock() - made
        self._count(tick, [sink for sink in self.sinks if not left_out or "raw" in sink.wants])

    def _hand_out(self, *items: Tick | Packet) -> None:
        for sink in tuple(self.sinks):
            for item in items:
                if ("raw" if isinstance(item, Tick) else item.codec) in sink.wants:
                    sink.put(item)

    def _keep(self, pictures: list[Packet]) -> None:
        for packet in pictures:
            if packet.keyframe:
                self._group, self._filling = tuple(self._filling), []
            self._filling.append(packet)

    def _count(self, tick: Tick, reached: list[Sink]) -> None:
        now = self._clock()
        for sink in reached:
            interval = None if self._sent is None else now - self._sent
            self._metrics.frames_sent(kind := sink_kind(sink), interval=interval, late=tick.late > DEAD_BAND)
            if self.filler is not None:
                self._metrics.filler(kind, self.filler, float(TICK_SECONDS))
        self._sent = now if reached else self._sent

    def _encoded(self, encoders: dict, tick: Tick, made: float, keyframe: bool) -> list[Packet]:
        packets = []
        for codec, encoder in encoders.items():
            began = self._clock()
            packets += self._pictures(encoder, tick, made, keyframe) if codec == H264 else encoder.encode(tick, made)
            self._metrics.encoded(codec, self._clock() - began)
        return packets

    def _pictures(self, encoder: VideoEncoder, tick: Tick, made: float, keyframe: bool) -> list[Packet]:
        return [replace(packet, duration=packet.duration * self.every) for packet in encoder.encode(tick, made, keyframe)]

    def flush(self, epoch: int) -> None:
        """After an interruption: what waits in a sink and is older than `epoch` goes."""
        for sink in tuple(self.sinks):
            sink.flush(epoch)

    def close(self) -> None:
        """The session is over."""
        for sink in tuple(self.sinks):
            sink.close()
            self._watched.pop(id(sink))()
        self.sinks.clear()
        self._encoders.clear()
