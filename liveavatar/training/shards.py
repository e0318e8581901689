"""What training stores: clip files of the generator (conditioning/clipfiles.py has their form)."""

from __future__ import annotations

from liveavatar.conditioning.clipfiles import Clip, clip_path, clip_paths, read_arrays, read_clip, write_arrays, write_clip

__all__ = ["GENERATOR_VERSION", "Clip", "clip_path", "clip_paths", "read_arrays", "read_clip", "write_arrays", "write_clip"]

GENERATOR_VERSION = 1  # raise when the same seed would give other bytes
