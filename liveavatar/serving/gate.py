"""What every request passes first: who asks, how often, from which page, and how much it may send."""

from __future__ import annotations

import ipaddress
import json
import re
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liveavatar.serving.access import ADMIN, Access, Principal
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.problems import Forbidden, Problem, RateLimited, TooLarge, Unauthorized
from liveavatar.serving.quotas import Quotas
from liveavatar.serving.settings import ListenConfig

OPENAPI = "/v1/openapi.json"
METRICS = "/metrics"
BODY_BYTES = 65_536  # of a request whose route says nothing else; SDP, too (18.5)
FORM_BYTES = 65_536  # round a file in a form
PROXIED = ("forwarded", "x-forwarded-for", "via")
SAFE = ("GET", "HEAD", "OPTIONS")
UPLOADS = re.compile(r"/v1/avatars|/v1/consents|/v1/sessions/[^/]+/audio|/v1/channels/[^/]+/sounds")
COUNTED = re.compile(r"/v1/avatars|/v1/consents|/v1/compat/bithuman|/v1/watermark:detect")  # against a day's bytes; audio by its seconds
REJECTED = {403: "consent", 413: "size", 415: "type", 422: "decode"}  # as the metric says it
POLICY = "; ".join((  # of the console: its own files alone, nothing inline, nothing from elsewhere, in no frame
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:", "media-src 'self' blob: mediastream:",
    "connect-src 'self'", "worker-src 'self'", "font-src 'self'", "manifest-src 'self'", "form-action 'none'", "base-uri 'none'",
    "frame-ancestors 'none'",
))  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}

log = structlog.get_logger("liveavatar.http")


class ProblemResponse(Response):
    """application/problem+json, the same for every error."""

    media_type = "application/problem+json"

    def __init__(self, problem: Problem, request_id: str, **more):
        headers = {**HEADERS, **problem.headers, "Cache-Control": "no-store"}
        super().__init__(json.dumps({**problem.body(request_id), **more}), problem.status, headers)


def count(metrics: Metrics, problem: Problem, path: str) -> None:
    """A refusal, in the metrics."""
    if problem.status == 401 or problem.kind == "scope":
        metrics.auth_failed(problem.kind)
    elif isinstance(problem, RateLimited):
        metrics.rate_limited(problem.what)
    elif problem.kind == "ssrf":
        metrics.ssrf_blocked(getattr(problem, "reason", "address"))
    elif UPLOADS.fullmatch(path) and problem.status in REJECTED:
        kind = problem.kind.split("_")[0]  # consent_required, consent_media ...
        metrics.upload_rejected(kind if kind in ("consent", "pixels") else REJECTED[problem.status])


class Gate:
    """ASGI middleware. bounds: (path pattern, bytes, asked for each request) of routes that take more than BODY_BYTES.

    The asker stands in `request.state.principal`, the request's number in `request.state.request_id` and in the header
    X-Request-Id of the answer. Sockets pass: they ask who it is themselves, for their token may come in a message.
    """

    def __init__(self, app: ASGIApp, *, access: Access, quotas: Quotas, listen: ListenConfig, required: bool, metrics: Metrics,
                 bounds: Sequence[tuple[str, Callable[[], int]]]):  # fmt: skip
        self._app, self._access, self._quotas, self._listen, self._required, self._metrics = app, access, quotas, listen, required, metrics
        self._bounds = [(re.compile(pattern), most) for pattern, most in bounds]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = secrets.token_hex(8)
        headers = Headers(scope=scope)
        try:
            check_page(scope, headers, self._listen, self._required)
            state["principal"] = who = await self._asker(scope, headers)
            receive = _bounded(receive, headers, self._most(scope["path"]))
            if who is not None and scope["method"] == "POST" and COUNTED.fullmatch(scope["path"]):
                self._quotas.may_upload(who.key)
                receive = _counted(receive, partial(self._quotas.uploaded, who.key))
        except Problem as problem:
            count(self._metrics, problem, scope["path"])
            return await ProblemResponse(problem, request_id)(scope, receive, send)
        await self._app(scope, receive, _with_headers(send, scope, request_id))

    async def _asker(self, scope: Scope, headers: Headers) -> Principal | None:
        """Whoever asks for what is not for everybody. None: everybody."""
        path = scope["path"]
        if not path.startswith("/v1/") and path != METRICS or path == OPENAPI or scope["method"] == "OPTIONS":
            return None
        if path == METRICS and _from_this_machine(scope, headers):
            return None
        principal = await admit(self._access, self._quotas, credential(headers), address(scope))
        if path == METRICS:
            principal.need_key(ADMIN)
        return principal

    def _most(self, path: str) -> int:
        return next((most() for pattern, most in self._bounds if pattern.fullmatch(path)), BODY_BYTES)


async def admit(access: Access, quotas: Quotas, credential: str | None, address: str) -> Principal:
    """Who shows this credential. Failures count by address, requests by key. Raises Unauthorized, RateLimited."""
    quotas.check_address(address)
    try:
        principal = await access.who(credential)
    except Unauthorized:
        quotas.failed(address)
        raise
    quotas.count("requests", principal.key)
    return principal


def credential(headers: Headers) -> str | None:
    """What stands behind Authorization: Bearer, or in X-Api-Key, which some agents' plugins send."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def address(scope: Scope) -> str:
    """The client's; of those behind one of listen.proxies the one that it names."""
    return (scope.get("client") or ("",))[0]


def _from_this_machine(scope: Scope, headers: Headers) -> bool:
    """Not through a proxy on it: that would make everybody a neighbour."""
    return not any(name in headers for name in PROXIED) and _is_loopback(address(scope))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_page(scope: Scope, headers: Headers, listen: ListenConfig, required: bool) -> None:
    """Refuse pages of other sites, and, where no key is needed, names that a site has pointed at this machine. Raises Forbidden."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if not required and not listen.insecure and not _is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise Forbidden("without access.required this server answers to localhost alone", kind="host")
    changes = scope["type"] == "websocket" or scope["method"] not in SAFE
    if changes and origin is not None and urlsplit(origin).netloc != host and origin not in listen.origins:
        raise Forbidden("pages of this origin may not call here: see listen.origins", kind="origin")


def _bounded(receive: Receive, headers: Headers, most: int) -> Receive:
    """`receive` that refuses the body's first byte beyond `most`. Raises TooLarge at once where the length is announced."""
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > most:
        raise TooLarge(f"at most {most} bytes")
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise HTTPException(413, f"at most {most} bytes")  # the one error that no parser of bodies turns into another
        return message

    return bounded


def _counted(receive: Receive, uploaded: Callable[[int], None]) -> Receive:
    """`receive` that tells of the bytes of the body."""

    async def counted() -> Message:
        message = await receive()
        uploaded(len(message.get("body", b"")))
        return message

    return counted


def _with_headers(send: Send, scope: Scope, request_id: str) -> Send:
    path = scope["path"]

    async def headed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers["X-Request-Id"] = request_id
            if path.startswith("/v1/"):
                headers.setdefault("Cache-Control", "no-store")
                log.debug("request", request=request_id, method=scope["method"], path=path, status=message["status"])
        await send(message)

    return headed
