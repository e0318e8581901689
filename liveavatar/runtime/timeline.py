"""One session's timeline: which PCM belongs to which block, what goes down the chain, what comes out.

Pure bookkeeping: no clock, no task, no socket, so every rule is a plain test. Positions are absolute 16 kHz
samples of what the session generates; block b covers [b, b+1) * samples_per_block.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from liveavatar.conditioning.behaviour import AXES
from liveavatar.core import FPS, SAMPLE_RATE, Audio, CleanLatent, Frames, Geometry, Interrupt, Message, Refresh


@dataclass(frozen=True)
class Admitted:
    """A block inside the chain. pcm: float32, the sound of the pictures that will be shown. source: see Output. at: clock seconds."""

    epoch: int
    pictures: int
    pcm: np.ndarray
    source: tuple[int, int]
    at: float


@dataclass(frozen=True)
class Output:
    """A block for the viewer.

    index: block. pts: seconds (exact) at which its first picture is due, counted over all that left the head.
    pictures: uint8 [n, H, W, 3], n = frames_per_block except for a last, shorter one; pcm: float32 [n * 640],
    the very samples those pictures were made for. source: which of the samples pushed so far, counted from 0 and
    [start, stop), the block begins with; the rest of it is silence that nobody pushed.
    """

    index: int
    epoch: int
    pts: Fraction
    pictures: np.ndarray
    pcm: np.ndarray
    source: tuple[int, int]


class Timeline:
    """PCM in; Audio, Refresh and Interrupt messages down; Output up.

    lookahead: samples the audio front end needs beyond a block. refresh_block: the sink is replaced by
    the stream's own first latent before this block, 0: never (model.md section 14). refresh_slices: its prefill is sent in so many
    parts, the first before refresh_block and one before each block behind it; with the last the sink is replaced.
    """

    def __init__(self, session: str, geometry: Geometry, *, lookahead: int, refresh_block: int, refresh_slices: int = 1):
        self.session, self.geometry, self.lookahead = session, geometry, lookahead
        self.refresh_at: int | None = refresh_block or None  # the next slice goes before this block
        self.refresh_slices, self._slice = refresh_slices, 0
        self.epoch, self.next_block, self.ended = 0, 0, False
        self.received = 0  # samples pushed so far
        self._used, self._silence = 0, 0  # of those, before the next block; samples of idle silence in front of the others
        self._pcm = np.zeros(0, dtype=np.float32)  # from the start of next_block on
        self._arriving = False  # the PCM that waits may be going on: some came since the last idle block
        self._settled = False  # what waits is the end of an utterance
        self._idled = True  # the last block was idle
        self._ahead = self._pcm  # look-ahead the chain was already sent beyond the start of next_block
        self._head = np.zeros((0, len(AXES)), np.float32)  # how the head is turned in the pictures of next_block and on
        self._inside: dict[int, Admitted] = {}
        self._ready: deque[tuple[int, Admitted, np.ndarray]] = deque()  # pictures not yet taken
        self._anchor, self._clean = 0, None  # first block of the present portrait, and its first clean latent
        self._shown = 0  # pictures that left
        self._observe = False  # the next block reports its latents

    # ------------------------------------------------------------ what is there

    @property
    def queued_seconds(self) -> float:
        """Audio not yet admitted."""
        return len(self._pcm) / SAMPLE_RATE

    @property
    def in_flight(self) -> int:
        """Blocks admitted and not yet taken."""
        return len(self._inside) + len(self._ready)

    @property
    def has_audio(self) -> bool:
        """The next block may go: all its samples and the look-ahead are there, or no more will come of this utterance."""
        need = self.geometry.samples_per_block + self.lookahead
        return len(self._pcm) >= need or ((self.ended or self._settled) and len(self._pcm) > 0)

    @property
    def urgent(self) -> bool:
        """Speech is there and the last block was idle: somebody waits for an answer."""
        return self._idled and not self._silence and self.received > self._used and self.has_audio

    @property
    def gated(self) -> bool:
        """The next block must wait for the clean latent its new sink is made of."""
        return self.refresh_at == self.next_block and self._clean is None

    @property
    def done(self) -> bool:
        """The audio has ended and every picture was taken."""
        return self.ended and len(self._pcm) == 0 and self.in_flight == 0

    @property
    def shown(self) -> Fraction:
        """Seconds of pictures that were taken."""
        return Fraction(self._shown, FPS)

    @property
    def next_pts(self) -> Fraction:
        """pts the next admitted block will have if nothing is interrupted; seconds."""
        waiting = [*self._inside.values(), *(admitted for _, admitted, _ in self._ready)]
        return Fraction(self._shown + sum(a.pictures for a in waiting if a.epoch == self.epoch), FPS)

    # ------------------------------------------------------------ from the client

    def push(self, pcm: np.ndarray) -> None:
        """Append float32 [n] 16 kHz mono."""
        assert not self.ended and pcm.dtype == np.float32 and pcm.ndim == 1
        self._pcm, self._arriving, self._settled = np.concatenate([self._pcm, pcm]), True, False
        self.received += len(pcm)

    def push_head(self, poses: np.ndarray) -> None:
        """Append degrees [n,3] float32, of the pictures behind those that were said."""
        self._head = np.concatenate([self._head, poses])

    def settle(self) -> None:
        """What waits is the end of an utterance: it need not wait for more, silence goes behind it."""
        self._arriving, self._settled = False, True

    def end(self) -> None:
        """No more PCM will come."""
        self.ended = True

    def idle(self) -> None:
        """The next block may not wait for audio. It is silence, before all that is queued: speech that is still
        arriving stays whole. When nothing came since the last idle block, what waits is the end of an
        utterance: it goes now, silence behind it."""
        size = self.geometry.samples_per_block
        if self._arriving or not len(self._pcm):
            self._pcm, self._silence = np.concatenate([np.zeros(size, np.float32), self._pcm]), self._silence + size
        self._arriving = False

    def interrupt(self) -> Interrupt:
        """A new epoch begins with the next block: forget queued PCM and pictures nobody took."""
        self.epoch += 1
        self._pcm = self._ahead = np.zeros(0, dtype=np.float32)
        self._used, self._silence = self.received, 0
        self._ready.clear()
        return Interrupt(self.session, epoch=self.epoch, sample=self._start)

    def new_portrait(self) -> None:
        """From the next block on another portrait: the latent of the old one must not come back."""
        self.refresh_at, self._slice, self._anchor, self._clean = None, 0, self.next_block, None

    def refresh(self) -> None:
        """Make the generated first latent the sink, from the next block that can have it on; slices that are under way do just that."""
        if not self._slice:
            self.refresh_at = max(self.next_block, self._anchor + 1)

    def observe(self) -> int:
        """The next block is to report what each step makes of it; returns its index."""
        self._observe = True
        return self.next_block

    # ------------------------------------------------------------ down the chain

    @property
    def _start(self) -> int:
        return self.next_block * self.geometry.samples_per_block

    def renew(self) -> Refresh | None:
        """The new sink the next block is to see, or a slice of it, once its latent is there; sent ahead of that block, it is prefilled
        while ranks wait."""
        if self.refresh_at != self.next_block or self._clean is None:
            return None
        refresh = Refresh(self.session, reference=self._clean, slice=self._slice, slices=self.refresh_slices)
        self.refresh_at, self._slice = (None, 0) if refresh.complete else (self.next_block + 1, self._slice + 1)
        return refresh

    def admit(self, now: float, finish_after: int | None = None) -> list[Message]:
        """Messages that send the next block down the chain. now: clock seconds, for measuring the pipe. finish_after: see core.Audio."""
        assert not self.gated and len(self._pcm)
        size, messages = self.geometry.samples_per_block, [refresh] if (refresh := self.renew()) else []
        if not self.ended:  # the end of an utterance; the stream goes on behind it
            self._pcm = np.concatenate([self._pcm, np.zeros(max(0, size - len(self._pcm)), np.float32)])
        window = np.zeros(size + self.lookahead, dtype=np.float32)
        window[: len(self._pcm)] = self._pcm[: len(window)]
        if not np.array_equal(self._ahead, window[: len(self._ahead)]):  # what was announced is not what came
            messages.append(Interrupt(self.session, epoch=self.epoch, sample=self._start))
            self._ahead = self._ahead[:0]
        fresh = window[len(self._ahead) :]
        messages.append(Audio(self.session, index=self.next_block, epoch=self.epoch, start=self._start + len(self._ahead),
                              pcm=torch.from_numpy(fresh.copy()), head_pose=self._turned(), observe=self._observe, finish_after=finish_after))
        self._observe = False
        self._inside[self.next_block] = self._admitted(window[:size], now)
        self._silence = max(0, self._silence - size)
        self._ahead, self._pcm = window[size:], self._pcm[size:].copy()
        self.next_block += 1
        return messages

    def _turned(self) -> torch.Tensor | None:
        """What was pushed for the next block's pictures, 0 where that ends; None: nothing."""
        size, turned = self.geometry.frames_per_block, self._head
        self._head = turned[size:].copy()
        return torch.from_numpy(np.pad(turned[:size], [(0, max(0, size - len(turned))), (0, 0)])) if len(turned) else None

    def _admitted(self, pcm: np.ndarray, now: float) -> Admitted:
        per_picture = self.geometry.samples_per_block // self.geometry.frames_per_block
        pictures = min(self.geometry.frames_per_block, math.ceil(len(self._pcm) / per_picture))
        return Admitted(self.epoch, pictures, pcm[: pictures * per_picture].copy(), self._source(len(pcm)), now)

    def _source(self, size: int) -> tuple[int, int]:
        """Pushed samples the next block begins with; an idle block has none."""
        start, self._idled = self._used, self._silence > 0 or self.received == self._used
        self._used += 0 if self._idled else min(size, self.received - start)
        return start, self._used

    # ------------------------------------------------------------ from the chain

    def clean(self, message: CleanLatent) -> None:
        """The first clean latent of the present portrait is here."""
        if message.index >= self._anchor:
            self._clean = message.latent

    def frames(self, message: Frames) -> Admitted:
        """Pictures of an admitted block; those of an older epoch go no further. Returns when it was admitted."""
        admitted = self._inside.pop(message.index)
        if admitted.epoch == self.epoch:
            self._ready.append((message.index, admitted, message.pictures.numpy()))
        return admitted

    def take(self) -> Output | None:
        """The next block for the viewer, or None."""
        if not self._ready:
            return None
        index, admitted, pictures = self._ready.popleft()
        pts, self._shown = Fraction(self._shown, FPS), self._shown + admitted.pictures
        return Output(index, admitted.epoch, pts, pictures[: admitted.pictures], admitted.pcm, admitted.source)
