"""The signed side-car of an HLS stream, since C2PA cannot sign separate fragments (serving.md 19.4), and its check.

    0-init.mp4 0-0.m4s 0-1.m4s ...   as FFmpeg writes and removes them; index.m3u8 names the last few
    provenance.jws                   length and SHA-256 of the last KEPT of them and what made them, signed (Signer.seal)

Whoever copies fragments copies the side-car too: it speaks for those it names. It follows a fragment within a second, is replaced in one step,
so that a crash leaves a whole one, and is served to whoever may watch.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from liveavatar import __version__
from liveavatar.core import InputError, LiveAvatarError
from liveavatar.serving.durable import replace_file
from liveavatar.serving.signing import CREATED_BY_MACHINE, Manifest, Seal, unseal
from liveavatar.serving.targets import PLAYLIST

SIDECAR = "provenance.jws"
KEPT = 60  # fragments a side-car speaks for, about a minute: who fetches them one by one is slower than the playlist
LOOK_SECONDS = 0.25
PATIENCE, PAUSE = 6, 0.5  # a live stream's side-car is asked for so often, so far apart, until it names the newest fragment
ANSWER_SECONDS = 10.0
INIT = re.compile(r'#EXT-X-MAP:URI="([^"]*)"')
PLAIN = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,99}")  # a name beside the playlist, and nowhere else


def named(playlist: str) -> list[tuple[str, str]]:
    """(initialisation, fragment) of each fragment of a media playlist, in order; none for a playlist of another kind."""
    init, pairs = None, []
    for line in playlist.splitlines():
        if found := INIT.match(line):
            init = found[1]
        elif init is not None and line and not line.startswith("#"):
            pairs.append((init, line))
    return pairs


# ---------------------------------------------------------------- the server's side


class SideCar:
    """Of the playlist in `folder`. facts: what the statement says besides, e.g. which session. seal: signs; None: nothing is written, only
    hashed. wall: Unix seconds."""

    def __init__(self, folder: Path, facts: dict, seal: Seal | None, wall: Callable[[], float] = time.time):
        self._folder, self._facts, self._seal, self._wall = folder, facts, seal, wall
        self._files: dict[tuple[str, str], list[dict]] = {}  # the last KEPT fragments, each with its initialisation
        self._stamp: int | None = None
        self._digest, self._init, self._count = hashlib.sha256(), "", 0  # of all fragments so far, each initialisation before its first

    @property
    def whole(self) -> dict:
        """fragments: how many there were; sha256: of all of them as one file, the initialisation first."""
        return {"fragments": self._count, "sha256": self._digest.hexdigest()}

    def look(self) -> bool:
        """Take in what is new; whether anything was. Blocks on the disk. Raises OSError, and LiveAvatarError of the signature."""
        try:
            stamp = (self._folder / PLAYLIST).stat().st_mtime_ns
            if stamp == self._stamp:
                return False
            fresh = [pair for pair in named((self._folder / PLAYLIST).read_text()) if pair not in self._files]
            for init, fragment in fresh:
                self._files[init, fragment] = self._taken(init, fragment)
        except FileNotFoundError:  # no playlist yet, or a fragment that was already removed: the next look knows more
            return False
        if fresh:
            for old in list(self._files)[:-KEPT]:
                del self._files[old]
            if self._seal is not None:
                replace_file(self._folder / SIDECAR, self._seal(self._statement()).encode())
        self._stamp = stamp
        return bool(fresh)

    def _taken(self, init: str, fragment: str) -> list[dict]:
        pair = {name: (self._folder / name).read_bytes() for name in (init, fragment)}  # both, or neither counts
        for name in (init, fragment) if init != self._init else (fragment,):
            self._digest.update(pair[name])
        self._init, self._count = init, self._count + 1
        return [{"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in pair.items()]

    def _statement(self) -> bytes:
        files = {facts["name"]: facts for pair in self._files.values() for facts in pair}
        return json.dumps({"generator": f"liveavatar/{__version__}", "digitalSourceType": CREATED_BY_MACHINE, "made": round(self._wall(), 3),
                           **self._facts, "files": list(files.values())}).encode()  # fmt: skip


async def accompany(writing: Coroutine, sidecar: SideCar, failed: Callable[[str], None]) -> None:
    """Keep the side-car up with what `writing` writes, until that is over. failed(reason): once for each row of looks that fail."""
    task, well = asyncio.create_task(writing), True
    try:
        while True:
            over = task.done()
            try:
                await asyncio.to_thread(sidecar.look)
                well = True
            except (OSError, LiveAvatarError) as error:
                if well:
                    failed(error.strerror if isinstance(error, OSError) else str(error))
                well = False
            if over:
                return await task
            await asyncio.wait({task}, timeout=LOOK_SECONDS)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ---------------------------------------------------------------- the reader's side


@dataclass(frozen=True)
class Stream:
    """Fragments that were fetched, to be looked at. media: the last of them with their initialisation, a fragmented mp4.

    manifest: what their side-car says of them. checked: how many fragments were compared.
    """

    media: bytes
    manifest: Manifest
    checked: int


Read = Callable[[str], bytes]  # a file beside the playlist, by its name. Raises FileNotFoundError, InputError


def folder_reader(folder: Path) -> Read:
    """Files of a folder."""

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be read: {error.strerror}") from None

    return read


def web_reader(url: str, token: str | None) -> Read:
    """Files beside a playlist at an http(s) URL. token: a bearer; it goes to that server alone, for redirects are not followed."""
    import httpx

    parts, headers = urlsplit(url), {"Authorization": f"Bearer {token}"} if token else {}
    client = httpx.Client(headers=headers, timeout=ANSWER_SECONDS)

    def read(name: str) -> bytes:
        try:
            answer = client.get(urlunsplit(parts._replace(path=parts.path.rpartition("/")[0] + "/" + name)))
        except httpx.HTTPError as error:
            raise InputError(f"{parts.hostname}: {name} cannot be fetched: {error}") from None
        if answer.status_code == 404:
            raise FileNotFoundError(name)
        if answer.status_code != 200:
            raise InputError(f"{parts.hostname}: {name} cannot be fetched: status {answer.status_code}")
        return answer.content

    return read


def fetched(read: Read, playlist: str, authority: bytes = b"", sleep: Callable[[float], None] = time.sleep) -> Stream | None:
    """The last fragments of the playlist of this name and what their side-car says of them; None: it is no list of fragmented mp4.

    authority: PEM certificates whose signatures are trusted. Raises InputError where nothing can be read.
    """
    text = _text(read, playlist)
    pairs = named(text)[-KEPT:]
    if not pairs or not all(PLAIN.fullmatch(name) for pair in pairs for name in pair):
        return None
    live, files = "#EXT-X-ENDLIST" not in text, dict[str, bytes | None]()
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        files[name] = _perhaps(read, name)
    there = {name: data for name, data in files.items() if data is not None}
    if not (whole := [fragment for init, fragment in pairs if init in there and fragment in there]):
        raise InputError(f"{playlist}: none of the fragments it names is there")
    manifest = _signed(read, there, authority, sleep if live else None)
    gone = () if live else tuple(f"{name}: is not there" for name in files if name not in there)
    manifest = _worse(manifest, gone) if manifest.found else manifest
    last = pairs[-1][0]
    media = b"".join([there[last], *(there[fragment] for init, fragment in pairs if init == last and fragment in there)])
    return Stream(media, manifest, len(whole))


def _text(read: Read, name: str) -> str:
    try:
        return read(name).decode(errors="replace")
    except FileNotFoundError:
        raise InputError(f"{name}: no such playlist") from None


def _perhaps(read: Read, name: str) -> bytes | None:
    try:
        return read(name)
    except FileNotFoundError:
        return None


def _signed(read: Read, files: dict[str, bytes], authority: bytes, sleep: Callable[[float], None] | None) -> Manifest:
    """What the side-car says of these files. sleep: the stream is live, so the side-car of the newest may still come."""
    for attempt in range(PATIENCE):
        if (token := _perhaps(read, SIDECAR)) is None:
            return Manifest(found=False)
        statement, manifest = unseal(token.decode(errors="replace"), authority)
        try:
            said = {file["name"]: (file["bytes"], file["sha256"]) for file in statement["files"]}
        except (LookupError, TypeError):  # also {}, of what was changed
            return _worse(manifest, ("statement.missing",))
        unnamed = [name for name in files if name not in said]
        if not unnamed or sleep is None or attempt == PATIENCE - 1:
            break
        sleep(PAUSE)
    changed = [name for name, data in files.items() if name in said and said[name] != (len(data), hashlib.sha256(data).hexdigest())]
    order = [name for name in files if name in said]
    moved = order != sorted(order, key=list(said).index)
    return _worse(manifest, (*(f"{name}: changed" for name in changed), *(f"{name}: not in the side-car" for name in unnamed),
                             *(["order: changed"] if moved else [])))  # fmt: skip


def _worse(manifest: Manifest, problems: Sequence[str]) -> Manifest:
    return Manifest(**{**vars(manifest), "valid": manifest.valid and not problems, "problems": (*manifest.problems, *problems)})
