"""Logs: one JSON object a line on stdout, with session and epoch, without secrets and without persons (serving.md 17.4, 18.7).

`log = structlog.get_logger(__name__)` anywhere; then `log.warning("egress lost", output="main", error=...)`: the event is
a constant text, what varies goes into fields. Inside `with about(session=..., epoch=...)` every line carries these.
Lines of libraries (uvicorn, aiortc) pass the same way. More than BURST repeats in PERIOD seconds are counted instead
of written.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TextIO

import structlog
from structlog.contextvars import bound_contextvars as about  # noqa: F401  of this module's users

from liveavatar.config import one_of

LEVELS = ("debug", "info", "warning", "error")
BURST, PERIOD = 5, 10.0  # equal events written, within so many seconds
EVENTS_KEPT = 512  # kinds of events whose rate is known; the longest unseen is forgotten
LONGEST = 2000  # characters of one value
GONE = "***"

SECRET = {"token", "secret", "password", "passwd", "authorization", "credential", "credentials", "cookie", "key", "jwt", "signature", "ufrag", "pwd",
          "streamid"}  # fmt: skip
PERSONAL = {"text", "prompt", "transcript", "email", "phone", "subject", "uploader", "owner", "user", "username", "ip", "client", "sdp", "candidate"}
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_PATTERNS = (
    (re.compile(r"\b(la_[A-Za-z0-9]+)_[A-Za-z0-9_\-]+"), rf"\1_{GONE}"),  # server keys: the prefix tells which
    (re.compile(r"\beyJ[\w\-]+\.[\w\-]+(?:\.[\w\-]*)?"), GONE),  # JWT
    (re.compile(r"\b(Bearer|Basic|Token)\s+[A-Za-z0-9._~+/=\-]{6,}", re.I), rf"\1 {GONE}"),
    (re.compile(r"(\b[a-z][a-z0-9+.\-]*://)[^/\s@\"']+@", re.I), rf"\1{GONE}@"),
    (re.compile(r"(\brtmps?://[^/\s\"']+/[^/\s?\"']+/)[^\s\"']+", re.I), rf"\1{GONE}"),  # the stream key
    (re.compile(r"([\w/\-.\])])\?[\w.\-~%\[\]]+=[^\s\"'<>]*"), rf"\1?{GONE}"),  # query strings
    (re.compile(r"\b((?:\w+_)?(?:token|secret|password|passwd|api_?key|stream_?key)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&}]+", re.I), rf"\1{GONE}"),
)
_ADDRESS = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w.])")


# ---------------------------------------------------------------- redaction


def redact(value: object, key: str = "") -> object:
    """`value` without secrets and persons, mappings and lists through and through. key: its name, e.g. "stream_key"."""
    words = {word.lower() for word in _WORDS.findall(key)}
    if words & SECRET:
        return value if value is None else GONE
    if words & PERSONAL and isinstance(value, str):
        return f"<{len(value)} characters>"
    if isinstance(value, Mapping):
        return {str(name): redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redact(item, key) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return clean(value.hex()[:64] if isinstance(value, (bytes, bytearray)) else str(value))


def clean(text: str) -> str:
    """Free text without keys, tokens, stream keys, query strings and public addresses; cut at LONGEST."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    text = _ADDRESS.sub(_masked, text)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _masked(match: re.Match) -> str:
    """Of an address that belongs to somebody the first half; those of this machine and its network stay."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:  # a time of day, a version
        return match[0]
    if not address.is_global:
        return match[0]
    return ".".join((*match[0].split(".")[:2], "x.x")) if address.version == 4 else ":".join((*address.exploded.split(":")[:2], "x"))


def _redacted(logger, method: str, event: dict) -> dict:
    """A processor of structlog. `event` is text of ours or of a library; its other names decide for themselves."""
    return {name: clean(str(value)) if name in ("event", "exception", "stack", "level", "timestamp", "logger") else redact(value, name)
            for name, value in event.items()}  # fmt: skip


# ---------------------------------------------------------------- repeats


def kind(record: logging.LogRecord) -> tuple:
    """What makes two records repeats: of warnings and errors the event (and session), whatever it says further; else every word."""
    said = record.msg if isinstance(record.msg, dict) else {"event": record.msg if record.levelno >= logging.WARNING else record.getMessage()}
    if record.levelno >= logging.WARNING:
        return record.name, record.levelno, str(said["event"]), said.get("session")
    return record.name, record.levelno, *(f"{name}={value}" for name, value in sorted(said.items()) if name != "timestamp")


class Repeats(logging.Filter):
    """Lets BURST records of a kind pass in PERIOD seconds; the next one that passes says how many did not (`suppressed`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock, self._seen = clock, OrderedDict()  # kind -> [when its period began, records, of those not written]

    def filter(self, record: logging.LogRecord) -> bool:
        now, this = self._clock(), kind(record)
        state = self._seen.setdefault(this, [float("-inf"), 0, 0])
        self._seen.move_to_end(this)
        while len(self._seen) > EVENTS_KEPT:
            self._seen.popitem(last=False)
        if now - state[0] >= PERIOD:
            state[0], state[1] = now, 0
        state[1] += 1
        if state[1] > BURST:
            state[2] += 1
            return False
        if state[2]:
            record.suppressed, state[2] = state[2], 0
        return True


def _suppressed(logger, method: str, event: dict) -> dict:
    """A processor: what Repeats wrote on the record."""
    if count := getattr(event["_record"], "suppressed", 0):
        event["suppressed"] = count
    return event


# ---------------------------------------------------------------- set up


def configure(level: str = "info", form: str = "json", stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
    """Send everything this process logs to `stream` (stdout). form: "json" or "text". May be called again. Raises ConfigError."""
    one_of("monitoring.log_format", form, ("json", "text"))
    common = [structlog.contextvars.merge_contextvars, structlog.stdlib.add_logger_name, structlog.stdlib.add_log_level,
              structlog.processors.TimeStamper(fmt="iso", utc=True)]  # fmt: skip
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(), wrapper_class=structlog.stdlib.BoundLogger, cache_logger_on_first_use=False,
    )  # fmt: skip
    last = structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=False)
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.addFilter(Repeats(clock))
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=common,
        processors=[_suppressed, structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.format_exc_info, _redacted, last],
    ))  # fmt: skip
    logging.getLogger().handlers[:] = [handler]
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # theirs would write beside ours
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    set_level(level)


def set_level(level: str) -> None:
    """From now on (SIGHUP) lines below `level` are not written; libraries stay at warning unless debug is asked for."""
    one_of("monitoring.log_level", level, LEVELS)
    logging.getLogger().setLevel(logging.DEBUG if level == "debug" else max(logging.WARNING, _number(level)))
    for ours in ("liveavatar", "uvicorn"):
        logging.getLogger(ours).setLevel(_number(level))


def _number(level: str) -> int:
    return getattr(logging, level.upper())
