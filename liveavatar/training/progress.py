"""How far training is: lines of the logger "liveavatar.training", which the command line shows on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

Item = TypeVar("Item")

LOG = logging.getLogger("liveavatar.training")
EVERY_SECONDS = 30.0  # between two lines of one count


def show() -> None:
    """Print the lines on stderr, in this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(logging.INFO)


def counted(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, with a line now and then that says how many are done."""
    told = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if now - told > EVERY_SECONDS:
            LOG.info("%s: %d of %d", what, number, len(items))
            told = now
        yield item


def row_told(stage: str, iterations: int, row: dict[str, float]) -> None:
    """A row of a stage's log."""
    rest = " ".join(f"{name} {value:.3g}" for name, value in row.items() if name not in ("iteration", "seconds"))
    LOG.info("%s %d/%d, %.0f s: %s", stage, row["iteration"], iterations, row["seconds"], rest)
