"""Encoding: one packet per tick in time, decodable by browsers, exact A/V (serving.md 7.3, 7.4, CLK-1)."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor, Future

import av
import numpy as np
import pytest

from liveavatar.core import ConfigError
from liveavatar.serving import encoder as encoder_module
from liveavatar.serving.broadcast import Broadcast
from liveavatar.serving.encoder import AacEncoder, OpusEncoder, VideoEncoder
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.packets import H264, OPUS, TICK_SAMPLES, Tick
from liveavatar.serving.settings import MediaConfig
from onair import SIZE, moving_tick

EVENT, START = 30, 1_000  # the event's tick, counted from the first; sessions are long when somebody joins


def decoded(codec: str, packets, extradata=None) -> list:
    decoder = av.CodecContext.create(codec, "r")
    decoder.extradata = extradata
    frames = []
    for packet in packets:
        raw = av.Packet(packet.data)
        raw.pts = raw.dts = packet.pts
        frames += decoder.decode(raw)
    return frames + decoder.decode(None)


def units(data: bytes) -> list[int]:
    return [part[0] & 31 for part in data.split(b"\0\0\1")[1:]]


def heard(encoder, decoder: str, extradata=None) -> tuple[float, list]:
    """Seconds at which the click sits in what is decoded, and the packets."""
    packets = [p for i in range(START, START + 60) for p in encoder.encode(moving_tick(i, event=i == START + EVENT))]
    frames = decoded(decoder, packets, extradata)
    sound = np.concatenate([f.to_ndarray()[0] for f in frames]).astype(np.float64)
    sound = np.abs(sound) / np.abs(sound).max()
    return (frames[0].pts + np.flatnonzero(sound > 0.5)[0]) / 48_000, packets


def test_each_picture_is_one_packet_at_its_place_and_a_browser_can_decode_it():
    encoder = VideoEncoder(SIZE, SIZE, MediaConfig(encoder="libx264", keyframe_seconds=0.4, scale=2))
    asked = {START + 13}
    packets = []
    for index in range(START, START + 30):
        (packet,) = encoder.encode(moving_tick(index), made=index / 7, keyframe=index in asked)
        assert (packet.pts, packet.duration, packet.epoch, packet.made) == (index * 3600, 3600, index // 50, index / 7)
        packets.append(packet)
    keys = [p.pts // 3600 - START for p in packets if p.keyframe]
    assert keys == [0, 10, 13, 23]  # each 0.4 s counted from the last, and on demand
    for packet in packets:
        assert [k for k in units(packet.data) if k != 6] == ([7, 8, 5] if packet.keyframe else [1])  # one slice; SPS, PPS, IDR
        assert not packet.keyframe or packet.data.replace(b"\0\0\0\1", b"\0\0\1").startswith(encoder.extradata.replace(b"\0\0\0\1", b"\0\0\1"))
    profile, constraints = packets[0].data.split(b"\0\0\1")[1][1:3]
    assert profile == 66 and constraints & 0x40  # constrained baseline
    frames = decoded("h264", packets[13:])  # a late joiner starts at the IDR that was asked for
    assert [f.pts // 3600 for f in frames] == list(range(START + 13, START + 30))
    said = [[bytes(data) for data in f.side_data if data.type.name == "SEI_UNREGISTERED"] for f in frames[:2]]
    assert said[0][-1][16:] == b'{"ai_generated": true}' and not said[1]  # WM-2: decoders hand it on, with every IDR
    assert (frames[0].width, frames[0].height) == (2 * SIZE, 2 * SIZE) == (encoder.width, encoder.height)


def test_colours_survive():
    encoder = VideoEncoder(SIZE, SIZE, MediaConfig(encoder="libx264"))
    tick = Tick(index=0, epoch=0, kind="idle", picture=np.full((SIZE, SIZE, 3), (200, 60, 90), np.uint8), sound=np.zeros(TICK_SAMPLES, np.int16))
    (frame,) = decoded("h264", encoder.encode(tick, 0.0))
    assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited: the decoder is told
    picture = frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
    assert np.abs(picture.reshape(-1, 3).mean(0) - (200, 60, 90)).max() < 4


def test_flash_and_click_meet():
    """Exact A/V: the event of tick n is seen at n / 25 s and heard within 1 ms of it, by either codec."""
    video = VideoEncoder(SIZE, SIZE, MediaConfig(encoder="libx264"))
    packets = [p for i in range(START, START + 60) for p in video.encode(moving_tick(i, event=i == START + EVENT), 0.0)]
    seen = [f.pts / 90_000 for f in decoded("h264", packets) if f.reformat(format="gray").to_ndarray().mean() > 200]
    assert seen == [(START + EVENT) / 25]
    opus, aac = OpusEncoder(MediaConfig()), AacEncoder(MediaConfig())
    for encoder, decoder, extradata in ((opus, "opus", None), (aac, "aac", aac.extradata)):
        at, sound = heard(encoder, decoder, extradata)
        assert abs(at - seen[0]) < 1e-3, (decoder, at - seen[0])
        assert {b.pts - a.pts for a, b in zip(sound, sound[1:])} == {encoder.samples}  # no gap, no overlap
        assert START * TICK_SAMPLES - 1024 <= sound[0].pts < START * TICK_SAMPLES
        assert all(p.keyframe for p in sound)


def test_packets_of_sound_carry_the_newest_epoch_and_gaps_keep_the_clock():
    for encoder, inside in ((OpusEncoder(MediaConfig()), 312), (AacEncoder(MediaConfig()), 2 * 1024)):
        before = [p for i in range(50) for p in encoder.encode(moving_tick(i), made=1.0)]
        (*_, last) = encoder.encode(moving_tick(50), made=2.0)
        assert {p.epoch for p in before} == {0} and (last.epoch, last.made) == (1, 2.0)
        after = [p for i in range(80, 90) for p in encoder.encode(moving_tick(i))]  # ticks 51 to 79 were left out
        waiting = 90 * TICK_SAMPLES - (after[-1].pts + encoder.samples)
        assert inside <= waiting < inside + encoder.samples
        assert all(b.pts - a.pts >= encoder.samples for a, b in zip([last, *after], after))


def test_sound_leaves_before_its_picture_is_encoded():
    """7.5: a browser holds sound back by how irregular it comes; the picture's encoder takes 2 ms or, where cores are shared, 50."""

    class Slow(Executor):
        def submit(self, work, *args):
            self.work, self.done = lambda: work(*args), Future()
            return self.done

    class Ear:
        name, wants, got = "webrtc:ear", frozenset({H264, OPUS}), []

        def put(self, item):
            self.got.append(item.codec)

    async def scene():
        slow, ear = Slow(), Ear()
        broadcast = Broadcast(SIZE, SIZE, MediaConfig(encoder="libx264"), slow, lambda: 0.0, Metrics(version="test"))
        broadcast.add(ear)
        sending = asyncio.create_task(broadcast.send(moving_tick(0)))
        await asyncio.sleep(0)
        assert ear.got == [OPUS] * 2
        slow.done.set_result(slow.work())
        await sending
        assert ear.got == [OPUS, OPUS, H264]

    asyncio.run(scene())


def test_bits_stay_within_the_bitrate():
    """Noise is the worst that can come: x264 must keep to media.bitrate."""
    rng, config = np.random.default_rng(0), MediaConfig(encoder="libx264", bitrate=400_000, preset="ultrafast")
    encoder, silence = VideoEncoder(128, 128, config), np.zeros(TICK_SAMPLES, np.int16)
    noise = [rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(5)]
    ticks = [Tick(index=i, epoch=0, kind="idle", picture=noise[i % 5], sound=silence) for i in range(75)]
    bits = 8 * sum(len(p.data) for tick in ticks for p in encoder.encode(tick, 0.0))
    assert bits / 3 < 1.2 * 400_000


def test_a_gpu_is_tried_once_and_one_that_is_full_is_no_failure(monkeypatch):
    """To find that there is no NVENC holds every session up; where there is, it may open a few at a time."""
    tried, real = [], encoder_module._context

    def context(name, *rest):
        tried.append(name)
        if name == "h264_nvenc" and tried.count(name) not in works:
            raise av.FFmpegError(1, "no capable devices found")
        return real("libx264", *rest)

    monkeypatch.setattr(encoder_module, "_context", context)
    works = ()
    assert [VideoEncoder(66, 34, MediaConfig()).name for _ in range(3)] == ["libx264"] * 3 and tried.count("h264_nvenc") == 1
    works = (2, 3)  # the proof and the first session
    assert [VideoEncoder(68, 34, MediaConfig()).name for _ in range(2)] == ["h264_nvenc", "libx264"]
    works = (5,)
    with pytest.raises(ConfigError, match="no capable devices"):
        VideoEncoder(70, 34, MediaConfig(encoder="h264_nvenc"))


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(ConfigError, match="even"):
        VideoEncoder(63, 64, MediaConfig())
    assert VideoEncoder(63, 64, MediaConfig(scale=2)).width == 126
    if VideoEncoder(256, 256, MediaConfig()).name == "libx264":  # no NVENC here
        with pytest.raises(ConfigError, match="h264_nvenc.*auto"):
            VideoEncoder(256, 256, MediaConfig(encoder="h264_nvenc"))
