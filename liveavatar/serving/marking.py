"""What a session draws into its pictures: the label people see, then the mark machines read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import structlog

from liveavatar.core import ConfigError
from liveavatar.serving.badge import Badge
from liveavatar.serving.live import Role
from liveavatar.serving.settings import ProvenanceConfig
from liveavatar.serving.watermark import Watermark, server_key

Mark = Callable[[np.ndarray], np.ndarray]

logger = structlog.get_logger("liveavatar.marking")


def payload_of(owner: str, avatar: str) -> int:
    """The 32 bits in a session's pictures: a tag of tenant and avatar that only who knows both can recognise. Tags of different ones
    may coincide: one pair in four thousand million."""
    return int.from_bytes(hashlib.sha256(f"{len(owner)}:{owner}{avatar}".encode()).digest()[:4], "big")


def marker(config: ProvenanceConfig, folder: Path) -> Callable[[Role, int, int], Mark]:
    """Studio's `marker`. folder: storage.folder, where the key is made at first start. What is switched off is logged. Raises ConfigError."""
    for name in ("watermark", "badge", "sign"):
        if not getattr(config, name):
            logger.warning("provenance is switched off", what=name)
    key_file = None if config.watermark_key_file is None else Path(config.watermark_key_file)
    key = server_key(folder, key_file) if config.watermark else None

    def made(role: Role, height: int, width: int) -> Mark:
        steps = [] if not config.badge else [_badge(config.badge_text, height, width).draw]
        steps += [] if key is None else [Watermark(key, payload_of(role.owner, role.avatar), height, width).mark]
        return lambda picture: _all(steps, picture)

    return made


def _badge(text: str, height: int, width: int) -> Badge:
    try:
        return Badge(text, height, width)
    except ValueError as error:
        raise ConfigError(f"provenance.badge_text: {error}") from None


def _all(steps: list[Mark], picture: np.ndarray) -> np.ndarray:
    for step in steps:
        picture = step(picture)
    return picture
