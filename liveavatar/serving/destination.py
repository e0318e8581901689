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
import http.client
import json
import os
import select
import secrets
import signal
import socket
import ssl
import stat
import struct
import sys
import termios
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urljoin, urlsplit, urlunsplit

import av

HEADER = struct.Struct(">BBqI")  # track, keyframe, pts (in the track's rate), bytes of data
VIDEO, SOUND = 0, 1
RATES = (90_000, 48_000)
DURATIONS = {"h264": 3_600, "opus": 960, "aac": 1_024}
LIBRARIES = {"opus": "libopus", "aac": "aac"}
ORPHAN_SECONDS = 60  # a call that takes so long has no living parent: the kernel's alarm ends the process
HIGHEST_DESCRIPTOR = 64
WINDOW_AT = 228  # of struct tcp_info in linux/tcp.h
ANSWER_BYTES, ANSWER_SECONDS = 65_536, 10.0
TUNNEL_BYTES = 65_536  # read at a time
PORTS = {"http": 80, "https": 443, "rtmps": 443}


def open_container(job: dict) -> av.container.OutputContainer:
    """job: url, format, options of FFmpeg's muxer, width, height, sound ("aac", "opus"), channels; of WHIP and RTMPS also address (to connect
    to), of WHIP token (bearer), both perhaps null. What FFmpeg opens it opens with the first mux(). Raises OSError."""
    way = {"http": front, "https": front, "rtmps": tunnel}.get(urlsplit(job["url"]).scheme)
    container = av.open(way(job) if way else job["url"], "w", format=job["format"], options=job["options"])
    container.add_mux_stream("h264", rate=25, width=job["width"], height=job["height"], time_base=Fraction(1, RATES[VIDEO]))
    # an encoder that encodes nothing: it fills in what a muxer must know of the sound
    layout = "stereo" if job["channels"] == 2 else "mono"
    container.add_stream(LIBRARIES[job["sound"]], rate=RATES[SOUND], layout=layout, time_base=Fraction(1, RATES[SOUND]))
    return container


def packets(file, container, sound: str):
    """What the parent sends, until it closes the pipe."""
    while len(header := file.read(HEADER.size)) == HEADER.size:
        track, keyframe, pts, size = HEADER.unpack(header)
        if len(data := file.read(size)) < size:
            return  # the parent died in the middle
        packet = av.Packet(data)
        packet.stream, packet.time_base = container.streams[track], Fraction(1, RATES[track])
        packet.pts = packet.dts = pts
        packet.duration, packet.is_keyframe = DURATIONS["h264" if track == VIDEO else sound], bool(keyframe)
        yield packet


def front(job: dict) -> str:
    """Start a process that speaks HTTP with the WHIP server; the URL on loopback where FFmpeg finds it.

    FFmpeg's own HTTP follows redirects, token and all, verifies no certificate and cannot be told an address. The process
    serves whoever knows its path and ends with this one.
    """
    dial(job["url"], job["address"]).close()  # who cannot be reached, or is somebody else, is said here: FFmpeg would call it "5XX"
    server = HTTPServer(("127.0.0.1", 0), Front)
    server.job, server.place, server.resource, server.timeout = job, f"/{secrets.token_hex(16)}", None, 1.0
    parent = os.getpid()

    def serve() -> None:
        while os.getppid() == parent:
            server.handle_request()

    aside(serve)
    server.server_close()
    return f"http://127.0.0.1:{server.server_port}{server.place}"


def tunnel(job: dict) -> str:
    """Start a process that carries RTMP through TLS; the URL on loopback where FFmpeg finds it.

    FFmpeg's own TLS verifies no certificate unless it is told to, and PyAV passes it neither that nor an address. The far
    connection stays open in this process, too, where FarEnd watches it.
    """
    far, near = dial(job["url"], job["address"]), socket.create_server(("127.0.0.1", 0))
    near.settimeout(ORPHAN_SECONDS)
    aside(lambda: pump(near.accept()[0], far))
    far.detach()
    with near:
        parts = urlsplit(job["url"])
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(scheme="rtmp", netloc=f"{user}{at}127.0.0.1:{near.getsockname()[1]}"))


def aside(work) -> None:
    """Have work() done in a process of its own. A thread would not do: PyAV holds the interpreter while it connects."""
    if os.fork() == 0:
        try:
            for number in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)  # our pipes must not outlive the writer
            work()
        finally:
            os._exit(0)


def pump(near: socket.socket, far: ssl.SSLSocket) -> None:
    """Bytes both ways until one side ends; what `near` sent last still arrives. Raises OSError, also where one takes nothing for long."""
    near.settimeout(ORPHAN_SECONDS)
    while True:
        ready = select.select([near, far], [], [])[0]
        if near in ready:
            if not (data := near.recv(TUNNEL_BYTES)):
                return far.shutdown(socket.SHUT_WR)
            far.settimeout(ORPHAN_SECONDS)
            far.sendall(data)
        far.settimeout(0)  # a record may hold nothing for us, and several may wait where select does not see them
        try:
            while data := far.recv(TUNNEL_BYTES):
                near.sendall(data)
            return None
        except ssl.SSLWantReadError:
            pass


def dial(url: str, address: str | None) -> socket.socket:
    """A connection to the checked address, or to where the name leads; with TLS, if the certificate is that of the name and an authority
    of this system's, or of SSL_CERT_FILE and SSL_CERT_DIR, has signed it. Raises OSError."""
    parts = urlsplit(url)
    plain = socket.create_connection((address or parts.hostname, parts.port or PORTS[parts.scheme]), timeout=ANSWER_SECONDS)
    if parts.scheme == "http":
        return plain
    return ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)


class Front(BaseHTTPRequestHandler):
    """Hands offer and goodbye on, and the answer back."""

    def do_POST(self) -> None:
        offer = self.rfile.read(int(self.headers["Content-Length"]))
        self._pass_on(self.server.job["url"], offer)

    def do_DELETE(self) -> None:
        self._pass_on(self.server.resource, b"")

    def _pass_on(self, url: str | None, body: bytes) -> None:
        if self.path != self.server.place or url is None:
            return self.send_error(404)
        try:
            status, location, answer = ask(self.command, url, body, self.server.job)
        except (OSError, http.client.HTTPException):
            return self.send_error(504)
        if location and same_origin(url, resource := urljoin(url, location)):
            self.server.resource = resource
        self.send_response(502 if 300 <= status < 400 else status)
        self.send_header("Content-Type", "application/sdp")
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Location", self.server.place)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args) -> None:
        """Nothing."""


def ask(method: str, url: str, body: bytes, job: dict) -> tuple[int, str | None, bytes]:
    """Status, Location and body of one request; goes to the checked address, follows nothing."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    connection.sock = dial(url, job["address"])
    headers = {"Content-Type": "application/sdp", **({"Authorization": f"Bearer {job['token']}"} if job["token"] else {})}
    try:
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Location"), answer.read(ANSWER_BYTES)
    finally:
        connection.close()


def same_origin(a: str, b: str) -> bool:
    """Whether both are of one scheme, host and port."""
    return urlsplit(a)[:2] == urlsplit(b)[:2]


class FarEnd:
    """What the kernel knows of whom we write to; made once the container is connected. A file has none of it."""

    def __init__(self):
        used = [number for number in range(3, HIGHEST_DESCRIPTOR) if _is_socket(number)]
        sockets = [socket.socket(fileno=os.dup(number)) for number in used]
        self.streams = [s for s in sockets if s.type == socket.SOCK_STREAM]
        self.datagrams = [s for s in sockets if s.type == socket.SOCK_DGRAM]
        self._widest = [0] * len(self.streams)

    def held(self) -> int:
        """Bytes the kernels on the way have and the far program has not read: what a stalled server leaves behind.

        Ours holds what was not acknowledged. How much the far one holds shows in its window: it offers as much less.
        """
        total = 0
        for number, stream in enumerate(self.streams):
            window = _window(stream)
            self._widest[number] = max(self._widest[number], window)
            total += struct.unpack("i", fcntl.ioctl(stream, termios.TIOCOUTQ, bytes(4)))[0] + self._widest[number] - window
        return total

    def heard(self) -> bool:
        """Whether a datagram (RTCP, a check of consent) came since the last mux(), which takes in what waits."""
        return bool(self.datagrams and select.select(self.datagrams, [], [], 0)[0])


def _window(stream: socket.socket) -> int:
    """Bytes the far kernel offers to take (tcpi_snd_wnd, since Linux 5.4; 0 before)."""
    info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, WINDOW_AT + 4)
    return struct.unpack_from("I", info, WINDOW_AT)[0] if len(info) == WINDOW_AT + 4 else 0


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
