"""What a stranger's SDP may say: offers and trickled candidates, checked before aiortc acts on them.

aiortc's parser knows no error of its own (it asserts, indexes and unpacks), and what it lets pass may fail later, in a
task nobody waits for. Hence everything that is needed to connect is asked for here, and the rest is refused by name.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from aiortc import RTCIceCandidate, sdp

from liveavatar.serving.problems import Invalid, Unprocessable

LINES, CANDIDATES = 1000, 64  # at most; a browser's offer has about 250 lines
PARSER_ERRORS = (ValueError, LookupError, AssertionError, AttributeError, TypeError, StopIteration)
FINGERPRINTS = {"sha-256": 32, "sha-384": 48, "sha-512": 64}  # bytes
END = "a=end-of-candidates"  # is passed over: a peer of whom we know no address shows it by its own checks, which may still come
SENDS, TAKES = ("sendonly", "sendrecv"), ("recvonly", "sendrecv")


@dataclass(frozen=True)
class Offer:
    """An offer that can be answered. text: without candidates nobody may make us send to. wants: codecs the peer would
    take. speaks: it has a microphone. mid: of the section all others are bundled with. ufrag: of its ICE."""

    text: str
    kinds: tuple[str, ...]
    wants: frozenset[str]
    speaks: bool
    mid: str
    ufrag: str


def read_offer(text: str) -> Offer:
    """Raises Invalid for what is no SDP, Unprocessable for an offer we cannot answer."""
    parsed = _parse(text)
    wrong = next(_complaints(parsed), None)
    if wrong:
        raise Unprocessable(f"offer: {wrong}")
    directions = {media.kind: media.direction or "sendrecv" for media in parsed.media}
    wants = {codec for kind, codec in (("video", "h264"), ("audio", "opus")) if directions.get(kind) in TAKES}
    speaks = directions.get("audio") in SENDS
    if not wants and not speaks:
        raise Unprocessable("offer: it neither takes picture or sound nor sends sound")
    kept = [line for line in text.splitlines() if line.strip() != END and (not line.startswith("a=candidate:") or _usable(_candidate(line)))]
    return Offer("\r\n".join(kept) + "\r\n", tuple(media.kind for media in parsed.media), frozenset(wants), speaks, _bundle(parsed)[0],
                 parsed.media[0].ice.usernameFragment)  # fmt: skip


def reachable(host: str) -> bool:
    """Whether we send checks to that candidate. Not to names: browsers hide their address behind `.local` names, asking
    the network for them costs a second, and their own checks show us the address. Not to this machine or the link."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved)


@dataclass(frozen=True)
class Fragment:
    """Candidates that came after the offer (trickle ICE), each with the mid it was said for."""

    ufrag: str
    candidates: tuple[RTCIceCandidate, ...]


def read_fragment(text: str) -> Fragment:
    """Raises Invalid for what is no fragment of SDP with a user name fragment."""
    lines = text.splitlines()
    ufrags = {line.removeprefix("a=ice-ufrag:").strip() for line in lines if line.startswith("a=ice-ufrag:")}
    if len(ufrags) != 1 or len(lines) > LINES:
        raise Invalid("fragment: one a=ice-ufrag line says whose candidates these are")
    found, mid = [], None
    for line in lines:
        mid = line.removeprefix("a=mid:").strip() if line.startswith("a=mid:") else mid
        if line.startswith("a=candidate:"):
            found.append(_candidate(line))
            found[-1].sdpMid = mid
    return Fragment(ufrags.pop(), tuple(filter(_usable, found)))


def _usable(candidate: RTCIceCandidate) -> bool:
    return candidate.protocol.lower() == "udp" and candidate.component == 1 and reachable(candidate.ip)


def _parse(text: str) -> sdp.SessionDescription:
    if not text.startswith("v=0") or len(text.splitlines()) > LINES:
        raise Invalid(f"offer: SDP begins with v=0 and has at most {LINES} lines")
    try:
        return sdp.SessionDescription.parse(text)
    except PARSER_ERRORS as error:
        raise Invalid("offer: not understood as SDP") from error


def _candidate(line: str) -> RTCIceCandidate:
    try:
        candidate = sdp.candidate_from_sdp(line.removeprefix("a=candidate:"))
    except PARSER_ERRORS as error:
        raise Invalid("candidate: not understood") from error
    if not 0 <= candidate.port <= 65535 or candidate.type not in ("host", "srflx", "relay"):
        raise Invalid("candidate: unknown type, or no port")
    return candidate


def _bundle(parsed: sdp.SessionDescription) -> list[str]:
    return next((group.items for group in parsed.group if group.semantic == "BUNDLE"), [])


def _complaints(parsed: sdp.SessionDescription):
    """Yields what keeps us from answering."""
    kinds = [media.kind for media in parsed.media]
    if not kinds or len(set(kinds)) < len(kinds) or set(kinds) - {"audio", "video", "application"}:
        yield "one section at most of each: audio, video, application"
    mids = [media.rtp.muxId for media in parsed.media]
    if not all(mids) or len(set(mids)) < len(mids) or set(mids) != set(_bundle(parsed)) or len(mids) != len(_bundle(parsed)):
        yield "every section has its a=mid, and one a=group:BUNDLE holds them all"
    if sum(len(media.ice_candidates) for media in parsed.media) > CANDIDATES:
        yield f"more than {CANDIDATES} candidates"
    for media in parsed.media:
        yield from _section_complaints(media)


def _section_complaints(media: sdp.MediaDescription):
    ice = media.ice
    if not _ice_word(ice.usernameFragment, 4) or not _ice_word(ice.password, 22):
        yield f"{media.kind}: a=ice-ufrag (4-256 characters) and a=ice-pwd (22-256) are needed"
    if media.dtls is None or not media.dtls.fingerprints or not all(map(_good_fingerprint, media.dtls.fingerprints)):
        yield f"{media.kind}: a=setup and a=fingerprint (sha-256, sha-384 or sha-512) are needed"
    if media.kind == "application" and (media.sctp_port is None or not 0 < media.sctp_port < 65536):
        yield "application: a=sctp-port is needed"
    if media.kind != "application" and not media.rtcp_mux:
        yield f"{media.kind}: a=rtcp-mux is needed"


def _ice_word(value: str | None, shortest: int) -> bool:
    return value is not None and shortest <= len(value) <= 256 and value.isascii() and all(c.isalnum() or c in "+/" for c in value)


def _good_fingerprint(fingerprint) -> bool:
    pairs = fingerprint.value.split(":")
    hexadecimal = all(len(pair) == 2 and set(pair.lower()) <= set("0123456789abcdef") for pair in pairs)
    return hexadecimal and len(pairs) == FINGERPRINTS.get(fingerprint.algorithm.lower())
