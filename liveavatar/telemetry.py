"""The one place that reads a clock for timing.

Everything that decides by time takes the time as an argument; whoever needs the present asks `now`.
"""

from __future__ import annotations

import time


def now() -> float:
    """Seconds on a monotonic clock; differences mean something, the value itself does not."""
    return time.monotonic()
