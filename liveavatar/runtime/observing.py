"""A look into the chain: what every step makes of one block. Asked for block by block; nobody pays for it otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liveavatar.core import Frames, InputError, Latents, Message


class Observation:
    """Of block `index` of a session, filled as its messages come up, from whichever rank, in whichever order.

    latents: by step, float32 [C, 3, h, w], after the step. pictures: uint8 [12, H, W, 3]. stages: the cut, whose steps are to
    be seen. Raises InputError where there are none.
    """

    def __init__(self, index: int, stages: Sequence[Sequence[str]]):
        self.index, self.latents = index, dict[int, torch.Tensor]()
        self.pictures: torch.Tensor | None = None
        self._steps = sum(name.startswith("step") for stage in stages for name in stage)
        if not self._steps:
            raise InputError("this engine has no denoising steps to look at")

    @property
    def whole(self) -> bool:
        """Nothing more comes."""
        return self.pictures is not None and len(self.latents) == self._steps

    def take(self, message: Message) -> None:
        """Keep it if it is of this block."""
        match message:
            case Latents(index=self.index):
                self.latents[message.step] = message.latents
            case Frames(index=self.index):
                self.pictures = message.pictures
