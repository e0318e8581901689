"""Files that are whole after a crash: written beside their place, flushed, then put there in one step."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

PRIVATE, PRIVATE_FOLDER = 0o600, 0o700


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


def secret_file(path: Path) -> bytes:
    """32 random bytes that are the same after every restart; made at the first call."""
    if not path.exists():
        private_folder(path.parent)
        replace_file(path, secrets.token_bytes(32))
    return path.read_bytes()
