"""What goes wrong between us and a client, as RFC 9457 problem details (API-4)."""

from __future__ import annotations

from collections.abc import Mapping

from liveavatar.core import LiveAvatarError

TYPES = "https://liveavatar.dev/problems/"


class Problem(LiveAvatarError):
    """An error a client caused or must know. status: of HTTP. kind: last part of the problem's type. headers: of the answer."""

    status, kind, title = 500, "internal", "Internal error"

    def __init__(self, detail: str = "", *, kind: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(detail or self.title)
        self.detail, self.headers = detail, dict(headers or {})
        self.kind = kind or self.kind

    def body(self, request_id: str) -> dict:
        """The members of application/problem+json."""
        return {"type": TYPES + self.kind, "title": self.title, "status": self.status, "detail": self.detail, "request_id": request_id}


class Invalid(Problem):
    """A request that cannot be understood."""

    status, kind, title = 400, "invalid", "Invalid request"


class Unauthorized(Problem):
    """No key or token, or one that is wrong or expired."""

    status, kind, title = 401, "unauthorized", "Authentication needed"

    def __init__(self, detail: str = "", *, kind: str | None = None):
        super().__init__(detail, kind=kind, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(Problem):
    """Known, but not allowed: scope, consent_revoked, ssrf."""

    status, kind, title = 403, "scope", "Not allowed"


class NotFound(Problem):
    """Nothing of that name, or it belongs to somebody else."""

    status, kind, title = 404, "not_found", "Not found"


class Conflict(Problem):
    """The state forbids it: state, idempotency."""

    status, kind, title = 409, "state", "Conflict"


class TooLarge(Problem):
    """More bytes than allowed."""

    status, kind, title = 413, "too_large", "Too large"


class Unsupported(Problem):
    """A media type we do not take."""

    status, kind, title = 415, "unsupported", "Unsupported media type"


class Unprocessable(Problem):
    """Understood, but it cannot be used: a picture without a face, sound without samples."""

    status, kind, title = 422, "unprocessable", "Cannot be used"


class RateLimited(Problem):
    """Too often or too much: rate, quota. what: of what, a label of rate_limited_total."""

    status, kind, title, what = 429, "rate", "Too many requests", "requests"


class BufferFull(RateLimited):
    """More speech waits than sessions.audio_seconds: nothing of this push was taken."""

    kind, title, what = "buffer_full", "Audio buffer full", "buffer_full"


class Capacity(Problem):
    """No room for another session, or the server is draining; headers say when to come again."""

    status, kind, title = 503, "capacity", "No capacity"

    def __init__(self, detail: str = "", *, kind: str | None = None, retry_after: float = 5.0):
        super().__init__(detail, kind=kind, headers={"Retry-After": str(max(1, round(retry_after)))})


class NotInstalled(Problem):
    """This server was set up without it."""

    status, kind, title = 501, "not_installed", "Not installed"


class JoinFailed(Problem):
    """A room elsewhere did not let us in, or cannot be reached."""

    status, kind, title = 502, "join", "The room cannot be joined"
