"""The steps of one stage as a register: blocks that are under way move on together, one forward at a time.

Two cuts that save GPUs (pipeline.md sections 3 and 6). `shift`: while a block is at step m, the one behind it is at step
m - 1, and so on, each with its own sigma and its own ring; one read of the weights moves all of them. `batch`: blocks of
so many sessions stand at the same step. Nothing waits for company: a forward takes who is there, so a block alone needs
as many forwards as the stage has steps and is no later than without a register.

What changes a session's state (a portrait, a prompt, a refresh, its end) waits until the session's blocks have left, as
an interrupt does, so each takes effect at the same block at every step. Blocks of other sessions move on meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from liveavatar.core import Block, Message, Refresh
from liveavatar.diffusion.denoise import euler
from liveavatar.models.rows import Row, forward_rows, stack_modulations
from liveavatar.models.s2v import StepModulation
from liveavatar.runtime.roles import Denoiser, Recent, StageSinks


@dataclass
class Under:
    """A block under way in the stage: it has been through `place` of its steps. row: as it entered; its latents and cache are looked
    up at each step."""

    block: Block
    row: Row
    place: int = 0


def must_wait(session: str, under_way: Sequence[tuple[str, int]], *, shift: bool, batch: int) -> bool:
    """Whether a block of `session` has to wait until those under way, (session, steps it has been through), have moved on."""
    entering = [other for other, place in under_way if place == 0]
    return session in entering or len(entering) >= batch or (len(entering) < len(under_way) and not shift)


class Register:
    """StageSinks and Denoisers of one stage as one role. A holder (pump.Pump): takes blocks in, gives them out of `advance`."""

    def __init__(self, sinks: StageSinks, steps: Sequence[Denoiser], *, shift: bool, batch: int):
        self.sinks, self.steps, self.shift, self.batch = sinks, tuple(steps), shift, batch
        self.blocks: list[Under] = []  # in order of entry, so that those further on come first
        self._modulations = Recent()

    # ------------------------------------------------------------ a holder

    def under_way(self) -> list[tuple[Denoiser, Message]]:
        """Who does what in the next forward; empty: nothing to advance."""
        return [(self.steps[item.place], item.block) for item in self.blocks]

    def done(self) -> None:
        """A forward is made by advance."""

    def beside(self) -> None:
        """And on the rank's own stream."""

    def holds_back(self, message: Message) -> bool:
        """Whether something must advance before `message` may come in."""
        if isinstance(message, Refresh) and not message.complete:
            return False  # it changes nothing that a block sees
        if not isinstance(message, Block):
            return any(item.block.session == message.session for item in self.blocks)
        return must_wait(message.session, [(item.block.session, item.place) for item in self.blocks], shift=self.shift, batch=self.batch)

    def __call__(self, message: Message) -> list[Message]:
        assert not self.holds_back(message), "a register is advanced before it takes more"
        (message,) = self.sinks(message)
        if isinstance(message, Block):
            self.blocks.append(Under(message, self.steps[0].row(message)))
            return []
        for step in self.steps:
            (message,) = step(message)
        return [message]

    @torch.inference_mode()
    def advance(self) -> list[Message]:
        """One forward of all blocks under way; what has left the last step of the stage comes out, in order of entry."""
        moving = [(item, self.steps[item.place]) for item in self.blocks]
        rows = [replace(item.row, x=item.block.latents.to(step.model.device), cache=step.cache(item.block.session)) for item, step in moving]
        velocities = forward_rows(self.steps[0].model, rows, self._modulation(tuple(item.place for item, _ in moving)))
        made = []
        for (item, step), row, velocity in zip(moving, rows, velocities, strict=True):
            *upward, item.block = step.done(item.block, euler(row.x, velocity, step.step.sigma, step.step.sigma_next), velocity)
            item.place += 1
            made += upward if item.place < len(self.steps) else [*upward, item.block]
        self.blocks = [item for item in self.blocks if item.place < len(self.steps)]
        return made

    def _modulation(self, places: tuple[int, ...]) -> StepModulation:
        return self._modulations.get(places, lambda: stack_modulations([self.steps[place].step.modulation for place in places]))
