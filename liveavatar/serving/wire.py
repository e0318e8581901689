"""What travels over HTTP, as JSON. Strict: an unknown member is refused. Times are Unix seconds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints

from liveavatar.serving.problems import Problem
from liveavatar.serving.settings import MODES

TEXT, PROMPT = 2000, 2000  # characters said or prompted at once
Word = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Emotion = Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00-\x1f.!?]*$")]  # a word or two, inside a sentence
Prompt = Annotated[str, StringConstraints(max_length=PROMPT)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Metadata = Annotated[dict[Word, Annotated[str, StringConstraints(max_length=512)]], Field(max_length=16)]
Number = Annotated[int, Field(ge=0, lt=2**32)]  # of an epoch or a segment
Scope = Literal["view", "publish", "control", "admin"]
Mode = Literal[MODES]


class Wire(BaseModel):
    """Base of all: nothing unknown, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ProblemBody(BaseModel):
    """RFC 9457. request_id stands in the server's log, too."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[dict[str, str]] | None = None  # of a 422: {pointer, detail}


def problems(*statuses: int) -> dict[int | str, dict]:
    """`responses` of a route for OpenAPI; 401, 422 and 429 are everywhere."""
    found = {problem.status: problem for problem in _family(Problem)}
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {status: {"description": found[status].title, "content": content} for status in sorted({401, 422, 429, *statuses})}


def _family(cls: type) -> list[type]:
    return [*(member for child in cls.__subclasses__() for member in _family(child)), cls]


# ---------------------------------------------------------------- sessions


class Limits(Wire):
    """Leases shorter than the server's."""

    idle_seconds: Annotated[float, Field(gt=0, le=86_400)] | None = None
    length_seconds: Annotated[float, Field(gt=0, le=86_400 * 30)] | None = None


class WebhookWish(Wire):
    """Where this session's events are posted. secret: the key of the signature, yours; it is never shown."""

    url: Url
    secret: Annotated[SecretStr, Field(min_length=16, max_length=256)]


class OutputWish(Wire):
    """A destination. url: of rtmp and whip; it holds the stream key, so it is never shown again. token: bearer of whip."""

    kind: Literal["rtmp", "hls", "whip", "record"]
    url: Url | None = None
    token: Annotated[SecretStr, Field(max_length=4096)] | None = None
    name: Word | None = None


class SessionWish(Wire):
    """Body of POST /v1/sessions. profile: one of those that GET /v1/server names; what else is said here comes first."""

    avatar_id: Word = "default"
    mode: Mode | None = None
    profile: Word | None = None
    prompt: Prompt | None = None
    outputs: Annotated[list[OutputWish], Field(max_length=4)] = []
    limits: Limits = Limits()
    metadata: Metadata = {}
    webhook: WebhookWish | None = None


class SessionChange(Wire):
    """Body of PATCH: what is left out stays. A new avatar is a new reference picture in the running stream. emotion: how the person looks
    ("happy"), "" for no matter how. listening: somebody speaks to the avatar; ends by itself when the avatar speaks."""

    prompt: Prompt | None = None
    emotion: Emotion | None = None
    listening: bool | None = None
    avatar_id: Word | None = None
    metadata: Metadata | None = None


class LeaseView(Wire):
    """When the session ends by itself. idle_ends_at: unless somebody looks, speaks or sends a heartbeat. None: a channel's does not."""

    ends_at: float | None
    idle_ends_at: float | None


class SessionView(Wire):
    """A session. state: creating, ready, idle, speaking, closing, closed, failed (with reason)."""

    id: str
    avatar_id: str
    mode: str
    state: str
    reason: str | None
    epoch: int
    owner: str
    profile: str | None
    prompt: str | None
    emotion: str
    listening: bool
    width: int
    height: int
    viewers: int
    created_at: float
    lease: LeaseView | None
    metadata: dict[str, str]
    links: dict[str, str]


class SessionList(Wire):
    """All sessions the asker may see."""

    sessions: list[SessionView]


class TokenWish(Wire):
    """Body of POST .../tokens. Only scopes the asker has."""

    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4)] = ["view"]
    seconds: Annotated[float, Field(gt=0, le=3600)] | None = None


class Token(Wire):
    """A browser's token of one session."""

    token: str
    scopes: list[str]
    expires_at: float


class SayWish(Wire):
    """Text to be spoken. segment: default the next one."""

    text: Annotated[str, StringConstraints(min_length=1, max_length=TEXT, strip_whitespace=True)]
    segment: Number | None = None
    epoch: Number | None = None


class Accepted(Wire):
    """Speech that was taken. seconds: of sound, where it is known already."""

    epoch: int
    segment: int
    seconds: float | None


class InterruptedView(Wire):
    """position_ms: of the running segment, what was heard of it."""

    epoch: int
    position_ms: int


class OutputView(Wire):
    """How a destination does. url: server and application alone. state: connecting, live, waiting (for the next try), closed."""

    id: str
    name: str
    kind: str
    url: str | None
    state: str
    reconnects: int
    failures: int
    last_error: str | None
    bytes: int
    drops: int
    links: dict[str, str]


class OutputList(Wire):
    outputs: list[OutputView]


class RecordingView(Wire):
    """A finished recording. whole: nothing of it was lost. sha256: of the signed file. segments: {segment, start, end, interrupted}."""

    id: str
    session: str | None
    owner: str | None
    avatar: str | None
    consent: str | None
    began: str | None
    seconds: float | None
    bytes: int | None
    sha256: str | None
    signed: bool | None
    whole: bool
    segments: list[dict] | None
    epochs: list[dict] | None
    links: dict[str, str]


class RecordingList(Wire):
    recordings: list[RecordingView]


# ---------------------------------------------------------------- avatars, keys, the server


class AvatarView(Wire):
    """A face. embedded: belongs to the server."""

    id: str
    name: str
    owner: str
    embedded: bool
    consent_id: str | None
    digest: str
    created_at: float
    links: dict[str, str]


class AvatarList(Wire):
    """All avatars the asker may use."""

    avatars: list[AvatarView]


class ConsentView(Wire):
    """A record of consent. subject: None after erasure. state: valid, expired, revoked, erased. media: SHA-256 of the picture."""

    id: str
    subject: str | None
    scope: list[str]
    method: str
    media: str
    state: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    signature: str
    avatars: list[str]


class ConsentList(Wire):
    consents: list[ConsentView]


class MarkView(Wire):
    """payload: 32 bits in hex. confidence: that all of them are right. false_alarm: bound on the probability that an unmarked video says so."""

    found: bool
    payload: str | None
    confidence: float
    false_alarm: float
    pictures: int


class KeyWish(Wire):
    """Body of POST /v1/keys."""

    owner: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4)] = ["view", "publish", "control"]
    name: Annotated[str, StringConstraints(max_length=64)] = ""


class KeyView(Wire):
    """A server key, without what opens anything."""

    prefix: str
    owner: str
    scopes: list[str]
    name: str
    created_at: float


class NewKey(KeyView):
    """key: shown this once."""

    key: str


class KeyList(Wire):
    keys: list[KeyView]


class ServerView(Wire):
    """What this server is and can. reasons: why it is not ready. features: what may be asked of it."""

    version: str
    engine: str
    ready: bool
    reasons: list[str]
    draining: bool
    sessions: int
    role: list[str]
    owner: str
    features: list[str]
    profiles: list[str]
    limits: dict[str, float]


# ---------------------------------------------------------------- text messages of the stream socket, by "type"


class Hello(Wire):
    """First message where the subprotocol held no token. after: number of the last event that was seen."""

    type: Literal["hello"]
    token: Annotated[SecretStr, Field(max_length=4096)]
    after: Annotated[int, Field(ge=0, lt=2**53)] | None = None


class FormatOrder(Wire):
    """Of the binary messages from now on: Hz of the PCM ones."""

    type: Literal["format"]
    rate: Annotated[int, Field(ge=8000, le=192_000)]


class InterruptOrder(Wire):
    type: Literal["interrupt"]


class UpdateOrder(Wire):
    type: Literal["update"]
    prompt: Prompt | None = None
    emotion: Emotion | None = None
    listening: bool | None = None
    avatar_id: Word | None = None


class SayOrder(SayWish):
    type: Literal["say"]


class PingOrder(Wire):
    """Answered with {"type": "pong", "id": the same}; also keeps the session from being idle."""

    type: Literal["ping"]
    id: Annotated[int, Field(ge=0, lt=2**53)] | Annotated[str, StringConstraints(max_length=64)] | None = None


Order = Annotated[FormatOrder | InterruptOrder | UpdateOrder | SayOrder | PingOrder, Field(discriminator="type")]
