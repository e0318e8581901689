"""Which STUN and TURN servers a peer may use, with short-lived credentials of TURN's REST scheme (NET-1).

The secret is shared with coturn (`use-auth-secret`): user name "<expiry>:<who>", credential base64(HMAC-SHA1(secret,
user name)). No state: coturn checks the same sum. Time is Unix time, for it is compared on another machine.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable
from pathlib import Path

from liveavatar.core import ConfigError
from liveavatar.serving.settings import NetworkConfig

SECRET_BYTES = 16  # the shortest secret that is taken


def credentials(secret: bytes, who: str, expiry: int) -> tuple[str, str]:
    """User name and credential that coturn takes until `expiry` (Unix seconds)."""
    username = f"{expiry}:{who}"
    return username, base64.b64encode(hmac.new(secret, username.encode(), hashlib.sha1).digest()).decode()


class IceServers:
    """The servers of `network`, as dictionaries of the browser's RTCIceServer; raises ConfigError for a bad secret file."""

    def __init__(self, network: NetworkConfig, now: Callable[[], float] = time.time):
        self.network, self._now = network, now
        self._secret = _secret(Path(network.turn_secret_file)) if network.turn and network.turn_secret_file else b""
        if network.relay_only and not network.turn:
            raise ConfigError("network.relay_only needs network.turn: nothing else relays")

    def __call__(self, who: str) -> list[dict]:
        """For one session or peer; `who` stands in TURN's log."""
        servers: list[dict] = [{"urls": list(self.network.stun)}] if self.network.stun else []
        if self.network.turn:
            username, credential = credentials(self._secret, who, int(self._now()) + self.network.turn_seconds)
            servers.append({"urls": list(self.network.turn), "username": username, "credential": credential})
        return servers

    def configuration(self, who: str) -> dict:
        """What a page hands to `new RTCPeerConnection`, and for how many seconds it holds."""
        policy = "relay" if self.network.relay_only else "all"
        return {"iceServers": self(who), "iceTransportPolicy": policy, "ttl": self.network.turn_seconds}


def links(servers: list[dict]) -> list[str]:
    """The same servers as values of WHEP's Link headers."""
    return [f'<{url}>; rel="ice-server"' + _login(server) for server in servers for url in server["urls"]]


def _login(server: dict) -> str:
    if "username" not in server:
        return ""
    return f'; username="{server["username"]}"; credential="{server["credential"]}"; credential-type="password"'


def _secret(path: Path) -> bytes:
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"network.turn_secret_file={path}: {error.strerror}") from None
    if len(secret) < SECRET_BYTES:
        raise ConfigError(f"network.turn_secret_file={path}: a secret has at least {SECRET_BYTES} bytes")
    return secret
