"""A viewer against a real aiortc peer: what it is sent, when, what it gives back, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import re
import threading
import time
import weakref
from fractions import Fraction
from importlib.metadata import version

import av
import numpy as np
import pytest

pytest.importorskip("aiortc", reason="WebRTC needs the extra: pip install 'liveavatar[serve]'")

from aiortc import RTCRtpSender, rtp
from aiortc.mediastreams import AudioStreamTrack, MediaStreamError
from viewer_kit import Card, Peer, playing, read_bar_code, until

from liveavatar.serving import webrtc
from liveavatar.serving.offers import read_offer
from liveavatar.serving.packets import H264, OPUS, Packet
from liveavatar.serving.problems import Conflict, Invalid
from liveavatar.serving.webrtc import Patience, Viewer


class Quiet:
    """A session that sends nothing, and counts."""

    id = "quiet"

    def __init__(self):
        self.asked, self.sinks = 0, []

    def add_sink(self, sink):
        self.sinks.append(sink)

    def remove_sink(self, sink):
        self.sinks.remove(sink)

    def ask_keyframe(self):
        self.asked += 1


def picture(tick: int, key: bool = False, epoch: int = 0) -> Packet:
    return Packet(H264, b"\0\0\0\1\x65" + bytes(20), tick * 3600, 3600, 90_000, key, epoch, made=tick / 25)


def sound(number: int, epoch: int = 0) -> Packet:
    return Packet(OPUS, bytes(20), number * 960, 960, 48_000, True, epoch, made=number // 2 / 25)


async def connect(card, peer: Peer, **options) -> Viewer:
    viewer = Viewer(card, **options)
    await peer.accept(await viewer.answer(read_offer(await peer.offer())))
    await until(lambda: viewer.state == "connected")
    return viewer


def waiting(viewer: Viewer) -> tuple[list[float], list[float]]:
    """Seconds of the pts that wait in its edges."""
    return tuple([item.seconds for item in viewer.edges[codec]._items] for codec in (H264, OPUS))


# -- what aiortc must not change


def test_what_we_use_of_aiortc_is_private_and_as_it_was():
    """7.3: the keyframe hook and the clock of sender reports. Fails with a new aiortc: read its sender, then move the pin."""
    assert version("aiortc") == "1.16.0" and version("aioice") == "0.13.0"
    handled = inspect.getsource(RTCRtpSender._handle_rtcp_packet)
    assert "RTCP_PSFB_FIR" in handled and "RTCP_PSFB_PLI" in handled and "self._send_keyframe()" in handled
    loop, reports = inspect.getsource(RTCRtpSender._run_rtp), inspect.getsource(RTCRtpSender._run_rtcp)
    assert loop.index("await self._next_encoded_frame") < loop.index("self.__ntp_timestamp = clock.current_ntp_time()")
    assert "ntp_timestamp=self.__ntp_timestamp" in reports and "rtp_timestamp=self.__rtp_timestamp" in reports
    assert ".pack(data)" in inspect.getsource(RTCRtpSender._next_encoded_frame), "packets are sent without encoding"


@pytest.mark.parametrize("kind", [rtp.RTCP_PSFB_PLI, rtp.RTCP_PSFB_FIR])
def test_a_peer_that_lost_pictures_asks_the_session(kind):
    async def body():
        session, peer = Quiet(), Peer()
        viewer = await connect(session, peer)
        asked, sender = session.asked, viewer._peer.getSenders()[0]
        await sender._handle_rtcp_packet(rtp.RtcpPsfbPacket(fmt=kind, ssrc=1, media_ssrc=sender._ssrc, fci=b""))
        assert session.asked == asked + 1
        await viewer.aclose()
        await peer.close()

    asyncio.run(body())


# -- the sink, without a network


def a_viewer(*wants: str) -> Viewer:
    viewer = Viewer(Quiet())
    viewer.wants = frozenset(wants or (H264, OPUS))
    return viewer


def a_track(viewer: Viewer, kind: str, codec: str, fresh, clock=lambda: 0.0) -> webrtc.PacketTrack:
    track = webrtc.PacketTrack(kind, viewer.edges[codec], viewer._barrier, viewer._wall, fresh, clock)
    track.sender = viewer
    return track


def test_nothing_leaves_before_both_have_something_and_pictures_begin_with_a_keyframe():
    """CLK-3; what cannot be decoded is not sent, and sound of before the first picture would only be late."""

    async def body():
        viewer = a_viewer()
        for tick in range(3):
            viewer.put(picture(tick))
            viewer.put(sound(2 * tick))
        assert waiting(viewer) == ([], []) and not viewer._barrier.is_set()
        viewer.put(picture(3, key=True))
        assert not viewer._barrier.is_set()
        viewer.put(sound(6))
        assert viewer._barrier.is_set() and waiting(viewer) == ([0.12], [0.12])
        begun = a_viewer()
        begun.put(sound(4)), begun.put(sound(5)), begun.put(sound(6)), begun.put(sound(7)), begun.put(picture(3, key=True))
        assert waiting(begun) == ([0.12], [0.12, 0.14]) and begun._barrier.is_set(), "sound of a tick comes before its picture"
        greeted = a_viewer()
        greeted.greet(picture(2, key=True)), greeted.put(sound(6)), greeted.put(picture(3)), greeted.put(picture(4, key=True))
        assert greeted._barrier.is_set() and waiting(greeted) == ([0.08, 0.16], [0.12]), "a still, sound at once, then pictures"
        alone = a_viewer(OPUS)
        alone.put(sound(0))
        assert alone._barrier.is_set(), "who takes sound only does not wait for pictures"

    asyncio.run(body())


def test_a_slow_viewer_holds_200_ms_loses_pictures_first_and_asks_for_a_keyframe():
    """BP-1 and the table of section 4: five pictures, 200 ms of sound."""

    async def body():
        viewer = a_viewer()
        viewer.put(picture(0, key=True))
        for tick in range(25):
            viewer.put(picture(tick + 1))
            viewer.put(sound(2 * tick)), viewer.put(sound(2 * tick + 1))
        pictures, sounds = waiting(viewer)
        assert len(pictures) <= 5 and len(sounds) == 10 and sounds[-1] == pytest.approx(0.98)
        assert viewer.session.asked >= 1
        viewer.put(picture(26)), viewer.put(picture(27, key=True)), viewer.put(picture(28))
        assert waiting(viewer)[0] == pytest.approx([27 / 25, 28 / 25])

    asyncio.run(body())


def test_after_an_interruption_nothing_of_the_past_leaves():
    """BRG-1: neither what waits, nor what an encoder still brings, nor what a track already holds."""

    async def body():
        viewer = a_viewer()
        viewer.put(picture(0, key=True)), viewer.put(sound(0)), viewer.put(sound(1))
        track = a_track(viewer, "audio", OPUS, lambda item: item.epoch >= viewer._epoch)
        assert (await track.recv()).pts == 0
        held = asyncio.ensure_future(track.recv())  # sound(1) is out of the edge, held back for 20 ms
        await asyncio.sleep(0)
        asked = viewer.session.asked
        viewer.flush(1)
        viewer.put(picture(1)), viewer.put(sound(2))
        assert waiting(viewer) == ([], []) and viewer.session.asked > asked, "the gap in the pictures needs a keyframe"
        viewer.put(picture(2, epoch=1)), viewer.put(picture(3, key=True, epoch=1)), viewer.put(sound(6, epoch=1))
        assert waiting(viewer)[0] == [0.12] and (await held).pts == 6 * 960
        viewer.edges[OPUS].close()
        with pytest.raises(MediaStreamError):
            await track.recv()

    asyncio.run(body())


def test_a_picture_that_was_held_back_and_will_not_leave_is_a_gap():
    async def body():
        viewer = a_viewer()
        viewer.put(picture(0, key=True)), viewer.put(sound(0))
        track = a_track(viewer, "video", H264, lambda item: item.epoch >= viewer._epoch)
        viewer._tracks.append(track)
        taking = asyncio.ensure_future(track.recv())
        await asyncio.sleep(0)
        assert track.held.pts == 0 and waiting(viewer)[0] == []
        asked = viewer.session.asked
        viewer.flush(1)
        viewer.put(picture(1, epoch=1)), viewer.put(picture(2, key=True, epoch=1))
        assert viewer.session.asked == asked + 1 and (await taking).pts == 2 * 3600

    asyncio.run(body())


def test_what_is_late_is_not_held_back():
    """Pictures leave 20 ms after their tick and a tick's second sound with them; a burst after a stall leaves at once."""

    async def body():
        late, viewer = 0.0, a_viewer()
        pictures, sounds = (a_track(viewer, kind, codec, lambda item: True, lambda: late) for kind, codec in (("video", H264), ("audio", OPUS)))
        viewer.put(picture(0, key=True)), viewer.put(sound(0)), viewer.put(sound(1))

        async def took(track) -> float:
            start = time.monotonic()
            await track.recv()
            return time.monotonic() - start

        assert await took(pictures) >= 0.019 and await took(sounds) < 0.015 and await took(sounds) >= 0.019
        late = 1.0
        for tick in range(1, 5):
            viewer.put(picture(tick)), viewer.put(sound(2 * tick)), viewer.put(sound(2 * tick + 1))
        start = time.monotonic()
        for track in [pictures] * 4 + [sounds] * 8:
            await track.recv()
        assert time.monotonic() - start < 0.1  # 0.16 s if each were held

    asyncio.run(body())


def test_both_tracks_tell_one_clock_and_pts_may_be_weeks_long():
    """CLK-1, CLK-6: wall time of a pts differs from another's by exactly the media time between them."""
    clock = webrtc.WallClock()
    first = clock.ntp(0.04)
    assert abs(first / 2**32 - (time.time() + 2_208_988_800)) < 1
    assert clock.ntp(0.04) == first and clock.ntp(30 * 86_400 + 0.04) - first == 30 * 86_400 << 32

    async def body():
        viewer = a_viewer(H264)
        track = a_track(viewer, "video", H264, lambda item: True)
        far = 60 * 86_400 * 25  # ticks: RTP's 32 bits have wrapped a hundred times
        viewer.put(picture(far, key=True)), viewer.put(picture(far + 1))
        packets = [await track.recv(), await track.recv()]
        assert [p.pts * p.time_base for p in packets] == [Fraction(far, 25), Fraction(far + 1, 25)]
        assert viewer._RTCRtpSender__ntp_timestamp == viewer._wall.ntp(far / 25)

    asyncio.run(body())


# -- over the network


def test_a_peer_sees_and_hears_the_card():
    """7.2, 7.3, section 20: H.264 alone is answered; a late joiner has a picture at once; one encoder serves two;
    sender reports of both tracks lie on one line."""

    async def body():
        async with playing(Card()) as card:
            await asyncio.sleep(0.5)
            first, second = Peer(), Peer(channel=False)
            one = await connect(card, first, patience=Patience(ping=0.2))
            await until(lambda: len(first.pictures) > 20)  # a late joiner is meant
            offered = await second.offer()
            two = Viewer(card)
            answer = await two.answer(read_offer(offered))
            names = {line.split()[1].split("/")[0] for line in answer.splitlines() if line.startswith("a=rtpmap")}
            assert names == {"H264", "rtx", "opus"}
            reports = {}
            await second.accept(answer)
            for receiver in second.pc.getReceivers():
                receiver._handle_rtcp_packet = lambda packet, kind=receiver.track.kind: keep(reports, kind, packet)
            await until(lambda: two.state == "connected")
            assert await until(lambda: second.pictures) < 1.0  # 0.1 to 0.2 s when the machine is idle
            await until(lambda: len(first.pictures) > 50 and all(len(reports.get(kind, [])) > 1 for kind in ("video", "audio")))
            made, seen = read_bar_code(first.pictures[-1][1]), round(time.time() * 1000)
            assert made is not None and (seen - made) % 2**20 < 1000
            for kind, rate in (("video", 90_000), ("audio", 48_000)):
                line = [(sr.ntp_timestamp / 2**32 - sr.rtp_timestamp / rate) % (2**32 / rate) for sr in reports[kind] if sr.packet_count]
                assert np.ptp(line) < 1e-4, (kind, line)  # the clock of the reports is that of the pts
            assert one.stats.rtt < 0.5 and one.stats.lost == 0 and one.stats.drops == 0 and any("ping" in m for m in first.messages)
            assert max(np.abs(s).max() for _, s in first.sound) > 3000, "the beep"
            await asyncio.gather(one.aclose(), two.aclose(), first.close(), second.close())
            assert card.sinks == []

    async def keep(reports, kind, packet):
        if isinstance(packet, rtp.RtcpSrPacket):
            reports.setdefault(kind, []).append(packet.sender_info)

    asyncio.run(body())


def test_a_peer_that_hides_its_addresses_is_found_by_its_own_checks():
    """Browsers name themselves x.local; nothing is asked of the network, and the end of candidates is not the end."""

    async def body():
        async with playing(Card()) as card:
            peer, viewer = Peer(), Viewer(card)
            offer = re.sub(r"(a=candidate:\S+ 1 udp \d+) \S+", r"\1 6d0f4a2e-1111-4222-8333-123456789abc.local", await peer.offer())
            assert ".local" in offer and "a=end-of-candidates" in offer
            await peer.accept(await viewer.answer(read_offer(offer)))
            await until(lambda: peer.pictures)
            await asyncio.gather(viewer.aclose(), peer.close())

    asyncio.run(body())


def test_a_session_that_ended_meanwhile_closes_the_peer():
    class Ended(Quiet):
        def add_sink(self, sink):
            raise Conflict("closed")

    async def body():
        peer, viewer = Peer(), Viewer(Ended())
        await peer.accept(await viewer.answer(read_offer(await peer.offer())))
        await until(lambda: viewer._closing is not None)
        await asyncio.gather(viewer.aclose(), peer.close())

    asyncio.run(body())


class Tone(AudioStreamTrack):
    """440 Hz, 48 kHz stereo, as a microphone would."""

    async def recv(self):
        await asyncio.sleep(0.02)
        self.at = getattr(self, "at", -960) + 960
        wave = (8000 * np.sin(2 * np.pi * 440 * (self.at + np.arange(960)) / 48_000)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave.repeat(2)[None], format="s16", layout="stereo")
        frame.pts, frame.sample_rate, frame.time_base = self.at, 48_000, Fraction(1, 48_000)
        return frame


def test_a_microphone_comes_back_as_16_khz_mono():
    async def body():
        async with playing(Card()) as card:
            peer = Peer(microphone=Tone())
            viewer = await connect(card, peer, heard=card.push_audio)
            await until(lambda: len(card.heard) > 60 and peer.pictures)
            pcm = np.concatenate([p for p, _ in card.heard[10:]])
            assert {rate for _, rate in card.heard} == {16_000} and pcm.dtype == np.int16 and pcm.ndim == 1
            spectrum = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))
            assert abs(spectrum.argmax() * 16_000 / len(pcm) - 440) < 5 and np.abs(pcm).max() > 4000
            await asyncio.gather(viewer.aclose(), peer.close())

    asyncio.run(body())


def test_a_slow_listener_loses_the_oldest_sound():
    async def body():
        pieces = []

        async def heard(pcm, rate):
            pieces.append(int(pcm[0]) if len(pcm) else None)
            await asyncio.sleep(0)

        microphone = webrtc.Microphone(None, heard)
        for n in range(webrtc.HEARD_FRAMES + 7):
            microphone._keep(np.full(320, n, np.int16))
        microphone._read = lambda: asyncio.sleep(0, microphone._keep(None))
        await microphone.run()
        assert pieces[0] == 8 and pieces[-2:] == [webrtc.HEARD_FRAMES + 6, None] and microphone.drops == 8

    asyncio.run(body())


def test_who_listens_is_told_when_a_microphone_is_switched_off_and_when_its_viewer_goes(monkeypatch):
    monkeypatch.setattr(webrtc, "MUTED_SECONDS", 0.05)

    async def body():
        pieces, on = [], asyncio.Event()

        class Switched(Tone):
            async def recv(self):
                await on.wait()
                return await super().recv()

        async def heard(pcm, rate):
            pieces.append(len(pcm) > 0)
            if pieces[-3:] == [True] * 3:
                on.clear()

        running = asyncio.create_task(webrtc.Microphone(Switched(), heard).run())
        for times in (1, 2):
            on.set()
            await until(lambda: pieces and not pieces[-1] and not on.is_set())
            assert pieces.count(False) == times, "once each time"
        on.set()
        await until(lambda: pieces[-1])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert not pieces[-1] and pieces.count(False) == 3

    asyncio.run(body())


def test_a_peer_that_vanished_is_closed_and_one_that_only_listens_is_not():
    """7.2: aiortc alone notices after 30 s. A peer without a data channel lives by its reports."""

    async def body():
        async with playing(Card()) as card:
            patience = Patience(ping=0.1, silent=2.0)
            gone, quiet = Peer(), Peer(channel=False)
            lost, kept = await connect(card, gone, patience=patience), await connect(card, quiet, patience=patience)
            await until(lambda: gone.pictures and quiet.pictures)
            gone.vanish()
            assert 1.5 < await until(lambda: lost.state == "closed") < 6
            assert kept.state == "connected" and card.sinks == [kept]
            await asyncio.gather(lost.aclose(), kept.aclose(), gone.close(), quiet.close())

    asyncio.run(body())


def test_nobody_stays_longer_for_not_having_been_asked():
    async def body():
        viewer = a_viewer()
        viewer._patience, viewer.state, viewer._sign = Patience(ping=60.0, silent=0.2), "connected", viewer._clock()
        viewer.session.add_sink(viewer)
        viewer._keep(viewer._watch())
        await until(lambda: viewer.state == "closed")
        await viewer.aclose()

    asyncio.run(body())


def test_who_never_connects_is_forgotten():
    async def body():
        now = [0.0]
        viewer = Viewer(Quiet(), patience=Patience(ping=0.01), clock=lambda: now[0])
        await viewer.answer(read_offer(await Peer().offer()))
        now[0] = 19.0
        await asyncio.sleep(0.05)
        assert viewer.state == "new"
        now[0] = 20.1
        await until(lambda: viewer.state == "closed")
        await viewer.aclose()

    asyncio.run(body())


def test_an_offer_whose_request_broke_off_leaves_nobody():
    """The limit counts who is on the way: a client that hangs up while candidates are gathered must not keep a place for good."""

    async def body():
        now = [0.0]
        viewer = Viewer(Quiet(), patience=Patience(ping=0.01), clock=lambda: now[0])
        asked = asyncio.ensure_future(viewer.answer(read_offer(await Peer().offer())))
        await asyncio.sleep(0)
        asked.cancel()
        now[0] = 20.1
        await until(lambda: viewer.state == "closed")
        await viewer.aclose()

    asyncio.run(body())


class Deaf:
    """A data channel whose peer acknowledges nothing."""

    readyState, bufferedAmount = "open", 0

    def on(self, event, handler):
        pass

    def send(self, text: str) -> None:
        self.bufferedAmount += len(text)


def test_who_asks_and_never_listens_fills_no_queue():
    async def body():
        viewer, channel = Viewer(Quiet()), Deaf()
        viewer._open_channel(channel)
        for _ in range(1000):
            viewer._message(json.dumps({"type": "ping", "t": "x" * 1000}))
        assert 30_000 < channel.bufferedAmount < webrtc.UNSENT_BYTES + 2000
        await viewer.aclose()

    asyncio.run(body())


def test_what_a_page_says_is_read_with_care():
    """MET-2: figures of reception go to whoever counts them; what makes no sense is passed over."""
    told = []

    def take(figures):
        told.append(figures)
        raise Invalid("no")

    async def body():
        viewer = Viewer(Quiet(), told=take)
        for text in ("{", "[]", "1", "null", b"\xff\xfe", "[" * 4000, '{"type": "ping", "t": [1]}', "x" * 5000, '{"type": "stats"}'):
            viewer._message(text)
        viewer._message('{"type": "stats", "report": {"freezeCount": 2}}')
        assert told == [None, {"freezeCount": 2}]
        await viewer.aclose()

    asyncio.run(body())


def test_two_hundred_peers_come_and_go_and_leave_nothing():
    """Section 20: tasks, descriptors, threads and objects are back where they were; ten of them really watched."""

    async def watch(card, kept: weakref.WeakSet) -> None:
        peer, viewer = Peer(), Viewer(card)
        kept.add(viewer)
        async with playing(card):
            await peer.accept(await viewer.answer(read_offer(await peer.offer())))
            await until(lambda: peer.pictures)
        await viewer.aclose()
        await peer.close()

    async def pass_by(card, offer, kept: weakref.WeakSet) -> None:
        viewer = Viewer(card)
        kept.add(viewer)
        await viewer.answer(offer)
        await viewer.aclose()

    def held() -> tuple[int, int, int]:
        return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), threading.active_count()

    async def body():
        card, kept, idler = Card(), weakref.WeakSet(), Peer(kinds=("video",), channel=False)
        offer = read_offer(await idler.offer())
        await watch(card, kept)
        await asyncio.sleep(0.1)
        before = held()
        for n in range(200):
            await (pass_by(card, offer, kept) if n % 20 else watch(card, kept))
        await asyncio.sleep(0.2)
        gc.collect()
        after = held()
        assert all(b <= a for a, b in zip(before, after, strict=True)), (before, after)
        assert len(kept) == 0 and card.sinks == []
        await idler.close()

    asyncio.run(body())
