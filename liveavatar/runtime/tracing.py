"""The trace of an engine, where the config asks for one or somebody watches (telemetry.py has the format)."""

from __future__ import annotations

from collections.abc import Callable

from liveavatar.config import Config
from liveavatar.core import FPS, SAMPLE_RATE
from liveavatar.runtime.sources import StageSource
from liveavatar.telemetry import NoTrace, Trace, process_start


def open_trace(config: Config, source: StageSource, clock: Callable[[], float], watch: Callable[[dict], None] | None = None) -> Trace | NoTrace:
    """What runtime.trace asks for. config: resolved. watch: is given every line too. Raises InputError when that file cannot be written."""
    if config.runtime.trace is None and watch is None:
        return NoTrace()
    g = source.geometry
    facts = {"width": g.width, "height": g.height, "steps": config.steps_run, "model": config.model.path, "dtype": config.model.dtype,
             "device": config.model.device, "launcher": config.runtime.launcher, "stages": config.stages,
             "shards": config.runtime.shards, "seed": config.seed}
    return Trace(config.runtime.trace, clock, watch, started=process_start(), sample_rate=SAMPLE_RATE, fps=FPS,
                 samples_per_block=g.samples_per_block, frames_per_block=g.frames_per_block, lookahead=source.lookahead_samples,
                 facts=facts)
