"""What an operator may say: the YAML of `liveavatar serve`, strict like every other config."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields, replace

from liveavatar.config import Config, one_of
from liveavatar.core import ConfigError

ENGINES = ("model", "testcard")
MODES = ("conversation", "livestream")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
TOKEN_SECONDS = 600.0  # a browser's token lives no longer (API-5)


def positive(section: str, settings: object, *names: str) -> None:
    """Raise ConfigError unless these fields are above 0 (None: not said)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:  # so put, not-a-number is refused too
            raise ConfigError(f"{section}.{name}={value}: must be positive")


def networks(key: str, said: tuple[str, ...]) -> None:
    """Raise ConfigError unless all are networks or addresses."""
    for text in said:
        try:
            ipaddress.ip_network(text)
        except ValueError as error:
            raise ConfigError(f"{key}: {text!r} is no network: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ListenConfig:
    """Sockets. Without access.required only loopback is allowed, unless `insecure` says the operator knows better."""

    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"  # metrics and drain, without a key: another one only where `insecure` says so
    admin_port: int | None = None  # None: /metrics on the main port, for server keys with scope admin and for loopback
    proxies: tuple[str, ...] = ()  # addresses or networks (CIDR) of reverse proxies whose X-Forwarded-For is believed; of all others it never is
    origins: tuple[str, ...] = ()  # of web pages that may call the API (CORS); the console needs none
    insecure: bool = False
    certificate: str | None = None  # PEM files for HTTPS; browsers give the microphone to https and localhost only
    key: str | None = None

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"listen.port={self.port}: must be 0..65535 (0: any free one)")
        if self.admin_port is not None and self.admin_host not in LOOPBACK and not self.insecure:
            raise ConfigError(f"listen.admin_host={self.admin_host}: that door asks for no key; keep it on 127.0.0.1, or set listen.insecure=true "
                              "where only operators reach it")
        networks("listen.proxies", self.proxies)
        if any(ipaddress.ip_network(proxy).prefixlen == 0 for proxy in self.proxies):
            raise ConfigError(f"listen.proxies={list(self.proxies)}: name the proxies' own addresses, else everybody could say from where they come")
        if "*" in self.origins:
            raise ConfigError("listen.origins: name the origins, '*' would let every page use a visitor's token")
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("listen.certificate and listen.key go together: set both or neither")


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Who may do what, and how much of it. Limits are per server key."""

    required: bool = True
    token_seconds: float = TOKEN_SECONDS  # life of a browser's token
    sessions: int = 8  # at once
    sessions_per_minute: int = 30
    offers_per_minute: int = 60
    requests_per_minute: int = 1200
    viewers: int = 20  # of one session
    audio_seconds_per_day: float = 86_400.0
    upload_bytes_per_day: int = 2_000_000_000  # of pictures and videos
    image_bytes: int = 10_000_000
    audio_bytes: int = 50_000_000

    def __post_init__(self):
        positive("access", self, "token_seconds", "sessions", "sessions_per_minute", "offers_per_minute", "requests_per_minute", "viewers",
                 "audio_seconds_per_day", "upload_bytes_per_day", "image_bytes", "audio_bytes")  # fmt: skip
        if self.token_seconds > TOKEN_SECONDS:
            raise ConfigError(f"access.token_seconds={self.token_seconds}: must be at most {TOKEN_SECONDS:g}; a page asks for a new one before that")


@dataclass(frozen=True, kw_only=True)
class SessionsConfig:
    """Leases and the queues of one session."""

    idle_seconds: float = 60.0  # without viewer and audio a session is closed after this
    length_seconds: float = 3600.0  # longest session; channels are unlimited
    audio_seconds: float = 60.0  # speech that may wait; beyond: 429 buffer_full
    park_seconds: float = 20.0  # idle for so long without a viewer: no blocks are made until somebody looks or speaks
    headroom: float = 0.15  # of the measured real-time factor that stays unused
    listening: bool = False  # while a user of a conversation or of Realtime speaks, the prompt says that the person listens
    degrade: bool = True  # leave things out, step by step, when pictures come too late (ladder.py); else they are just late
    drain_seconds: float = 600.0  # sessions may go on for so long after SIGTERM

    def __post_init__(self):
        positive("sessions", self, "idle_seconds", "length_seconds", "audio_seconds", "park_seconds", "drain_seconds")
        if not 0 <= self.headroom < 1:
            raise ConfigError(f"sessions.headroom={self.headroom}: must be in 0..1")


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Encoding, once per session for all its viewers and destinations."""

    encoder: str = "auto"  # auto: NVENC where one encodes a picture, else libx264
    preset: str = "veryfast"
    bitrate: int = 1_500_000  # bit/s of video
    sound_bitrate: int = 64_000
    keyframe_seconds: float = 1.0  # also what a recording loses at most when the server is killed
    scale: int = 1  # pictures leave so many times larger (a phone's decoder dislikes 128 px)

    def __post_init__(self):
        one_of("media.encoder", self.encoder, ("auto", "libx264", "h264_nvenc"))
        positive("media", self, "bitrate", "sound_bitrate", "keyframe_seconds", "scale")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What sessions opened with a profile's name have otherwise than this server's others; None: as those. See MediaConfig and SessionsConfig."""

    mode: str | None = None
    preset: str | None = None
    bitrate: int | None = None
    sound_bitrate: int | None = None
    keyframe_seconds: float | None = None
    scale: int | None = None
    audio_seconds: float | None = None
    park_seconds: float | None = None
    listening: bool | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """ICE. turn_secret_file: the static-auth-secret shared with coturn."""

    stun: tuple[str, ...] = ()  # stun:host:port
    turn: tuple[str, ...] = ()  # turn:host:port?transport=udp
    turn_secret_file: str | None = None
    turn_seconds: int = 3600
    relay_only: bool = False

    def __post_init__(self):
        if self.turn and self.turn_secret_file is None:
            raise ConfigError("network.turn needs network.turn_secret_file: credentials are made from the secret shared with the TURN server")
        positive("network", self, "turn_seconds")


@dataclass(frozen=True, kw_only=True)
class OutputsConfig:
    """Destinations: RTMP, HLS, WHIP. hosts: names they may have; private addresses only where listed in private."""

    hosts: tuple[str, ...] = ()  # empty: every public host
    private: tuple[str, ...] = ()  # networks (CIDR) that are allowed although private, e.g. 127.0.0.0/8
    stall_seconds: float = 5.0
    retry_seconds: float = 1.0
    retry_limit_seconds: float = 30.0

    def __post_init__(self):
        positive("outputs", self, "stall_seconds", "retry_seconds", "retry_limit_seconds")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """folder: keys, avatars, consents, recordings, the event log. Everything in it is private to the server."""

    folder: str = "var"
    recording_seconds: float = 3600.0  # a recording rolls over after so long
    keep_days: float = 30.0  # recordings

    def __post_init__(self):
        positive("storage", self, "recording_seconds", "keep_days")


@dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """Text to speech. voice: none, hibari (in the extra [talk]) or flite (a Debian package), both local, or openai (any server with
    its /v1/audio/speech, which needs url)."""

    voice: str = "none"
    url: str | None = None
    model: str | None = None
    speaker: str | None = None
    key_file: str | None = None

    def __post_init__(self):
        one_of("speech.voice", self.voice, ("none", "hibari", "flite", "openai"))
        if self.voice == "openai" and self.url is None:
            raise ConfigError("speech.voice=openai needs speech.url, e.g. https://api.openai.com/v1")


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """Sessions may become conversations: microphones are understood and answered. It speaks with the voice of `speech`.

    mind: address of an OpenAI-compatible server; None: a small companion of rules, no language model. ears: address of a
    server with /audio/transcriptions, or the folder of a CTranslate2 Whisper; None: Whisper tiny.en, English.
    """

    mind: str | None = None
    model: str = "gpt-4o-mini"
    mind_key_file: str | None = None
    ears: str | None = None
    ears_key_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class RealtimeConfig:
    """A backend of OpenAI's Realtime interface that speaks through the avatar. url: ws:// or wss://."""

    url: str
    key_file: str | None = None

    def __post_init__(self):
        if not self.url.startswith(("ws://", "wss://")):
            raise ConfigError(f"realtime.url={self.url}: must begin with ws:// or wss://")


@dataclass(frozen=True, kw_only=True)
class ProvenanceConfig:
    """What says that the picture is made by a machine. All on unless switched off, and switching off is logged."""

    watermark: bool = True
    watermark_key_file: str | None = None  # None: made at first start in storage.folder
    badge: bool = True
    badge_text: str = "AI"
    badge_corner: str = "top-left"
    sign: bool = True  # C2PA manifest in recordings
    certificate: str | None = None  # PEM chain and key; None: a local authority is made at first start
    key: str | None = None

    def __post_init__(self):
        one_of("provenance.badge_corner", self.badge_corner, CORNERS)


@dataclass(frozen=True, kw_only=True)
class ModerationConfig:
    """What the operator does not want here (moderation.py). words: file with a word or phrase a line. url: of an endpoint that judges text as
    OpenAI's /v1/moderations does. faces: folder with pictures of people who must not become avatars."""

    words: str | None = None
    url: str | None = None
    model: str | None = None  # sent to the endpoint
    key_file: str | None = None
    private: tuple[str, ...] = ()  # networks (CIDR) in which the endpoint may be although they are private, e.g. 127.0.0.0/8
    seconds: float = 2.0  # for one judgement
    silent: str = "refuse"  # or allow: what passes without a judgement; on channels and livestreams nothing ever does
    faces: str | None = None
    face_distance: float = 0.6  # of two faces below which they are one person's: the network's authors' value

    def __post_init__(self):
        one_of("moderation.silent", self.silent, ("refuse", "allow"))
        positive("moderation", self, "seconds", "face_distance")
        networks("moderation.private", self.private)
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"moderation.url={self.url}: must begin with http:// or https://")


@dataclass(frozen=True, kw_only=True)
class MonitoringConfig:
    """Logs to stdout; spans to an OTLP collector where one is named.

    judge: folder of a trained judge network (`liveavatar train probe`), which is asked once a second whether the face is still the
    portrait's; identity_floor: what operators are warned below, a cosine.
    """

    log_level: str = "info"
    log_format: str = "json"
    otlp: str | None = None
    judge: str | None = None
    identity_floor: float = 0.5

    def __post_init__(self):
        if not 0 < self.identity_floor < 1:
            raise ConfigError(f"monitoring.identity_floor={self.identity_floor}: must be in 0..1")
        one_of("monitoring.log_level", self.log_level, ("debug", "info", "warning", "error"))
        one_of("monitoring.log_format", self.log_format, ("json", "text"))


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One server: the chain it runs and everything round it. engine_kind "testcard": no model, a moving test picture."""

    engine: Config = field(default_factory=Config)
    engine_kind: str = "model"
    mode: str = "conversation"
    listen: ListenConfig = field(default_factory=ListenConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    profiles: dict[str, ProfileConfig] = field(default_factory=dict)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    outputs: OutputsConfig = field(default_factory=OutputsConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    speech: SpeechConfig = field(default_factory=SpeechConfig)
    talk: TalkConfig | None = None
    realtime: RealtimeConfig | None = None
    provenance: ProvenanceConfig = field(default_factory=ProvenanceConfig)
    moderation: ModerationConfig = field(default_factory=ModerationConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)

    def __post_init__(self):
        one_of("engine_kind", self.engine_kind, ENGINES)
        one_of("mode", self.mode, MODES)
        for name in self.profiles:
            self.under(name)
        if self.talk is not None and self.speech.voice == "none":
            raise ConfigError("talk: a conversation needs a voice: set speech.voice, e.g. to hibari")
        if not (self.access.required or self.listen.host in LOOPBACK or self.listen.insecure):
            raise ConfigError(f"listen.host={self.listen.host}: without access.required anybody could speak through the avatars; "
                              "listen on 127.0.0.1, require keys, or set listen.insecure=true")

    def under(self, profile: str) -> ServeConfig:
        """As it is for a session of this profile, which must be one of `profiles`. Raises ConfigError for impossible values in it."""
        said = {name: value for name, value in vars(self.profiles[profile]).items() if value is not None}
        sections = {}
        for section in ("media", "sessions"):
            own = getattr(self, section)
            sections[section] = own, {field.name: said.pop(field.name) for field in fields(own) if field.name in said}
        try:
            return replace(self, profiles={}, **said, **{section: replace(own, **values) for section, (own, values) in sections.items()})
        except ConfigError as error:
            raise ConfigError(f"profiles.{profile}: {error}") from None
