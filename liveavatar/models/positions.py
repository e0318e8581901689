"""Where tokens stand in time, rows and columns (model.md section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

REFERENCE_POSITION = 30  # time position of the reference during prefill, and before it starts to roll


def grid_positions(times: Sequence[int], rows: Sequence[int], columns: Sequence[int], device="cpu") -> torch.Tensor:
    """int64 [T*R*C, 3], time-major."""
    axes = [torch.tensor(list(a), dtype=torch.int64, device=device) for a in (times, rows, columns)]
    return torch.cartesian_prod(*axes).reshape(-1, 3)


def spread(n: int, m: int) -> list[int]:
    """m positions over 0..n-1, truncated (not rounded) like int(linspace(0, n-1, m)).

    numpy's, as in the reference: torch's linspace counts back from the end in its second half, and where the exact
    value is an integer the two truncate to different ones (first at latents of 110 rows).
    """
    return np.linspace(0, n - 1, m).astype(int).tolist()


def reference_position(block: int, block_latents: int, sink_distance: int) -> int:
    """Rolling reference: 30 at first, then `sink_distance` latents ahead of the block (model.md section 5)."""
    return REFERENCE_POSITION + max(0, block * block_latents - (REFERENCE_POSITION - sink_distance))
