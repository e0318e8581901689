"""Who is asking (API-5): server keys for programs, short tokens of one session for browsers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from liveavatar.config import build
from liveavatar.core import ConfigError
from liveavatar.serving.durable import private_folder, replace_file, secret_file
from liveavatar.serving.problems import Forbidden, NotFound, Unauthorized
from liveavatar.serving.settings import AccessConfig

VIEW, PUBLISH, CONTROL, ADMIN = SCOPES = ("view", "publish", "control", "admin")
AUDIENCE, ALGORITHM = "liveavatar", "HS256"
CLAIMS = ["exp", "aud", "sub", "scope", "own", "key"]  # own: the tenant; key: prefix of the server key that made it
KEY = re.compile(r"la_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FIRST_OWNER = "operator"
REMEMBERED = 1024  # keys whose hash need not be computed again


@dataclass(frozen=True, kw_only=True)
class ServerKey:
    """What is kept of a key. prefix: its public name. hash: argon2 of the whole key. created: Unix seconds."""

    prefix: str
    hash: str
    owner: str
    scopes: tuple[str, ...]
    name: str = ""
    created: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who asks. owner: the tenant. key: prefix of the server key, by which quotas count. session: all a token may touch; None: a server key."""

    owner: str
    scopes: frozenset[str]
    key: str
    session: str | None = None

    def may(self, scope: str) -> bool:
        """Admin may everything; no other scope holds another, so a token to view can never speak."""
        return scope in self.scopes or ADMIN in self.scopes

    def need(self, *scopes: str) -> None:
        """Raise Forbidden unless one of `scopes` is there."""
        if not any(map(self.may, scopes)):
            raise Forbidden(f"this needs the scope {' or '.join(scopes)}")

    def need_key(self, *scopes: str) -> None:
        """Raise Forbidden for the token of one session, and for a key without one of `scopes` (none: any key)."""
        if self.session is not None:
            raise Forbidden("this needs a server key: a session's token reaches that session alone")
        if scopes:
            self.need(*scopes)

    def sees(self, owner: str, session: str | None = None) -> bool:
        """Whether something of `owner`'s, in `session`, exists for this one."""
        return (self.owner == owner or ADMIN in self.scopes) and self.session in (None, session)


ANYBODY = Principal(owner=FIRST_OWNER, scopes=frozenset(SCOPES), key="anybody")  # where access.required is off: loopback


class Access:
    """Keys and tokens of one server. folder: private; holds keys.json (hashes alone) and token.key."""

    def __init__(self, folder: Path, settings: AccessConfig, clock: Callable[[], float] = time.time):
        from argon2 import PasswordHasher

        self._file, self._settings, self._clock = private_folder(folder) / "keys.json", settings, clock
        self._secret = secret_file(folder / "token.key")
        self._hasher = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)  # a key has 256 random bits: the least OWASP allows
        self._keys = {key.prefix: key for key in self._read()}
        self._verified: OrderedDict[bytes, str] = OrderedDict()  # SHA-256 of a key that was right -> its prefix
        self._one_hash = asyncio.Semaphore(1)  # a flood of wrong keys takes one core at most
        self._lock = threading.Lock()  # of whoever changes the keys

    # ------------------------------------------------------------ server keys

    def first_key(self) -> str | None:
        """A key with every scope if there is none at all, to be shown once; None later."""
        return None if self._keys else self.create_key(FIRST_OWNER, SCOPES, "first run")[1]

    def create_key(self, owner: str, scopes: Iterable[str], name: str = "") -> tuple[ServerKey, str]:
        """A new key and its text, which is kept nowhere. Blocks on the disk, and for the hash. Raises ValueError."""
        if not OWNER.fullmatch(owner) or not set(scopes) <= set(SCOPES):
            raise ValueError(f"owner {owner!r}, scopes {sorted(scopes)}: the owner is a short word, scopes are of {', '.join(SCOPES)}")
        prefix = secrets.token_hex(6)
        text = f"la_{prefix}_{secrets.token_urlsafe(32)}"
        key = ServerKey(prefix=prefix, hash=self._hasher.hash(text), owner=owner, scopes=tuple(dict.fromkeys(scopes)), name=name,
                        created=self._clock())  # fmt: skip
        with self._lock:
            self._write({**self._keys, prefix: key})
        return key, text

    def revoke_key(self, principal: Principal, prefix: str) -> None:
        """The key, and every token made with it, opens nothing any more. Blocks on the disk. Raises NotFound, also for somebody else's."""
        with self._lock:
            key = self._keys.get(prefix)
            if key is None or not principal.sees(key.owner):
                raise NotFound("no such key")
            self._write({other: kept for other, kept in self._keys.items() if other != prefix})

    def keys(self, principal: Principal) -> list[ServerKey]:
        """Those this one may know of, without hashes."""
        return [replace(key, hash="") for key in self._keys.values() if principal.sees(key.owner)]

    def _read(self) -> list[ServerKey]:
        if not self._file.exists():
            return []
        try:
            return [build(ServerKey, item, str(self._file)) for item in json.loads(self._file.read_text(encoding="utf-8"))]
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self._file}: not JSON ({error}): restore it, or remove it to start without any key") from None

    def _write(self, keys: dict[str, ServerKey]) -> None:
        replace_file(self._file, json.dumps([asdict(key) for key in keys.values()], indent=1).encode())
        self._keys = keys

    # ------------------------------------------------------------ tokens

    def token(self, principal: Principal, session: str, owner: str, scopes: Iterable[str], seconds: float | None = None) -> tuple[str, float]:
        """A token of one session (aud, sub, scope) and when it ends, Unix seconds. Raises Forbidden for scopes the asker has not."""
        import jwt

        for scope in scopes:
            principal.need(scope)
        life = min(seconds or self._settings.token_seconds, self._settings.token_seconds)
        now = self._clock()
        claims = {"aud": AUDIENCE, "sub": session, "scope": " ".join(scopes), "own": owner, "key": principal.key,
                  "iat": int(now), "exp": int(now + life)}  # fmt: skip
        return jwt.encode(claims, self._secret, algorithm=ALGORITHM), now + life

    def _of_token(self, text: str) -> Principal:
        import jwt

        try:
            claims = jwt.decode(text, self._secret, algorithms=[ALGORITHM], audience=AUDIENCE, options={"require": CLAIMS})
        except jwt.ExpiredSignatureError:
            raise Unauthorized("the token has expired: ask for a new one", kind="expired") from None
        except jwt.InvalidAudienceError:
            raise Unauthorized("the token is for something else", kind="audience") from None
        except jwt.InvalidTokenError:
            raise Unauthorized("not a token of this server", kind="token") from None
        if claims["key"] not in self._keys and (self._settings.required or claims["key"] != ANYBODY.key):
            raise Unauthorized("the key behind this token was revoked", kind="token")
        return Principal(owner=claims["own"], scopes=frozenset(claims["scope"].split()), key=claims["key"], session=claims["sub"])

    # ------------------------------------------------------------ both

    async def who(self, credential: str | None) -> Principal:
        """Whose key or token this is. Raises Unauthorized; says nothing of what was wrong with a key."""
        if not credential:
            if self._settings.required:
                raise Unauthorized("send Authorization: Bearer with a server key or a session's token", kind="missing")
            return ANYBODY
        match = KEY.fullmatch(credential)
        return await self._of_key(match[1], credential) if match else self._of_token(credential)

    async def _of_key(self, prefix: str, text: str) -> Principal:
        key, digest = self._keys.get(prefix), hashlib.sha256(text.encode()).digest()
        if key is None:
            raise Unauthorized("not a key of this server", kind="key")
        if digest not in self._verified:
            async with self._one_hash:
                right = await asyncio.to_thread(self._matches, key.hash, text)
            if not right:
                raise Unauthorized("not a key of this server", kind="key")
            self._verified[digest] = prefix
            while len(self._verified) > REMEMBERED:
                self._verified.popitem(last=False)
        if prefix not in self._keys:  # revoked while it was being looked at
            raise Unauthorized("not a key of this server", kind="key")
        return Principal(owner=key.owner, scopes=frozenset(key.scopes), key=prefix)

    def _matches(self, hashed: str, text: str) -> bool:
        from argon2.exceptions import VerificationError

        try:
            return self._hasher.verify(hashed, text)
        except VerificationError:
            return False
