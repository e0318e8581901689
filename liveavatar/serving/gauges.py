"""What a session counts while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Gauges:
    """Running figures of a session."""

    blocks: int = 0
    interrupts: int = 0
    late: float = 0.0
    first_frame_seconds: float | None = None  # from the first pushed sound of a run to its first tick
    kinds: dict = field(default_factory=lambda: {"speech": 0, "idle": 0, "filler": 0})
    _since: float | None = None
    _ticks: int = 0
    _fps: float = 0.0

    def ticked(self, late: float, kind: str) -> None:
        """One more tick left."""
        self.late = late
        self.kinds[kind] += 1
        self._ticks += 1

    def fps(self, now: float) -> float:
        """Ticks per second since the last time this was asked, at least a second ago."""
        if self._since is None:
            self._since, self._ticks = now, 0
        elif now - self._since >= 1.0:
            self._fps, self._since, self._ticks = self._ticks / (now - self._since), now, 0
        return self._fps
