"""Addresses that clients name, and that we then connect to: image links, RTMP and WHIP targets, webhooks (serving.md 18.4).

    target = await check(url, ("rtmp", "rtmps"), hosts=outputs.hosts, private=outputs.private)   # Blocked (403 ssrf)
    connect to target.address, target.port; or open target.pinned, with target.host as Host header and TLS name
    data = await fetch(url, limit=10_000_000, ...)      # http(s): all of it done
    status, body = await request("POST", url, body=...)   # likewise, for webhooks

Everything that is not a public address is refused unless the operator listed its network. The name is resolved once and every
address it has is checked; whoever connects uses the checked address, so that a second answer of the DNS changes nothing. Redirects are
never followed. What the far side of a public address does (a proxy, a NAT) cannot be seen from here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import SplitResult, urlsplit, urlunsplit

from liveavatar.core import ConfigError
from liveavatar.serving import tls
from liveavatar.serving.problems import Forbidden, Invalid, TooLarge, Unprocessable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Iterable[str]]

PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443, "rtmp": 1935, "rtmps": 443}
LENGTH = 2048  # characters of an address
NAME = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)")  # a last label like this makes an IPv4 address of a name, in one of a dozen spellings
NAT64 = ipaddress.ip_network("64:ff9b::/96")
REFUSED = tuple(map(ipaddress.ip_network, (
    "168.63.129.16/32", "192.0.0.0/24",  # the hosts of two clouds, public by their numbers
    "192.88.99.0/24", "2002::/16", "2001::/32",  # 6to4 and Teredo carry an IPv4 address that would escape the check
    "64:ff9b:1::/48", "100::/64", "::/96", "fec0::/10", "2001:db8::/32", "3fff::/20", "5f00::/16",
)))  # fmt: skip
ISATAP = (0x00005EFE, 0x02005EFE)  # third 32-bit word of an IPv6 address that carries an IPv4 one


class Blocked(Forbidden):
    """An address that must not be connected to. reason: scheme, host or address (as the metric counts it)."""

    kind = "ssrf"

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Unresolved(Blocked):
    """A name without an address, for now: whoever may wait can try again."""

    def __init__(self, host: str):
        super().__init__("host", f"host {host}: cannot be resolved")


@dataclass(frozen=True)
class Target:
    """Where to connect. url: as given. address: the checked one, text. pinned: the url with the address in place of the name."""

    url: str
    scheme: str
    host: str
    port: int
    address: str
    pinned: str


async def check(url: str, schemes: tuple[str, ...], *, hosts: tuple[str, ...] = (), private: tuple[str, ...] = ()) -> Target:
    """As check_url, with the name looked up beside the event loop. Raises Unresolved also for one that takes too long."""
    host, port, literal = _named(url, schemes, hosts)
    found = [] if literal else await LOOKUPS.resolve(host, port)
    return check_url(url, schemes, hosts=hosts, private=private, resolve=lambda host, port: found)


def check_url(url: str, schemes: tuple[str, ...], *, hosts: tuple[str, ...] = (), private: tuple[str, ...] = (),
              resolve: Resolver) -> Target:  # fmt: skip
    """Whether a server may be connected to, and at which address.

    schemes: allowed ones, of PORTS. hosts: allowed names, "*.example.com" for all below one; empty: every name. private:
    networks (CIDR) allowed although not public. resolve: (name, port) -> addresses. Raises Invalid for what is no
    plain URL, Blocked for the rest; their text never repeats the path, which may hold a stream key.
    """
    networks = tuple(_network(text) for text in private)
    host, port, literal = _named(url, schemes, hosts)
    found = [literal] if literal else [_address(text) for text in resolve(host, port)]
    if not found:
        raise Blocked("host", f"host {host}: has no address")
    for address in found:
        if not permitted(address, networks):
            raise Blocked("address", f"host {host}: has an address that is not public")
    parts = urlsplit(url)
    return Target(url, parts.scheme, host, port, str(found[0]), _pinned(parts, found[0], port))


def permitted(address: Address, private: tuple = ()) -> bool:
    """Whether an address is public, or in one of the networks `private`."""
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        return permitted(mapped, private)
    if any(address in network for network in private):
        return True
    if address in NAT64:
        return permitted(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF), private)
    if address.version == 6 and (int(address) >> 32) & 0xFFFFFFFF in ISATAP:
        return False
    if any(address in network for network in REFUSED):
        return False
    local = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not local


def system_resolve(name: str, port: int) -> list[str]:
    """Addresses of a name, by the system. Raises Unresolved when there are none."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Unresolved(name) from None
    return list(dict.fromkeys(entry[4][0] for entry in found))


class Lookups:
    """Names to addresses, beside the event loop. A look-up that hangs cannot be ended: it holds its thread until the system gives up.

    So there are `most` threads for nothing else, nobody waits longer than `seconds`, and a domain (the last two labels of a
    name, of which whoever owns it has as many as they like) gets a quarter of them at once; beyond, its names do not resolve.
    """

    def __init__(self, resolve: Resolver = system_resolve, most: int = 16, seconds: float = 5.0):
        self._resolve, self._share, self._seconds = resolve, most // 4, seconds
        self._threads, self._lock, self._running = ThreadPoolExecutor(most, "dns"), threading.Lock(), Counter[str]()

    async def resolve(self, host: str, port: int) -> list[str]:
        """Raises Unresolved."""
        domain = ".".join(host.split(".")[-2:])
        with self._lock:
            if self._running[domain] >= self._share:
                raise Unresolved(host)
            self._running[domain] += 1
        work = self._threads.submit(self._resolve, host, port)
        work.add_done_callback(lambda work: self._over(domain))  # also where it was given up before it began
        try:
            async with asyncio.timeout(self._seconds):
                return list(await asyncio.wrap_future(work))
        except TimeoutError:
            raise Unresolved(host) from None

    def _over(self, domain: str) -> None:
        with self._lock:
            self._running -= Counter((domain,))  # keeps what is above 0 alone


LOOKUPS = Lookups()


async def fetch(url: str, *, limit: int, seconds: float = 10.0, hosts: tuple[str, ...] = (), private: tuple[str, ...] = ()) -> bytes:
    """The body behind an http(s) address. Raises what request() raises, and Unprocessable when the answer is not 200."""
    status, body = await request("GET", url, limit=limit, seconds=seconds, hosts=hosts, private=private)
    if status != 200:
        raise Unprocessable(f"the address answered {status}", kind="fetch")
    return body


async def request(method: str, url: str, *, body: bytes = b"", headers: Mapping[str, str] = MappingProxyType({}), limit: int = 65_536, seconds: float = 10.0,
                  hosts: tuple[str, ...] = (), private: tuple[str, ...] = ()) -> tuple[int, bytes]:  # fmt: skip
    """Status and body of one http(s) exchange: checked, pinned, no redirect, no proxy, at most `limit` bytes and `seconds` in all.

    Raises what check raises, TooLarge, and Unprocessable (kind fetch) when the far side does not answer.
    """
    try:
        async with asyncio.timeout(seconds):
            target = await check(url, ("http", "https"), hosts=hosts, private=private)
            return await _exchange(method, target, body, headers, limit)
    except TimeoutError:
        raise Unprocessable(f"the address did not answer within {seconds:g} s", kind="fetch") from None


async def _exchange(method: str, target: Target, body: bytes, headers: Mapping[str, str], limit: int) -> tuple[int, bytes]:
    import httpx

    own = {"Host": urlsplit(target.url).netloc, "Accept-Encoding": "identity"}
    try:
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=None, verify=await tls.context()) as client:
            named = {"sni_hostname": target.host}  # certificates are checked against the name, not the address
            async with client.stream(method, target.pinned, content=body, headers={**headers, **own}, extensions=named) as answer:
                data = bytearray()
                async for chunk in answer.aiter_raw():
                    data += chunk
                    if len(data) > limit:
                        raise TooLarge(f"more than {limit:,} bytes")
                return answer.status_code, bytes(data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unprocessable(f"host {target.host} cannot be read ({type(error).__name__})", kind="fetch") from None


# ---------------------------------------------------------------- reading a URL


def _named(url: str, schemes: tuple[str, ...], hosts: tuple[str, ...]) -> tuple[str, int, Address | None]:
    """Host, port, and the address where the host is written as one."""
    _, host, port = _parsed(url, schemes)
    if hosts and not any(_matches(host, allowed.lower()) for allowed in hosts):
        raise Blocked("host", f"host {host}: not one that this server may connect to")
    return host, port, _literal(host)


def _parsed(url: str, schemes: tuple[str, ...]) -> tuple[SplitResult, str, int]:
    """The parts, the host in small letters, the port. Only URLs that every parser reads alike get through."""
    if not isinstance(url, str) or not 0 < len(url) <= LENGTH:
        raise Invalid(f"an address must have 1 to {LENGTH} characters")
    if not url.isascii() or not url.isprintable() or set(url) & set(' \\"<>^`{|}'):
        raise Invalid("an address holds only the ASCII characters of RFC 3986; write a name of other letters as xn--...")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise Invalid("not an address: scheme://host[:port]/path is needed") from None
    if parts.scheme not in schemes:
        raise Blocked("scheme", f"scheme {parts.scheme[:20] or 'missing'}: must be {' or '.join(schemes)}")
    if "@" in parts.netloc or "%" in parts.netloc:
        raise Invalid("an address must not carry a user, a password or a zone")
    if not host or port == 0 or parts.netloc.endswith(":"):
        raise Invalid("not an address: scheme://host[:port]/path is needed")
    return parts, host, port or PORTS[parts.scheme]


def _literal(host: str) -> Address | None:
    """The address where the host is written as one, None for a name. Raises Invalid for odd spellings: 2130706433, 0x7f.1, 0177.0.0.1."""
    if ":" in host or NUMBER.fullmatch(host.rpartition(".")[2]):
        return _address(host)
    if not NAME.fullmatch(host):
        raise Invalid("not a host name")
    return None


def _address(text: str) -> Address:
    try:
        address = ipaddress.ip_address(text)
        return getattr(address, "ipv4_mapped", None) or address
    except ValueError:
        raise Invalid("an IP address must be written in the usual way: 192.0.2.1 or [2001:db8::1]") from None


def _network(text: str):
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(f"outputs.private: {text!r} is no network: {error}") from None


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _pinned(parts: SplitResult, address: Address, port: int) -> str:
    name = f"[{address}]" if address.version == 6 else str(address)
    return urlunsplit((parts.scheme, f"{name}:{port}", parts.path, parts.query, ""))
