"""Where destinations are and how each kind is written; what of it may be shown (serving.md 8.1, 8.2)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.serving.packets import AAC, OPUS

HIDDEN = "***"
SHORTEST = 4  # characters of a part that is hidden wherever it stands: shorter ones would hide half of every message


@dataclass(frozen=True)
class Form:
    """How a kind of destination is written. live: a viewer waits at the far end, so what is old is not sent on connecting."""

    format: str
    schemes: tuple[str, ...]
    sound: str
    channels: int
    live: bool
    options: dict[str, str]


FORMS = {
    "rtmp": Form("flv", ("rtmp", "rtmps"), AAC, 1, True, {"flvflags": "no_duration_filesize"}),
    "hls": Form("hls", (), AAC, 1, False, {
        "hls_time": "1", "hls_list_size": "6", "hls_segment_type": "fmp4", "hls_segment_options": "use_editlist=0",  # hls.js reads none
        "hls_flags": "delete_segments+independent_segments+program_date_time+discont_start"}),
    "whip": Form("whip", ("http", "https"), OPUS, 2, True, {}),
}  # fmt: skip
PLAYLIST = "index.m3u8"
LIFE_SEGMENTS = 10**9  # of HLS: each connection numbers its own, so that numbers grow whatever happens


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a destination is. kind: rtmp, hls, whip. url: with its key; of hls the folder, which exists. token: bearer, of whip."""

    kind: str
    url: str = field(repr=False)
    token: str | None = field(default=None, repr=False)

    def __post_init__(self):
        one_of("kind", self.kind, tuple(FORMS))
        schemes = FORMS[self.kind].schemes
        if schemes and not _is_url(self.url, schemes):
            raise ConfigError(f"a destination of kind {self.kind} needs a URL like {schemes[0]}://host/...")
        if not schemes and not Path(self.url).is_dir():
            raise ConfigError(f"a destination of kind {self.kind} needs a folder that exists")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.kind == "whip"):
            raise ConfigError("a token is a line of ASCII, and only whip takes one")

    @property
    def host(self) -> str | None:
        """Name or address of the server; None for a folder."""
        return urlsplit(self.url).hostname if FORMS[self.kind].schemes else None

    @property
    def shown(self) -> str:
        """The URL for people: server and application, never user, key or query. Of a folder its name."""
        if self.host is None:
            return Path(self.url).name
        parts = urlsplit(self.url)
        port = f":{parts.port}" if parts.port else ""
        application = parts.path.strip("/").split("/")[0] if self.kind == "rtmp" and parts.path.count("/") > 1 else ""
        return "/".join(part for part in (f"{parts.scheme}://{parts.hostname}{port}", application, HIDDEN) if part)

    def redact(self, text: str) -> str:
        """`text` without what only we and the server may know."""
        text = text.replace(self.url, self.shown)
        for secret in self._secrets():
            text = text.replace(secret, HIDDEN)
        return text

    def _secrets(self) -> list[str]:
        """The longest first, so that none is left in part."""
        if self.host is None:
            return []
        parts = urlsplit(self.url)
        places = parts.path.strip("/").split("/")
        places = places[self.kind == "rtmp" and len(places) > 1 :]
        found = [self.token, parts.username, parts.password, parts.query, "/".join(places), *places, *(value for _, value in parse_qsl(parts.query))]
        hidden = {secret for secret in found if secret and len(secret) >= SHORTEST}
        return sorted(hidden | {quote(secret, safe="") for secret in hidden}, key=len, reverse=True)

    def job(self, address: str | None, width: int, height: int, life: int) -> dict:
        """What the writing process must know. address: the one to connect to, None for what the name says then. width, height: of the
        encoded pictures. life: how many processes came before."""
        form, url = FORMS[self.kind], self.url
        options = dict(form.options)
        if self.kind == "hls":
            folder = Path(url)
            url = str(folder / PLAYLIST)  # files of their own for each life: players keep what they have of the old ones
            options["start_number"], options["hls_segment_filename"] = str(life * LIFE_SEGMENTS), str(folder / f"{life}-%d.m4s")
            options["hls_fmp4_init_filename"] = f"{life}-init.mp4"
        if self.kind == "whip":
            options["cert_file"], options["key_file"] = (str(path) for path in certificate())
        if urlsplit(url).scheme == "rtmp" and address is not None:  # rtmps keeps the name, whose certificate is asked for
            url = _at(url, address)
        return {"url": url, "format": form.format, "options": options, "width": width, "height": height, "sound": form.sound,
                "channels": form.channels, "address": address, "token": self.token}  # fmt: skip

    def tidy(self, life: int) -> None:
        """Remove what processes before the last one left in a folder: players have long gone on."""
        if self.kind == "hls":
            for path in Path(self.url).glob("*-*.m*4*"):
                if int(path.name.split("-")[0]) < life - 1:
                    path.unlink(missing_ok=True)


def _at(url: str, address: str) -> str:
    """`url` with an address in place of the name."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    host = f"[{address}]" if ":" in address else address
    return urlunsplit(parts._replace(netloc=user + at + host + (f":{parts.port}" if parts.port else "")))


def _is_url(url: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # a port or an address that is none
        return False


@lru_cache(maxsize=1)
def _certificate_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="liveavatar-whip-")  # only we can read it; gone when the process ends


@lru_cache(maxsize=1)
def certificate() -> tuple[Path, Path]:
    """Certificate and key (PEM) of this process for DTLS: ECDSA on P-256, since the handshake fails with what FFmpeg makes itself."""
    from datetime import UTC, datetime, timedelta

    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise ConfigError("WHIP needs the package cryptography: pip install 'liveavatar[serve]'") from None
    key, today = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "liveavatar")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
    signed = builder.not_valid_before(today - timedelta(days=1)).not_valid_after(today + timedelta(days=3650)).sign(key, hashes.SHA256())
    folder, pem = Path(_certificate_folder().name), serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"
