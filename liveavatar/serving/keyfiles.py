"""Secrets of one server, made at first start and readable by their owner only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from liveavatar.core import ConfigError
from liveavatar.serving.eventlog import sync_folder

WATERMARK_KEY = "watermark.key"  # in storage.folder
KEY_BYTES = 32


def kept_secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """The bytes of a file; where there is none, what make() gives, written with mode 0600 first. Raises ConfigError."""
    try:
        if not path.exists():
            write_new(path, make())
        return path.read_bytes()
    except FileExistsError:  # another process was quicker
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be used: {error.strerror}") from None


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """A new file that is whole or not there, also after a power cut. Raises OSError, FileExistsError where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # unlike rename, it never replaces
    finally:
        part.unlink()
    sync_folder(path.parent)


def watermark_key(folder: Path | None, file: Path | None = None) -> bytes:
    """The watermark's key: of `file`, else folder/watermark.key, made at first use. Raises ConfigError."""
    if file is None:
        assert folder is not None
        return kept_secret(folder / WATERMARK_KEY, lambda: secrets.token_bytes(KEY_BYTES))
    try:
        key = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: the watermark key cannot be read: {error.strerror}") from None
    if len(key) < 16:
        raise ConfigError(f"{file}: a watermark key of {len(key)} bytes: at least 16 are needed")
    return key
