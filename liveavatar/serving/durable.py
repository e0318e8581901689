"""Files that are whole after a crash: written beside their place, flushed, then put there in one step."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from liveavatar.config import build
from liveavatar.core import ConfigError

PRIVATE, PRIVATE_FOLDER = 0o600, 0o700
UNFINISHED = "."  # how the names of folders begin that are being written or erased
Kept = TypeVar("Kept")


def private_folder(path: Path) -> Path:
    """`path`, made if it is not there, for the server's user alone."""
    path.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    return path


def replace_file(path: Path, data: bytes) -> None:
    """The file holds `data`, or what it held before; never a part. Readable by the server's user alone."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # there only when something went wrong
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Names in this folder survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_record(cls: type[Kept], file: Path) -> Kept:
    """The dataclass that was written there as JSON. Raises ConfigError for a file that says anything else."""
    try:
        return build(cls, json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not the {cls.__name__} that was written there ({error}): restore it or remove its folder") from None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A private folder to be filled, which is at `path` when the block ends well, and nowhere before."""
    beside = private_folder(path.with_name(UNFINISHED + path.name))
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, beside)
        yield beside
        undo.pop_all()
    beside.rename(path)
    flush_folder(path.parent)


def erase_folder(path: Path) -> None:
    """Gone in one step, which no loss of power undoes, then file by file. Raises FileNotFoundError."""
    gone = path.rename(path.with_name(UNFINISHED + path.name))
    flush_folder(path.parent)
    shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """At start: remove what a crash left half written or half erased in `folder`."""
    for path in folder.iterdir():
        if path.name.startswith(UNFINISHED):
            shutil.rmtree(path)


def secret_file(path: Path) -> bytes:
    """32 random bytes that are the same after every restart; made at the first call."""
    if not path.exists():
        private_folder(path.parent)
        replace_file(path, secrets.token_bytes(32))
    return path.read_bytes()
