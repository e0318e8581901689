"""Decode on a rank that also holds steps: on a CUDA stream of its own, beside the next block's denoising.

The host only queues blocks and takes the next message meanwhile. A block's decode begins when its latents are there, runs while the
steps of the next block do if that has come by then, and its pictures leave when the copy to host memory is done and the host
looks (pump.py). Sessions that open or close are waited for. On a CPU there is nothing to run beside: decode follows the step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from liveavatar import core
from liveavatar.core import Block, Close, Message, Open
from liveavatar.runtime.roles import Decoder, to_levels
from liveavatar.runtime.worktime import Work, mark

ROOM = 2  # decodes under way, one that runs and one behind it; a block more waits for the oldest: pictures never pile up on the GPU


@dataclass
class Decoding:
    """A decode that was queued. pictures: uint8 [T, H, W, 3] in pinned memory, whole once `work` has ended."""

    block: Block
    pictures: torch.Tensor
    work: Work


class DecoderBeside:
    """Decoder on a stream of its own. A holder (pump.Pump). Its sessions' states live on that stream alone."""

    def __init__(self, decoder: Decoder, device: torch.device):
        self.decoder, self.device = decoder, device
        self.stream = torch.cuda.Stream(device)
        self._queued: deque[Decoding] = deque()
        self.stream.wait_stream(torch.cuda.current_stream(device))  # the weights are there

    # ------------------------------------------------------------ a holder

    def under_way(self) -> list[tuple[Callable, Message]]:
        return [(self.decoder, item.block) for item in list(self._queued)[:1]]  # an advance waits for the oldest alone

    def done(self) -> bool:
        return self._queued[0].work.ended.query()

    def holds_back(self, message: Message) -> bool:
        if isinstance(message, Block):
            return len(self._queued) >= ROOM
        return isinstance(message, Open | Close) and any(item.block.session == message.session for item in self._queued)

    def beside(self) -> Work:
        return self._queued[0].work

    def advance(self) -> list[Message]:
        """Wait for the oldest decode and give its pictures."""
        item = self._queued.popleft()
        item.work.ended.synchronize()
        return [core.Frames(item.block.session, index=item.block.index, epoch=item.block.epoch, pictures=item.pictures)]

    def __call__(self, message: Message) -> list[Message]:
        if isinstance(message, Block):
            self._queued.append(self._decode(message))
        if not isinstance(message, Open | Close):
            return []  # a decoder does nothing on the others, so they need not wait for one
        with torch.cuda.stream(self.stream):
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            made = self.decoder(message)
        self.stream.synchronize()
        return made

    @torch.inference_mode()
    def _decode(self, block: Block) -> Decoding:
        given = time.monotonic()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the last step has made the latents
        with torch.cuda.stream(self.stream):
            began = mark()
            levels = to_levels(self.decoder.pictures(block))
            pictures = torch.empty(levels.shape, dtype=torch.uint8, pin_memory=True).copy_(levels, non_blocking=True)
            ended = mark()
        block.latents.record_stream(self.stream)  # its memory is not given away before the decode has read it
        return Decoding(block, pictures, Work(began, ended, given))


def decoder_on(decoder: Decoder, device: torch.device, shares: bool) -> Decoder | DecoderBeside:
    """`decoder`, beside the steps where it shares a GPU with them; elsewhere as it is."""
    return DecoderBeside(decoder, device) if shares and device.type == "cuda" else decoder
