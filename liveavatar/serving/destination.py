"""The process that writes one destination or file: packets in on stdin, reports out on stdout, killable at any time.

It imports PyAV and nothing of ours (torch must not load here) and is run by its path. A muxer can block for good (a
stalled RTMP server, a dead disk) and no option of FFmpeg's ends that, so the parent, which watches the reports,
kills. On stdin: one line of JSON, the job (see `open_container`); then packets, HEADER and data; end of input: finish the
container. On stdout, a line of JSON each: {"n", "bytes", "held", "heard"} after each mux() that came back, {"error"} and exit 1,
{"closed": true} and exit 0. Whatever else it prints are a crash's last words. Secrets (keys in URLs, tokens) come by stdin
because arguments and environment of a process can be read by others; the parent redacts what goes back.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import termios
from fractions import Fraction

import av

HEADER = struct.Struct(">BBqI")  # track, keyframe, pts (in the track's rate), bytes of data
VIDEO, SOUND = 0, 1
RATES = (90_000, 48_000)
DURATIONS = {"h264": 3_600, "opus": 960, "aac": 1_024}
LIBRARIES = {"opus": "libopus", "aac": "aac"}
ORPHAN_SECONDS = 60  # a call that takes so long has no living parent: the kernel's alarm ends the process
HIGHEST_DESCRIPTOR = 64


def open_container(job: dict) -> av.container.OutputContainer:
    """job: url, format, options of FFmpeg's muxer, width, height, sound ("aac", "opus"), channels. Opens nothing yet: the first mux() does."""
    container = av.open(job["url"], "w", format=job["format"], options=job["options"])
    container.add_mux_stream("h264", rate=25, width=job["width"], height=job["height"], time_base=Fraction(1, RATES[VIDEO]))
    # an encoder that encodes nothing: it fills in what a muxer must know of the sound
    layout = "stereo" if job["channels"] == 2 else "mono"
    container.add_stream(LIBRARIES[job["sound"]], rate=RATES[SOUND], layout=layout, time_base=Fraction(1, RATES[SOUND]))
    return container


def packets(file, container, sound: str):
    """What the parent sends, until it closes the pipe."""
    while header := file.read(HEADER.size):
        track, keyframe, pts, size = HEADER.unpack(header)
        packet = av.Packet(file.read(size))
        packet.stream, packet.time_base = container.streams[track], Fraction(1, RATES[track])
        packet.pts = packet.dts = pts
        packet.duration, packet.is_keyframe = DURATIONS["h264" if track == VIDEO else sound], bool(keyframe)
        yield packet


class FarEnd:
    """What the kernel knows of whom we write to; made once the container is connected. A file has none of it."""

    def __init__(self):
        used = [number for number in range(3, HIGHEST_DESCRIPTOR) if _is_socket(number)]
        sockets = [socket.socket(fileno=os.dup(number)) for number in used]
        self.streams = [s for s in sockets if s.type == socket.SOCK_STREAM]
        self.datagrams = [s for s in sockets if s.type == socket.SOCK_DGRAM]

    def held(self) -> int:
        """Bytes that were taken from us and not acknowledged yet: what a stalled server leaves behind."""
        return sum(struct.unpack("i", fcntl.ioctl(s, termios.TIOCOUTQ, bytes(4)))[0] for s in self.streams)

    def heard(self) -> bool:
        """Whether a datagram (RTCP, a check of consent) came since the last mux(), which takes in what waits."""
        return bool(self.datagrams and select.select(self.datagrams, [], [], 0)[0])


def _is_socket(number: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:  # not open
        return False


def run(file, say) -> None:
    """Write until the input ends. Raises av.FFmpegError and OSError as they come."""
    job = json.loads(file.readline())
    container, far = open_container(job), None
    count = size = 0
    try:
        for packet in packets(file, container, job["sound"]):
            length, heard = packet.size, far is not None and far.heard()
            signal.alarm(ORPHAN_SECONDS)
            container.mux(packet)
            signal.alarm(0)
            count, size, far = count + 1, size + length, far or FarEnd()
            say({"n": count, "bytes": size, "held": far.held(), "heard": heard})
    finally:
        signal.alarm(ORPHAN_SECONDS)
        container.close()


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides when we end

    def say(message: dict) -> None:
        print(json.dumps(message), flush=True)

    try:
        run(sys.stdin.buffer, say)
    except (av.FFmpegError, OSError) as error:
        say({"error": error.strerror or str(error)})
        return 1
    say({"closed": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
