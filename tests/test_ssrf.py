"""Addresses that clients name (serving.md 18.4): a table of what is refused, however it is spelled, and what is connected to."""

import asyncio
import http.server
import ipaddress
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar.core import ConfigError
from liveavatar.serving.problems import Invalid, Problem, TooLarge, Unprocessable
from liveavatar.serving.ssrf import Blocked, Lookups, Unresolved, check, check_url, fetch, permitted, request

WEB = ("http", "https")


def answering(*addresses: str):
    return lambda name, port: addresses


def never(name, port):
    raise AssertionError(f"{name} was resolved")


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",  # own machine, private
    "169.254.169.254", "169.254.0.1", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192",  # metadata of clouds, shared space
    "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "192.88.99.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "100::1", "3fff::1", "5f00::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::8.8.8.8",  # v4 in v6
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1", "2001:0:0:0:0:0:80ff:fffe",
    "2a00:1450::5efe:7f00:1", "2a00:1450::200:5efe:7f00:1",
])  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not permitted(ipaddress.ip_address(address))
    for url in (f"http://[{address}]/" if ":" in address else f"http://{address}/", "http://name.example/"):
        with pytest.raises(Blocked) as error:
            check_url(url, WEB, resolve=answering(address))
        assert (error.value.status, error.value.kind, error.value.reason) == (403, "ssrf", "address")


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "11.0.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert permitted(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
@settings(max_examples=200, deadline=None)
def test_an_ipv4_address_inside_an_ipv6_one_is_judged_as_itself(address):
    mapped = ipaddress.ip_address(f"::ffff:{address}")
    assert permitted(mapped) == permitted(address) == permitted(ipaddress.IPv6Address(int(ipaddress.ip_address("64:ff9b::")) + int(address)))
    assert not permitted(address) or address.is_global


# ---------------------------------------------------------------- spellings


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0x7f.1", "127.0.0.1.1",
                                  "0", "00", "0x0", "1.2.3.04", "8.8.8.8.8", "256.1.1.1", "1.1.1.0x", "example.0x7f", "134744072", "[::1",
                                  "[::ffff:7f.0.0.1]", "[fe80::1%25eth0]", "[1.2.3.4]", "a:b:c"])  # fmt: skip
def test_odd_spellings_of_numbers_are_no_addresses(host):
    with pytest.raises(Problem) as error:
        check_url(f"http://{host}/", WEB, resolve=never)
    assert error.value.status in (400, 403)


@pytest.mark.parametrize("url", [
    "", "http://", "http:///x", "http://:80/", "//example.com/", "example.com", "http://user@example.com/", "http://user:secret@example.com/",
    "http://example.com@127.0.0.1/", "http://127.0.0.1#@example.com/", "http://example.com\\@127.0.0.1/", "http://example.com:0/",
    "http://example.com:99999/", "http://example.com:x/", "http://exa mple.com/", "http://example.com/\r\nHost: a", "http://ex\tample.com/",
    "http://①②⑦.⓪.⓪.①/", "http://exаmple.com/", "http://example%2ecom/", "http://-a.example/", "http://a..example/", "http://example.com:/",
    "http://" + "a" * 64 + ".example/", "http://example.com/" + "a" * 2048, "http://[::1]x/", "http://localhost%00.example/", None, 7,
])  # fmt: skip
def test_urls_that_parsers_read_differently_are_refused_before_any_name_is_resolved(url):
    with pytest.raises(Problem) as error:
        check_url(url, WEB, resolve=never)
    assert error.value.status in (400, 403)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.com/", "gopher://example.com/", "concat:a|b", "data:text/plain,x", "rtmp://example.com/x",
                                 "javascript:alert(1)", "jar:http://example.com!/"])  # fmt: skip
def test_other_schemes_are_refused(url):
    with pytest.raises((Blocked, Invalid)):
        check_url(url, WEB, resolve=never)


@given(st.text(alphabet="htp:/@[]#?%.\\ax0127\t", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_public_target_or_a_problem(text):
    try:
        target = check_url("http://" + text, WEB, resolve=answering("8.8.8.8"))
    except Problem as problem:
        assert problem.status in (400, 403)
    else:
        assert permitted(ipaddress.ip_address(target.address)) and 0 < target.port < 65536


# ---------------------------------------------------------------- names


def test_a_name_is_resolved_once_and_the_checked_address_is_the_one_to_use():
    asked = []
    target = check_url("rtmp://Live.Example.com./app/stream-key?a=b", ("rtmp",), resolve=lambda *asking: asked.append(asking) or ["8.8.4.4", "8.8.8.8"])
    assert asked == [("live.example.com", 1935)]
    assert (target.scheme, target.host, target.port, target.address) == ("rtmp", "live.example.com", 1935, "8.8.4.4")
    assert target.pinned == "rtmp://8.8.4.4:1935/app/stream-key?a=b"
    assert check_url("https://[2606:4700::1111]/x#part", WEB, resolve=never).pinned == "https://[2606:4700::1111]:443/x"


def test_one_bad_address_among_good_ones_refuses_the_name():
    with pytest.raises(Blocked):
        check_url("http://rebind.example/", WEB, resolve=answering("8.8.8.8", "127.0.0.1"))
    with pytest.raises(Blocked):
        check_url("http://empty.example/", WEB, resolve=answering())


def test_the_systems_resolver():
    for name in ("localhost", "name.invalid"):
        with pytest.raises(Blocked):
            asyncio.run(check(f"http://{name}/", WEB))


def test_names_that_hang_hold_up_nobody_else():
    """18.4: a domain that answers nobody has its share of the threads, and whoever asks for its names waits no longer than is given."""
    let, asked = threading.Event(), []

    def slow(name, port):
        asked.append(name)
        if name.endswith(".evil.example"):
            let.wait(10)
        return ["8.8.8.8"]

    lookups = Lookups(slow, most=8, seconds=0.1)

    async def ask(name: str) -> str:
        try:
            return (await lookups.resolve(name, 80))[0]
        except Unresolved:
            return "none"

    async def story():
        hanging = await asyncio.gather(*(ask(f"n{n}.evil.example") for n in range(50)))
        assert set(hanging) == {"none"} and len(asked) == 2, "a quarter of eight threads, and nothing waits for one"
        assert await asyncio.gather(*(ask(f"live.site{n}.example") for n in range(6))) == ["8.8.8.8"] * 6
        let.set()
        async with asyncio.timeout(5):
            while await ask("www.evil.example") == "none" or lookups._running:
                await asyncio.sleep(0.01)

    asyncio.run(story())


def test_operators_lists():
    public = answering("8.8.8.8")
    hosts = ("live.example.com", "*.cdn.example")
    for url in ("rtmp://live.example.com/x", "rtmp://LIVE.example.com/x", "rtmp://a.b.cdn.example/x"):
        assert check_url(url, ("rtmp",), hosts=hosts, resolve=public).address == "8.8.8.8"
    for url in ("rtmp://example.com/x", "rtmp://evil-live.example.com/x", "rtmp://cdn.example/x", "rtmp://xcdn.example/x", "rtmp://8.8.8.8/x"):
        with pytest.raises(Blocked) as error:
            check_url(url, ("rtmp",), hosts=hosts, resolve=never)
        assert error.value.reason == "host"
    assert check_url("rtmp://127.0.0.1:19350/a", ("rtmp",), private=("127.0.0.0/8",), resolve=never).port == 19350
    assert check_url("rtmp://[::ffff:10.1.2.3]/a", ("rtmp",), private=("10.0.0.0/8",), resolve=never).address == "10.1.2.3"
    with pytest.raises(Blocked):
        check_url("rtmp://10.1.2.3/a", ("rtmp",), private=("127.0.0.0/8",), resolve=never)
    with pytest.raises(ConfigError, match="outputs.private"):
        check_url("rtmp://10.1.2.3/a", ("rtmp",), private=("10.0.0.1/8",), resolve=never)


def test_a_refusal_does_not_repeat_the_stream_key():
    for url in ("rtmp://127.0.0.1/app/SECRET", "ftp://example.com/SECRET", "rtmp://0x7f.1/app/SECRET", "rtmp://u:SECRET@example.com/"):
        with pytest.raises(Problem) as error:
            check_url(url, ("rtmp",), resolve=never)
        assert "SECRET" not in error.value.detail


# ---------------------------------------------------------------- fetching


class Far(http.server.BaseHTTPRequestHandler):
    """/ok answers, /loop redirects, /large is larger than allowed, /slow never ends; what was asked is kept."""

    asked: list = []

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, self.path, self.headers["Host"], body))
        if self.path == "/slow":
            return self.server.stop.wait(5)
        self.send_response(302 if self.path == "/loop" else 200)
        if self.path == "/loop":
            self.send_header("Location", "/ok")
        self.end_headers()
        self.wfile.write(b"x" * (5000 if self.path == "/large" else 5))

    do_POST = do_GET  # noqa: N815

    def log_message(self, *words):
        pass


@pytest.fixture
def far():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Far)
    server.stop, Far.asked = threading.Event(), []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.stop.set()
    server.shutdown()
    server.server_close()


def test_fetching_goes_to_the_checked_address_under_the_old_name(far, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr("liveavatar.serving.ssrf.system_resolve", answering("127.0.0.1"))
    own = {"private": ("127.0.0.0/8",)}
    assert asyncio.run(fetch(far + "/ok", limit=100, **own)) == b"xxxxx"
    assert asyncio.run(request("POST", far + "/ok", body=b"{}", headers={"Host": "evil"}, **own)) == (200, b"xxxxx")
    name = far.removeprefix("http://")
    assert Far.asked == [("GET", "/ok", name, b""), ("POST", "/ok", name, b"{}")]


@pytest.mark.parametrize("path, error, words", [("/loop", Unprocessable, "answered 302"), ("/large", TooLarge, "1,000"), ("/slow", Unprocessable, "within")])
def test_redirects_and_too_much_of_anything_end_a_fetch(far, path, error, words):
    with pytest.raises(error, match=words):
        asyncio.run(fetch(far.replace("localhost", "127.0.0.1") + path, limit=1000, seconds=1.0, private=("127.0.0.0/8",)))
    assert len(Far.asked) == 1


def test_private_addresses_are_not_fetched(far):
    with pytest.raises(Blocked):
        asyncio.run(fetch(far + "/ok", limit=100))
    assert Far.asked == []


def test_nobody_there():
    with pytest.raises(Unprocessable, match="cannot be read"):
        asyncio.run(fetch("http://127.0.0.1:9/", limit=100, private=("127.0.0.0/8",)))
