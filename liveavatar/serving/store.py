"""Avatars of one server: a folder for each, whole or not there, and the embedded ones, which are always there."""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from liveavatar.serving.durable import erase_folder, private_folder, read_record, replace_file, sweep, whole_folder
from liveavatar.serving.problems import Conflict, NotFound

ASSETS = Path(__file__).parents[1] / "assets"
DEFAULT = "default"
AVATAR_ID = re.compile(r"av_[0-9a-f]{32}")
THUMBNAIL = 192  # pixels a side, at most
EVERYBODY = ""  # owner of what is embedded


@dataclass(frozen=True, kw_only=True)
class Avatar:
    """One face that may speak. owner: tenant, "" for the embedded. consent: id of the record, None for nobody's face.
    media: SHA-256 of what was uploaded, which the record names. digest: of portrait.png.
    """

    id: str
    name: str
    owner: str
    consent: str | None
    media: str | None
    digest: str
    created: float


class AvatarStore:
    """folder/ID/{avatar.json, portrait.png, thumbnail.webp}. An id from a client never becomes a path before it was looked up."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        self._folder, self._clock = private_folder(folder), clock
        sweep(self._folder)
        self._files = {DEFAULT: ASSETS / "portrait.png", **{path.stem: path for path in sorted((ASSETS / "portraits").iterdir())}}
        self._avatars = {name: _embedded(name, path) for name, path in self._files.items()}
        for home in sorted(path for path in self._folder.iterdir() if AVATAR_ID.fullmatch(path.name)):
            self._avatars[home.name], self._files[home.name] = read_record(Avatar, home / "avatar.json"), home / "portrait.png"

    def list(self, sees: Callable[[str], bool]) -> list[Avatar]:
        """Those whose owner is seen, the embedded first."""
        return [avatar for avatar in self._avatars.values() if avatar.owner == EVERYBODY or sees(avatar.owner)]

    def get(self, avatar_id: str, sees: Callable[[str], bool] = lambda owner: True) -> Avatar:
        """Raises NotFound, also for what is somebody else's."""
        avatar = self._avatars.get(avatar_id)
        if avatar is None or not (avatar.owner == EVERYBODY or sees(avatar.owner)):
            raise NotFound(f"no avatar {avatar_id[:64]!r}")
        return avatar

    def portrait(self, avatar_id: str) -> Path:
        """The picture file of an avatar that is there. Raises NotFound."""
        return self._files[self.get(avatar_id).id]

    def thumbnail(self, avatar_id: str) -> bytes:
        """A small WebP of it."""
        path = self.portrait(avatar_id).with_name("thumbnail.webp")
        return path.read_bytes() if path.exists() else _small(self.portrait(avatar_id).read_bytes())

    def add(self, portrait: bytes, *, name: str, owner: str, consent: str | None, media: str) -> Avatar:
        """portrait: PNG that we encoded ourselves, never what a client sent. Blocks on the disk."""
        avatar = Avatar(id=f"av_{secrets.token_hex(16)}", name=name, owner=owner, consent=consent, media=media,
                        digest=hashlib.sha256(portrait).hexdigest(), created=self._clock())  # fmt: skip
        home, record = self._folder / avatar.id, json.dumps(asdict(avatar)).encode()
        with whole_folder(home) as folder:
            for file, data in (("portrait.png", portrait), ("thumbnail.webp", _small(portrait)), ("avatar.json", record)):
                replace_file(folder / file, data)
        self._avatars[avatar.id], self._files[avatar.id] = avatar, home / "portrait.png"
        return avatar

    def erase(self, avatar_id: str) -> None:
        """It is gone for good, with its pictures. Raises NotFound; Conflict for an embedded one. Blocks on the disk."""
        if self.get(avatar_id).owner == EVERYBODY:
            raise Conflict("the embedded avatars are always there")
        del self._avatars[avatar_id], self._files[avatar_id]
        erase_folder(self._folder / avatar_id)

    def with_consent(self, consent: str) -> list[Avatar]:
        """Those that live on this record."""
        return [avatar for avatar in self._avatars.values() if avatar.consent == consent]


def _embedded(name: str, path: Path) -> Avatar:
    return Avatar(id=name, name=name, owner=EVERYBODY, consent=None, media=None, digest=hashlib.sha256(path.read_bytes()).hexdigest(), created=0.0)


def _small(picture: bytes) -> bytes:
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80)
    return out.getvalue()
