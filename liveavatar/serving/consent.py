"""Who allowed what to be done with whose face, until when, and proof that nobody rewrote it (serving.md 19.2).

Interface, for the API (calls block for an fsync: use a thread):

    log = ConsentLog(folder)                      # opens folder/consents.jsonl, its key and folder/consents/
    given = log.grant(Statement(subject=..., scope=("conversation",), expires=..., uploader=tenant, method="document"), media_hash(portrait_bytes))
    log.check(given.id, tenant, use="conversation", media=...)  # before a session begins, and now and then while it runs; Forbidden says why not
    log.revoke(given.id, by="key_1", reason="...")  # the caller ends the sessions that run
    log.erase(given.id, by="key_1")               # revokes, and forgets every word about the person; hashes stay
    verify(folder) -> list of problems            # needs the public key only, no lock

The chain (eventlog.py) holds no name: a grant there is a hash of the statement, salted so that a name cannot be guessed from
it, signed with the server's Ed25519 key. The statement lies in a file of its own, which erasure deletes.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog

from liveavatar.core import ConfigError
from liveavatar.serving import eventlog
from liveavatar.serving.durable import flush_folder, private_folder, replace_file
from liveavatar.serving.eventlog import EventLog, LogError, Record, canonical
from liveavatar.serving.problems import Forbidden, NotFound, Unprocessable

SCOPES = ("conversation", "livestream", "recording")  # what may be done with the face
METHODS = {  # how the uploader knows that the subject agreed
    "self": "the uploader says that it is their own face", "document": "a signed paper is kept elsewhere",
    "liveness": "the subject was checked in front of a camera", "synthetic": "no real person is shown",
}  # fmt: skip
TEXT = 200  # characters of a name
GRANTED, REVOKED, ERASED = "consent.granted", "consent.revoked", "consent.erased"
LOG, DETAILS, KEY, PUBLIC = "consents.jsonl", "consents", "consent.key", "consent.pub"
ID, HASH = re.compile(r"con_[0-9a-f]{24}"), re.compile(r"[0-9a-f]{64}")

logger = structlog.get_logger("liveavatar.consent")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What the uploader says. subject: whose face. scope: of SCOPES. expires: Unix seconds, None for never. uploader: the
    tenant. method: of METHODS. Raises Unprocessable for anything else."""

    subject: str
    scope: tuple[str, ...]
    expires: float | None
    uploader: str
    method: str

    def __post_init__(self):
        for name in ("subject", "uploader"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip() or len(value) > TEXT or not value.isprintable():
                raise Unprocessable(f"consent {name}: must be 1 to {TEXT} printable characters", kind="consent")
        if not self.scope or len(set(self.scope)) != len(self.scope) or not set(self.scope) <= set(SCOPES):
            raise Unprocessable(f"consent scope {list(self.scope)}: must be some of {', '.join(SCOPES)}", kind="consent")
        if self.method not in METHODS:
            raise Unprocessable(f"consent method {self.method!r}: must be one of {', '.join(METHODS)}", kind="consent")
        if self.expires is not None and not 0 < self.expires < 1e11:
            raise Unprocessable(f"consent expires={self.expires}: must be Unix seconds", kind="consent")


@dataclass(frozen=True, kw_only=True)
class Consent:
    """A grant as it stands now. statement: None after erasure. media: SHA-256 of the uploaded picture. details: SHA-256 of the
    salted statement. created, revoked: Unix seconds. signature: Ed25519 over `signed()`, hex."""

    id: str
    statement: Statement | None
    media: str
    details: str
    scope: tuple[str, ...]
    expires: float | None
    method: str
    created: float
    signature: str
    revoked: float | None = None
    erased: bool = False

    def signed(self) -> bytes:
        """What the signature covers: all that does not change."""
        return signed_bytes({name: getattr(self, name) for name in ("id", "media", "details", "scope", "expires", "method", "created")})

    def state(self, now: float) -> str:
        """valid, expired, revoked or erased."""
        if self.erased or self.revoked is not None:
            return "erased" if self.erased else "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


def signed_bytes(facts: dict) -> bytes:
    """One spelling of the facts of a grant, for signatures."""
    return b"liveavatar consent 1\n" + canonical({**facts, "scope": list(facts["scope"])})


def media_hash(media: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(media).hexdigest()


class ConsentLog:
    """The one writer of a folder's consents; calls may come from several threads. See the module for the interface.

    What reads (get, all, check) never waits for what writes: the event loop asks while a thread waits for the disk.
    folder: made when missing. clock: Unix seconds. Raises ConfigError, LogError.
    """

    def __init__(self, folder: str | Path, clock: Callable[[], float] = time.time):
        self._folder, self._clock, self._lock = Path(folder), clock, threading.RLock()
        self._key = _private_key(self._folder)
        self._log = EventLog(self._folder / LOG, clock)
        self._consents = _replay(self._folder)
        self._sweep()

    def grant(self, statement: Statement, media: str) -> Consent:
        """Record a consent to the use of the picture whose bytes have this media_hash. On the disk when it returns."""
        now = self._clock()
        if not HASH.fullmatch(media):
            raise Unprocessable("consent media: must be the SHA-256 of the picture, 64 hexadecimal digits", kind="consent")
        if statement.expires is not None and statement.expires <= now:
            raise Unprocessable("consent expires: lies in the past", kind="consent")
        id = f"con_{secrets.token_hex(12)}"
        details = canonical({**asdict(statement), "salt": secrets.token_hex(16)})
        facts = {"id": id, "media": media, "details": media_hash(details), "scope": list(statement.scope),
                 "expires": statement.expires, "method": statement.method, "created": round(now, 3)}  # fmt: skip
        facts["signature"] = self._key.sign(signed_bytes(facts)).hex()
        with self._lock:
            _keep(_details_file(self._folder, id), details)  # first: a grant without its statement would be worthless
            self._log.append(GRANTED, facts)
            self._consents[id] = Consent(statement=statement, **{**facts, "scope": statement.scope})
            return self._consents[id]

    def get(self, id: str) -> Consent:
        """Raises NotFound."""
        consent = self._consents.get(id)
        if consent is None:
            raise NotFound(f"no consent {id[:40]!r}")
        return consent

    def all(self) -> list[Consent]:
        """In the order they were given."""
        return list(self._consents.values())

    def check(self, id: str, owner: str, *, use: str | None = None, media: str | None = None) -> Consent:
        """The consent, if this tenant gave it and it is valid now; and covers the use and the picture's media_hash where they are named.

        Raises Forbidden with kind consent_required (there is none of this tenant's), consent_revoked, consent_expired,
        consent_scope or consent_media.
        """
        consent = self._consents.get(id)
        if consent is None or consent.statement is not None and consent.statement.uploader != owner:
            raise Forbidden(f"no consent {id[:40]!r}", kind="consent_required")
        state = consent.state(self._clock())
        if state in ("revoked", "erased"):
            raise Forbidden(f"consent {id} was {state}", kind="consent_revoked")
        if state == "expired":
            raise Forbidden(f"consent {id} has expired", kind="consent_expired")
        if use is not None and use not in consent.scope:
            raise Forbidden(f"consent {id} covers {', '.join(consent.scope)}, not {use}", kind="consent_scope")
        if media is not None and media != consent.media:
            raise Forbidden(f"consent {id} was given for another picture", kind="consent_media")
        return consent

    def revoke(self, id: str, by: str, reason: str = "") -> Consent:
        """End a consent; again has no effect. `reason` is for the log: write no name into it. Raises NotFound."""
        with self._lock:
            consent = self.get(id)
            if consent.revoked is not None:
                return consent
            record = self._log.append(REVOKED, {"id": id, "by": by[:TEXT], "reason": reason[:TEXT]})
            self._consents[id] = replace(consent, revoked=record.t)
            return self._consents[id]

    def erase(self, id: str, by: str) -> Consent:
        """Revoke and forget the statement: what stays are hashes, scope, dates and method. Raises NotFound."""
        self.revoke(id, by, "erasure")
        with self._lock:
            if not self._consents[id].erased:
                self._log.append(ERASED, {"id": id, "by": by[:TEXT]})
                self._consents[id] = replace(self._consents[id], statement=None, erased=True)
                _forget(_details_file(self._folder, id))
            return self._consents[id]

    def close(self) -> None:
        """Give the log free."""
        self._log.close()

    def _sweep(self) -> None:
        """Finish what a crash left half done: statements whose grant was never acknowledged, or whose erasure was."""
        for file in (self._folder / DETAILS).glob("*.json"):
            known = self._consents.get(file.stem)
            if known is None or known.erased:
                logger.warning("a statement without a standing grant, deleted", consent=file.stem)
                _forget(file)


def consents(folder: str | Path) -> list[Consent]:
    """All consents of a folder, in order; reads only. Raises LogError, ConfigError."""
    return list(_replay(Path(folder)).values())


def verify(folder: str | Path, head: tuple[int, str] | None = None) -> list[str]:
    """What is wrong with a folder's consents, one line each; empty: chain, signatures and statements are whole.

    head: as of eventlog.check. Raises LogError, ConfigError when there is nothing to verify.
    """
    from cryptography.exceptions import InvalidSignature

    folder = Path(folder)
    public = _public_key(folder)
    broken = eventlog.check(folder / LOG, head)
    if broken is not None:
        return [f"{folder / LOG}: line {broken.line} {broken.reason}"]
    problems = []
    for consent in consents(folder):
        try:
            public.verify(bytes.fromhex(consent.signature), consent.signed())
        except (InvalidSignature, ValueError):
            problems.append(f"{consent.id}: the signature is not that of {PUBLIC}")
        file = _details_file(folder, consent.id)
        if consent.erased:
            problems += [f"{consent.id}: was erased, but {file} is still there"] * file.exists()
        elif consent.statement is None:
            problems.append(f"{consent.id}: its statement {file} is missing or was changed")
    return problems


# ---------------------------------------------------------------- files


def _details_file(folder: Path, id: str) -> Path:
    if not ID.fullmatch(id):  # of a log that somebody wrote anew: it must not name files
        raise ValueError(f"{id[:40]!r} is no consent")
    return folder / DETAILS / f"{id}.json"


def _keep(file: Path, data: bytes) -> None:
    try:
        private_folder(file.parent)
        replace_file(file, data)
    except OSError as error:
        raise LogError(f"{file}: cannot be written: {error.strerror}") from None


def _forget(file: Path) -> None:
    file.unlink(missing_ok=True)
    flush_folder(file.parent)


def _replay(folder: Path) -> dict[str, Consent]:
    """The state that the log's lines add up to."""
    found: dict[str, Consent] = {}
    for record in eventlog.read(folder / LOG):
        try:
            _apply(found, folder, record)
        except (KeyError, TypeError, ValueError):
            raise LogError(f"{folder / LOG}: line {record.n + 1} is not one that this program writes") from None
    return found


def _apply(found: dict[str, Consent], folder: Path, record: Record) -> None:
    if record.name == GRANTED:
        consent = _granted(folder, record)
        found[consent.id] = consent
    elif record.name in (REVOKED, ERASED):
        changed = {"revoked": record.t} if record.name == REVOKED else {"erased": True, "statement": None}
        found[record.data["id"]] = replace(found[record.data["id"]], **changed)


def _granted(folder: Path, record: Record) -> Consent:
    file, facts = _details_file(folder, record.data["id"]), record.data
    statement = None
    if file.is_file() and media_hash(data := file.read_bytes()) == facts["details"]:
        said = {name: value for name, value in json.loads(data).items() if name != "salt"}
        statement = Statement(**{**said, "scope": tuple(said["scope"])})
    return Consent(statement=statement, **{**facts, "scope": tuple(facts["scope"])})


def _private_key(folder: Path):
    """The server's Ed25519 key and, beside it, its public half; made at first start."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not (folder / KEY).exists():
        fresh = Ed25519PrivateKey.generate().private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        _keep(folder / KEY, fresh)
    try:
        key = form.load_pem_private_key((folder / KEY).read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder / KEY}: not a private key: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{folder / KEY}: must be an Ed25519 key")
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    if not (folder / PUBLIC).exists():
        _keep(folder / PUBLIC, public)
    if (folder / PUBLIC).read_bytes() != public:
        raise ConfigError(f"{folder / PUBLIC}: is not the public half of {KEY}")
    return key


def _public_key(folder: Path):
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return load_pem_public_key((folder / PUBLIC).read_bytes())
    except OSError as error:
        raise ConfigError(f"{folder / PUBLIC}: cannot be read: {error.strerror}; is this the storage folder of a server?") from None
    except ValueError:
        raise ConfigError(f"{folder / PUBLIC}: not a public key in PEM") from None

