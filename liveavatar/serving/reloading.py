"""SIGHUP (17.4): which settings hold from then on, and which wait for a restart. Pure."""

from __future__ import annotations

from dataclasses import is_dataclass, replace

from liveavatar.serving.settings import ServeConfig

RELOADED = {
    "access": ("sessions", "sessions_per_minute", "offers_per_minute", "requests_per_minute", "viewers", "audio_seconds_per_day",
               "upload_bytes_per_day", "image_bytes", "audio_bytes"),
    "sessions": ("idle_seconds", "length_seconds", "audio_seconds", "park_seconds", "drain_seconds"),  # all but the last: of sessions opened then
    "outputs": ("hosts", "private", "stall_seconds", "retry_seconds", "retry_limit_seconds"),
    "storage": ("recording_seconds", "keep_days"),
    "monitoring": ("log_level", "identity_floor"),
}  # fmt: skip


def merged(had: ServeConfig, fresh: ServeConfig) -> ServeConfig:
    """`had` with what of `fresh` needs no restart. Raises ConfigError where the two do not go together."""
    sections = {section: {name: getattr(getattr(fresh, section), name) for name in names} for section, names in RELOADED.items()}
    return replace(had, **{section: replace(getattr(had, section), **values) for section, values in sections.items()})


def differing(had: object, fresh: object, key: str = "") -> list[str]:
    """Keys by which two settings differ, as they stand in the file: "access.viewers"; a section that one has not: "talk"."""
    if not (is_dataclass(had) and type(had) is type(fresh)):
        return [] if had == fresh else [key]
    return [name for field in vars(had) for name in differing(getattr(had, field), getattr(fresh, field), f"{key}.{field}".lstrip("."))]
