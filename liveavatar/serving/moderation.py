"""What may not be said, asked of the model, or shown (18.9): hooks of the operator, each refusal in the event log.

Text, before it is spoken or becomes part of a prompt: a list of words, and an endpoint that judges as OpenAI's /v1/moderations does.
Faces, when they are registered: a folder of pictures of people who must not become avatars. Sound that is sent as sound passes:
there is no text to judge.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import structlog
from PIL import Image

from liveavatar.core import ConfigError
from liveavatar.serving.problems import Capacity, Forbidden, Problem
from liveavatar.serving.settings import ModerationConfig
from liveavatar.serving.ssrf import request
from liveavatar.serving.uploads import portrait
from liveavatar.serving.voices import key_of

REFUSED = "moderation.refused"  # in the event log
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
REMEMBERED = 1024  # texts that the endpoint has let pass: a channel says the same day and night

log = structlog.get_logger("liveavatar.moderation")


class Refused(Forbidden):
    """Text or a face that the operator does not want here."""

    kind = "moderation"


class Unjudged(Capacity):
    """The operator's endpoint gives no judgement, and without one nothing passes."""

    kind, title = "moderation", "Cannot be judged now"


class Moderation:
    """Of one server. told: (name, facts) of each refusal, for the event log. Raises ConfigError for files that are not there."""

    def __init__(self, config: ModerationConfig, told: Callable[[str, dict], None] = lambda name, facts: None):
        self._config, self._told = config, told
        self._words = words(Path(config.words)) if config.words else None
        key = key_of(config.key_file)
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._model = {"model": config.model} if config.model else {}
        self._passed: OrderedDict[str, None] = OrderedDict()
        self._faces = ProtectedFaces(Path(config.faces), config.face_distance) if config.faces else None

    async def check(self, what: str, text: str, *, closed: bool, **facts) -> None:
        """what: "speech" or "prompt". closed: refuse what cannot be judged, whatever the settings. facts: for the event log: who, where.

        Raises Refused, Unjudged.
        """
        if self._words is not None and self._words.search(folded(text)):
            self._refuse(what, "words", text.encode(), facts)
        if self._config.url is None or text in self._passed:
            return
        flagged = await self._judgement(text)
        if flagged is False:
            self._remember(text)
        if flagged is None and (closed or self._config.silent == "refuse"):
            self._refuse(what, "silence", text.encode(), facts, Unjudged("the text could not be judged: come again", retry_after=5))
        if flagged:
            self._refuse(what, "endpoint", text.encode(), facts)

    async def _judgement(self, text: str) -> bool | None:
        """Whether it is flagged; None where nobody says so in time."""
        body = json.dumps({"input": text, **self._model}).encode()
        try:
            status, answer = await request("POST", self._config.url, body=body, headers=self._headers, seconds=self._config.seconds,
                                           private=self._config.private)  # fmt: skip
            return any([_flag(result) for result in _results(status, answer)])
        except (Problem, ValueError) as error:
            log.error("moderation_silent", reason=str(error))
            return None

    def _remember(self, text: str) -> None:
        self._passed[text] = None
        while len(self._passed) > REMEMBERED:
            self._passed.popitem(last=False)

    def check_face(self, picture: bytes, **facts) -> None:
        """picture: PNG of `uploads.portrait`. Blocks. Raises Refused (kind protected_face)."""
        if self._faces is not None and self._faces.shown(picture):
            self._refuse("face", "faces", picture, facts, Refused("this face may not become an avatar here", kind="protected_face"))

    def _refuse(self, what: str, by: str, content: bytes, facts: dict, problem: Problem | None = None) -> None:
        """The content itself is kept nowhere, only its hash."""
        log.warning("moderation_refused", what=what, by=by)
        self._told(REFUSED, {"what": what, "by": by, "sha256": hashlib.sha256(content).hexdigest(), **facts})
        raise problem or Refused(f"this {what} is not allowed here")


def _results(status: int, answer: bytes) -> list:
    """Of an answer {"results": [...]}. Raises ValueError for any other."""
    found = json.loads(answer) if status == 200 else None
    results = found.get("results") if isinstance(found, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError(f"an answer with status {status} and without results")
    return results


def _flag(result: object) -> bool:
    flagged = result.get("flagged") if isinstance(result, dict) else None
    if not isinstance(flagged, bool):
        raise ValueError("a result that is neither flagged nor not")
    return flagged


# ---------------------------------------------------------------- words


def folded(text: str) -> str:
    """As words are compared: compatible forms and cases alike, what is invisible left out, blanks alike."""
    seen = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c for c in seen if unicodedata.category(c) != "Cf").split())


def words(file: Path) -> re.Pattern:
    """A word or phrase a line, # begins a comment. In Latin letters they count as whole words, in other scripts anywhere. Raises ConfigError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"moderation.words={file}: cannot be read ({error}): name a text file, a word a line") from None
    listed = [word for line in lines if (word := folded(line.partition("#")[0]))]
    if not listed:
        raise ConfigError(f"moderation.words={file}: holds no word")
    return re.compile("|".join(_whole(word) for word in listed))


def _whole(word: str) -> str:
    begin, end = (r"\b" if re.match(r"[a-z0-9]", edge) else "" for edge in (word[0], word[-1]))
    return f"{begin}{re.escape(word)}{end}"


# ---------------------------------------------------------------- faces


class ProtectedFaces:
    """Whose pictures lie in a folder, one face each. distance: of two faces below which they are one person's.

    Raises ConfigError for a picture without exactly one face, InputError naming what to install.
    """

    def __init__(self, folder: Path, distance: float):
        self._distance, self._one = distance, threading.Lock()
        files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES)
        if not files:
            raise ConfigError(f"moderation.faces={folder}: holds no {', '.join(PICTURES)}")
        self._known = np.stack([self._only(file) for file in files])

    def _only(self, file: Path) -> np.ndarray:
        try:
            found = self._prints(portrait(file.read_bytes()))
        except (OSError, Problem) as error:
            raise ConfigError(f"{file}: {error}") from None
        if len(found) != 1:
            raise ConfigError(f"{file}: {len(found)} faces found: a protected picture shows exactly one")
        return found[0]

    def _prints(self, picture: bytes) -> list[np.ndarray]:
        """float64 [128] of each face in a PNG."""
        from liveavatar.conditioning.face import FaceTracker
        from liveavatar.conditioning.faceprint import embedding

        pixels = np.asarray(Image.open(io.BytesIO(picture)))
        with self._one:  # the network is one object
            return [embedding(pixels, face) for face in FaceTracker().follow(pixels)]

    def shown(self, picture: bytes) -> bool:
        """Whether a PNG shows one of them; a picture in which no face is found shows nobody."""
        return any((np.linalg.norm(self._known - face, axis=1) < self._distance).any() for face in self._prints(picture))
