"""The nouns: geometry, messages that travel down the chain, errors.

Imports torch and nothing of ours. Every message names the session it belongs to; a field's
comment says who sets it. See architecture.md sections 1 and 6 for the words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import torch

SAMPLE_RATE = 16_000  # Hz, of all PCM inside the runtime
FPS = 25  # pictures per second, of all video inside the runtime
FRAMES_PER_LATENT = 4  # temporal stride of the causal VAE after the first latent


# ---------------------------------------------------------------- errors


class LiveAvatarError(Exception):
    """Anything a person can cause or mend. The CLI prints it as one line and exits non-zero."""


class ConfigError(LiveAvatarError, ValueError):
    """An unknown key, wrong type or impossible value; names file, key and the nearest right key."""


class InputError(LiveAvatarError, ValueError):
    """A portrait, recording or prompt that cannot be used; says what is wrong and the way out."""


class WeightsError(LiveAvatarError):
    """A checkpoint that does not hold what the model needs; lists the keys."""


class PlacementError(LiveAvatarError):
    """A cut of the chain that does not concatenate or does not fit; says the numbers."""


class RankFailure(LiveAvatarError):
    """A rank died, hung or raised; names the rank, its roles and the reason."""

    def __init__(self, rank: int, roles: tuple[str, ...], reason: str):
        self.rank, self.roles, self.reason = rank, tuple(roles), reason
        super().__init__(f"rank {rank} ({'+'.join(roles)}): {reason}")


class SessionClosed(LiveAvatarError):
    """The session was closed or its stream has ended."""


# ---------------------------------------------------------------- geometry


def latents_of(pictures: int) -> int:
    """Latents that the causal VAE makes of so many pictures: one of the first, one of every further FRAMES_PER_LATENT (model.md 12)."""
    return 1 + (pictures - 1) // FRAMES_PER_LATENT


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of one stream, computed once from what the user said.

    height, width: pixels. spatial_stride: pixels per latent cell. block_latents: latent frames per
    block. ring_blocks: blocks a ring holds, the current one included. anchor_blocks: of those, first
    blocks of the stream that stay. first_block: what a stream's block 0 is numbered in time positions.
    """

    height: int
    width: int
    spatial_stride: int = 8
    block_latents: int = 3
    ring_blocks: int = 4
    motion_frames: int = 73
    anchor_blocks: int = 0
    first_block: int = 0

    def __post_init__(self):
        if not 0 <= self.anchor_blocks < self.ring_blocks:
            raise ConfigError(f"anchor_blocks={self.anchor_blocks}: must be 0..{self.ring_blocks - 1}, the ring holds {self.ring_blocks} blocks")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value <= 0 or value % (2 * self.spatial_stride):
                raise ConfigError(f"{name}={value}: must be a positive multiple of {2 * self.spatial_stride} pixels")

    @property
    def latent_height(self) -> int:
        return self.height // self.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.spatial_stride

    @property
    def tokens_per_latent(self) -> int:
        return (self.latent_height // 2) * (self.latent_width // 2)

    @property
    def block_tokens(self) -> int:
        return self.block_latents * self.tokens_per_latent

    @property
    def ring_tokens(self) -> int:
        return self.ring_blocks * self.block_tokens

    @property
    def anchor_tokens(self) -> int:
        return self.anchor_blocks * self.block_tokens

    @property
    def sink_tokens(self) -> int:
        """reference + motion 1x + motion 2x + motion 4x (model.md section 4)."""
        h, w = self.latent_height, self.latent_width
        return 2 * self.tokens_per_latent + (h // 4) * (w // 4) + 4 * (h // 8) * (w // 8)

    @property
    def frames_per_block(self) -> int:
        return self.block_latents * FRAMES_PER_LATENT

    @property
    def samples_per_block(self) -> int:
        return self.frames_per_block * SAMPLE_RATE // FPS

    @property
    def block_seconds(self) -> Fraction:
        return Fraction(self.frames_per_block, FPS)


# ---------------------------------------------------------------- messages down the chain
# Control and data travel the same road in order. Every role forwards what it does not consume.


@dataclass
class Message:
    session: str  # head


@dataclass
class Open(Message):
    """A session begins. The head gives the picture and the prompt; `condition` turns them into tensors."""

    seed: int = 0  # head
    prompt: str = ""  # head
    picture: torch.Tensor | None = None  # head: uint8 [3,H,W], already fitted to the geometry; cleared by condition
    reference: torch.Tensor | None = None  # condition: latents [16,1,h,w]
    motion: torch.Tensor | None = None  # condition: latents [16,M,h,w]
    context: torch.Tensor | None = None  # condition: text rows [n,text_dim], unpadded


@dataclass
class SetPrompt(Message):
    """New text from the next block on."""

    prompt: str = ""  # head
    context: torch.Tensor | None = None  # condition


@dataclass
class SetReference(Message):
    """New portrait from the next block on: sink prefilled again with its latents."""

    picture: torch.Tensor | None = None  # head: uint8 [3,H,W]
    reference: torch.Tensor | None = None  # condition
    motion: torch.Tensor | None = None  # condition


@dataclass
class Refresh(Message):
    """Adaptive attention sink: from the next block on the reference latent is this one, if this is the last slice of its prefill."""

    reference: torch.Tensor | None = None  # head: latents [16,1,h,w], came back as CleanLatent
    slice: int = 0  # head: which part of the layers to prefill now, in order
    slices: int = 1  # head: of how many

    @property
    def complete(self) -> bool:
        """Whether blocks see the new sink behind it; until then nothing changes for them."""
        return self.slice + 1 == self.slices


@dataclass
class Interrupt(Message):
    """The session's epoch rises; PCM beyond `sample` that was already sent is forgotten."""

    epoch: int = 0  # head
    sample: int = 0  # head: absolute 16 kHz sample at which the new speech begins


@dataclass
class Close(Message):
    """The session ends; every role drops its state."""


@dataclass
class Audio(Message):
    """One block's worth of new PCM (with whatever look-ahead the front end asked for)."""

    index: int = 0  # head: block index
    epoch: int = 0  # head
    start: int = 0  # head: absolute sample of pcm[0]
    pcm: torch.Tensor | None = None  # head: float32 [n] 16 kHz mono, contiguous with what was sent before
    noise: torch.Tensor | None = None  # head: only for parity runs: latents [16,3,h,w] in place of noise(seed, block)
    features: torch.Tensor | None = None  # head: only for parity runs: [L,Ca,12] in place of the front end's
    sink_distance: int | None = None  # head: only for parity runs: rel in place of the policy's
    head_pose: torch.Tensor | None = None  # head: degrees [12,3] of yaw, pitch and roll on top of what the head does by itself; None: none
    observe: bool = False  # head: every step reports its latents of this block (previews)
    finish_after: int | None = None  # head: only so many of the steps (SamplerConfig.finish_after, of this block alone); None: all


@dataclass
class Block(Message):
    """A block with its conditioning; keys and values never travel."""

    index: int = 0  # condition
    epoch: int = 0  # condition
    step: int = 0  # condition sets 0; each step adds 1: the step that runs next
    sink_distance: int = 30  # condition: rel of the rolling reference (model.md section 5)
    latents: torch.Tensor | None = None  # condition: noise [16,3,h,w]; each step: less noisy
    features: torch.Tensor | None = None  # condition: audio features [L,Ca,12]
    lids: torch.Tensor | None = None  # condition: closure of the lids [12], 0 open; None: the checkpoint takes none
    head_pose: torch.Tensor | None = None  # condition: yaw, pitch and roll [12,3] in degrees; None: the checkpoint takes none
    observe: bool = False  # condition: as the Audio said
    finish_after: int | None = None  # condition: as the Audio said


# ---------------------------------------------------------------- messages up to the head


@dataclass
class CleanLatent(Message):
    """First latent of a block's clean output, from the last step; the head sends it back as Refresh."""

    index: int = 0  # last step
    latent: torch.Tensor | None = None  # last step: [16,1,h,w]


@dataclass
class Frames(Message):
    """Decoded pictures of one block, from decode."""

    index: int = 0  # decode
    epoch: int = 0  # decode
    pictures: torch.Tensor | None = None  # decode: uint8 [12,H,W,3]


@dataclass
class Latents(Message):
    """Intermediate or clean latents for whoever asked (parity, previews): step is the step that made them."""

    index: int = 0
    step: int = 0
    latents: torch.Tensor | None = None  # [16,3,h,w]
    velocity: torch.Tensor | None = None  # [16,3,h,w] float32


@dataclass
class Opened(Message):
    """Every role has prefetched and primed: decode answers an Open with this."""


@dataclass
class Closed(Message):
    """decode answers a Close with this: all state of the session is gone along the chain."""


@dataclass
class Failed(Message):
    """A role refused a message of this session (bad portrait, say); the chain goes on."""

    reason: str = ""
    extra: dict = field(default_factory=dict)


@dataclass
class Span(Message):
    """A role's work on a message, from a rank of a traced run (telemetry.py). start, end: monotonic seconds of its host."""

    what: str = ""  # type of the message
    index: int | None = None  # its block
    role: str = ""
    rank: int = 0
    start: float = 0.0
    end: float = 0.0
    rss: int = 0  # bytes the process holds
    gpu: int = 0  # bytes its tensors hold on the GPU


UPWARD = (CleanLatent, Frames, Latents, Opened, Closed, Failed, Span)  # a stage hands these to the head, not to the next stage
