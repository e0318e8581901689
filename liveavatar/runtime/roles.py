"""Who does what to a block: Conditioner, Denoiser, Decoder: message in, messages out.

A role is a callable `role(message) -> list[Message]`. Messages for the next role and messages for the
head (core.UPWARD) come back in one list; the worker parts them. A role forwards what it does not consume, keeps its
state per session in a dict and takes it out at Close, so interleaved sessions cannot touch each other and
a chain may live for ever. One session's refusal (InputError) becomes Failed; anything else is a fault
of the rank and goes through.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from liveavatar import core
from liveavatar.conditioning.behaviour import control_planes, head_pose, lid_closure
from liveavatar.core import Audio, Block, Close, Geometry, InputError, Interrupt, Message, Open, Refresh, SetPrompt, SetReference
from liveavatar.diffusion.denoise import euler, noise, sink_distance
from liveavatar.diffusion.rollout import Step, denoise_block
from liveavatar.models.audio_encoder import AudioTokens
from liveavatar.models.cache import Sink, StepCache
from liveavatar.models.layers import to_device
from liveavatar.models.rows import ALONE, Exchange, Row, forward_rows
from liveavatar.models.s2v import CausalS2V, TextCache
from liveavatar.runtime.graphs import GraphedForward, Recorder

PRIMING_LATENTS = 7  # motion latents a decoder swallows before block 0 (model.md section 12)
REMEMBERED = 8  # portraits, and prompts, whose encodings a Conditioner keeps; the oldest unused leaves first

Role = Callable[[Message], list[Message]]


class Recent:
    """The last few results of an expensive pure function, by key."""

    def __init__(self, size: int = REMEMBERED):
        self.size, self._items = size, OrderedDict()

    def get(self, key, make: Callable[[], object]):
        """The stored value of `key`, or make() stored under it."""
        if key not in self._items:
            self._items[key] = make()
        self._items.move_to_end(key)
        while len(self._items) > self.size:
            self._items.popitem(last=False)
        return self._items[key]


# ---------------------------------------------------------------- condition


@dataclass
class Listening:
    """What the Conditioner knows of one session. stream: audio features in the making (None in parity runs)."""

    seed: int
    stream: object | None


class Conditioner:
    """From what people give to what the model eats: portrait -> latents, prompt -> rows, PCM -> features, seed -> noise.

    front_end: AudioFrontEnd or None; encode_prompt: prompt -> [n, text_dim] or None; vae: StreamingVAE or
    None. Each may be None where the messages already carry the tensors (parity runs).
    sink_policy: a distance, or "random". dtype: of the latents that hop from rank to rank. lids: blocks are
    told when to blink. head_motion: spread of yaw, pitch and roll that heads are told to drift by, degrees; None: they are not told.
    """

    def __init__(self, *, geometry: Geometry, latent_channels: int, sink_policy: int | str, dtype: torch.dtype,
                 device: torch.device | str, front_end=None, encode_prompt=None, vae=None, lids: bool = False,
                 head_motion: tuple[float, float, float] | None = None):
        self.geometry, self.sink_policy, self.dtype, self.device = geometry, sink_policy, dtype, torch.device(device)
        self.front_end, self.encode_prompt, self.vae = front_end, encode_prompt, vae
        self.lids, self.head_motion = lids, head_motion
        g = geometry
        self.block_shape = (latent_channels, g.block_latents, g.latent_height, g.latent_width)
        self.sessions: dict[str, Listening] = {}
        self._portraits, self._prompts = Recent(), Recent()

    def __call__(self, message: Message) -> list[Message]:
        try:
            return self._handle(message)
        except InputError as refusal:
            return [core.Failed(message.session, reason=str(refusal))]

    def _handle(self, message: Message) -> list[Message]:
        match message:
            case Open():
                return [self._open(message)]
            case Close():
                self.sessions.pop(message.session, None)
                return [message]
            case _ if message.session not in self.sessions:
                return []  # its Open was refused; what was already on the way ends here
            case Audio():
                return [self._block(message)]
            case SetPrompt():
                return [self._with_context(message)]
            case SetReference():
                return [self._with_portrait(message)]
            case Interrupt():
                stream = self.sessions[message.session].stream
                if stream is not None:
                    stream.truncate(message.sample)
        return [message]

    def _open(self, message: Open) -> Open:
        opened = self._with_context(self._with_portrait(message))
        stream = self.front_end.new_stream() if self.front_end is not None else None
        self.sessions[message.session] = Listening(message.seed, stream)
        return opened

    def _with_context(self, message):
        """message with its prompt as text rows [n, text_dim], unless they came along."""
        if message.context is not None:
            return message
        return replace(message, context=self._prompts.get(message.prompt, lambda: self.encode_prompt(message.prompt)))

    def _with_portrait(self, message):
        """message with its picture as reference [16,1,h,w] and motion latents [16,M,h,w], unless they came along."""
        if message.picture is None:
            return message
        key = hashlib.blake2b(message.picture.contiguous().numpy().tobytes()).digest()
        reference, motion = self._portraits.get(key, lambda: self._encode_portrait(message.picture))
        return replace(message, picture=None, reference=reference, motion=motion)

    def _encode_portrait(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [3,H,W] -> latents of the picture alone, and of the picture held for motion_frames (model.md 10)."""
        still = (picture.to(self.device).float() / 127.5 - 1.0)[:, None]
        held = still.expand(-1, self.geometry.motion_frames, -1, -1)
        return self.vae.encode(still).to(self.dtype), self.vae.encode(held).to(self.dtype)

    def _block(self, message: Audio) -> Block:
        mine, index = self.sessions[message.session], message.index
        features, latents, distance = message.features, message.noise, message.sink_distance
        if features is None:
            mine.stream.push(message.pcm)
            features = mine.stream.features(index)
        if latents is None:
            latents = noise(mine.seed, message.session, index, self.block_shape)
        if distance is None:
            distance = sink_distance(self.sink_policy, mine.seed, index)
        size = self.geometry.frames_per_block
        pictures = mine.seed, message.session, index * size, size
        lids = torch.from_numpy(lid_closure(*pictures)) if self.lids else None
        head = torch.from_numpy(head_pose(*pictures, self.head_motion)) if self.head_motion is not None else None
        if head is not None and message.head_pose is not None:
            head = head + message.head_pose
        return Block(message.session, index=index, epoch=message.epoch, sink_distance=distance,
                     latents=to_device(latents.to(self.dtype), self.device), features=to_device(features, self.device), lids=lids, head_pose=head,
                     observe=message.observe, finish_after=message.finish_after)


# ---------------------------------------------------------------- denoise


@dataclass
class Coming:
    """A sink that is prefilled in slices while blocks see the old one. sink: its layers so far, `done` of them; layers: keys and values
    of the others, computed when they are asked for."""

    reference: torch.Tensor
    layers: Iterator[tuple[torch.Tensor, torch.Tensor]]
    sink: Sink
    done: int = 0


@dataclass
class Identity:
    """Who a session shows, as all steps of a stage see it. text: K/V of the prompt; sink: shared, un-rotated K/V; caches: of each step.

    What is large stays where it is: a new prompt or portrait is written over the old one, and a session that opens takes what one
    that has closed leaves, so that nothing is allocated while a stream runs and captured forwards stay true (graphs.py).
    """

    text: TextCache
    sink: Sink
    reference: torch.Tensor | None = None  # [16,1,h,w]
    motion: torch.Tensor | None = None  # [16,M,h,w]
    caches: dict[int, StepCache] = field(default_factory=dict)
    coming: Coming | None = None


class StageSinks:
    """What the steps of one stage share per session: text cache, sink, audio tokens of the block at hand.

    A role of its own, put before the stage's first Denoiser, so each is computed once per stage however
    many steps the stage holds: the sink does not depend on the step (model.md section 7).
    """

    def __init__(self, model: CausalS2V, exchange: Exchange = ALONE):
        self.model, self.exchange = model, exchange
        self.sessions: dict[str, Identity] = {}
        self.spare: list[Identity] = []  # of closed sessions: as many as were open at once, which the engine bounds (runtime.sessions)
        self.audio: AudioTokens | None = None

    @torch.inference_mode()
    def __call__(self, message: Message) -> list[Message]:
        match message:
            case Open() | SetPrompt() | SetReference():
                self.sessions[message.session] = self._identity(message)
            case Refresh():
                self._refresh(message)
            case Close():
                self._close(message.session)
            case Block():
                self.audio = self.model.encode_audio(message.features)
        return [message]

    def _identity(self, message) -> Identity:
        """The session's, as it is from `message` on."""
        context, reference, motion = (getattr(message, name, None) for name in ("context", "reference", "motion"))
        mine = self.sessions.get(message.session) or (self.spare.pop() if self.spare else None)
        text = mine.text if context is None else self.model.encode_text(context.to(self.model.device))
        reference = mine.reference if reference is None else reference
        motion = mine.motion if motion is None else motion
        sink = self.model.prefill(reference, motion, text)
        if self.exchange.shards > 1:
            sink = Sink(self.exchange.own_heads(sink.k), self.exchange.own_heads(sink.v))
        if mine is None:
            return Identity(text, sink, reference, motion)
        for kept, made in zip((mine.sink.k, mine.sink.v, *chain(*mine.text.layers)), (sink.k, sink.v, *chain(*text.layers)), strict=True):
            kept.copy_(made)
        mine.reference, mine.motion = reference, motion
        coming, mine.coming = mine.coming, None
        if coming is not None and isinstance(message, SetPrompt):  # a portrait ends a refresh; a prompt does not, but its layers saw the old text
            mine.coming = self._coming(mine, coming.reference, coming.sink)
            self._prefill(mine.coming, coming.done)
        return mine

    def _refresh(self, message: Refresh) -> None:
        """A slice of the layers of a new reference's sink; with the last one it is the session's."""
        mine = self.sessions[message.session]
        if message.slice == 0:
            # at once no block sees it half done, so it needs no memory of its own
            sink = mine.sink if message.complete else Sink(torch.empty_like(mine.sink.k), torch.empty_like(mine.sink.v))
            mine.coming = self._coming(mine, message.reference, sink)
        assert mine.coming is not None, "slices come in order, from the first on"
        self._prefill(mine.coming, len(self.model.blocks) * (message.slice + 1) // message.slices)
        if message.complete:
            mine.sink.k.copy_(mine.coming.sink.k)
            mine.sink.v.copy_(mine.coming.sink.v)
            mine.reference, mine.coming = mine.coming.reference, None

    def _coming(self, mine: Identity, reference: torch.Tensor, sink: Sink) -> Coming:
        device = self.model.device
        return Coming(reference, self.model.prefill_layers(reference.to(device)[None], mine.motion.to(device)[None], mine.text), sink)

    def _prefill(self, coming: Coming, end: int) -> None:
        """Its layers up to `end`."""
        for layer, (k, v) in zip(range(coming.done, end), coming.layers):
            coming.sink.k[layer].copy_(self.exchange.own_heads(k)[0])
            coming.sink.v[layer].copy_(self.exchange.own_heads(v)[0])
        coming.done = end

    def _close(self, session: str) -> None:
        if session not in self.sessions:
            return  # its Open was refused
        mine = self.sessions.pop(session)
        mine.coming = None
        for cache in mine.caches.values():
            cache.reset()
        self.spare.append(mine)


class Denoiser:
    """One denoising step of every session: one ring per session (Identity.caches), at this step's noise level.

    All Denoisers of a stage share `model` and `sinks`. last: of all steps. The step that makes a block clean, this one or where
    the block says so an earlier one, reports the first clean latent a new portrait leads to (CleanLatent). observe: report the
    latents and velocity of every block (Latents), not only of those that ask for it. recorder: how forwards are captured, one for all
    steps of a stage; None: they are not.
    """

    def __init__(self, model: CausalS2V, index: int, step: Step, sinks: StageSinks, geometry: Geometry, *,
                 last: bool, observe: bool = False, recorder: Recorder | None = None):
        self.forward = GraphedForward(model, recorder) if recorder else model
        self.model, self.index, self.step, self.sinks, self.geometry = model, index, step, sinks, geometry
        self.last, self.observe = last, observe
        self.fresh: set[str] = set()  # sessions whose portrait has not led to a block yet

    @torch.inference_mode()
    def __call__(self, message: Message) -> list[Message]:
        match message:
            case Refresh(complete=False):
                return [message]
            case Open() | SetPrompt() | SetReference() | Refresh():
                self._take_sink(message.session)
                if isinstance(message, SetReference):
                    self.cache(message.session).forget()  # or the old person would live on in the new one's history
                if isinstance(message, Open | SetReference):
                    self.fresh.add(message.session)
            case Close():
                self.fresh.discard(message.session)
            case Block():
                return self._denoise(message)
        return [message]

    def _take_sink(self, session: str) -> None:
        g, h, w = self.geometry, self.geometry.latent_height, self.geometry.latent_width
        mine = self.sinks.sessions[session]
        if self.index not in mine.caches:
            mine.caches[self.index] = self.model.new_cache(h, w, g.block_latents, g.ring_blocks, g.anchor_blocks, self._new_cache)
        self.model.set_sink(mine.caches[self.index], mine.sink, h, w)

    def cache(self, session: str) -> StepCache:
        """The session's history at this step."""
        return self.sinks.sessions[session].caches[self.index]

    def _new_cache(self, *, heads: int, **sizes) -> StepCache:
        """A StepCache of this rank's heads."""
        return StepCache(heads=heads // self.sinks.exchange.shards, **sizes)

    def _denoise(self, block: Block) -> list[Message]:
        if block.finish_after is not None and self.index >= block.finish_after:
            return self._left_out(block)
        row, exchange = self.row(block), self.sinks.exchange
        step = replace(self.step, sigma_next=0.0) if self._finishes(block) else self.step
        if exchange.shards > 1:
            (velocity,) = forward_rows(self.model, [row], step.modulation, exchange)
            return self.done(block, euler(row.x, velocity, step.sigma, step.sigma_next), velocity)
        latents, velocity = denoise_block(self.forward, step, row.x, row.audio, row.text, row.cache,
                                          block=row.block, sink_distance=row.sink_distance, pose=row.pose)
        return self.done(block, latents, velocity)

    def _finishes(self, block: Block) -> bool:
        """Whether the block is clean after this step."""
        return self.last if block.finish_after is None else self.index + 1 == block.finish_after

    def _left_out(self, block: Block) -> list[Message]:
        """The block is clean already. With the next one that comes here history begins anew: no ring was ever trained with a gap."""
        self.cache(block.session).forget()
        return self.done(block, block.latents, torch.zeros_like(block.latents))

    def row(self, block: Block) -> Row:
        """The block at this step, with the conditioning that stands now and the session's history."""
        assert block.step == self.index, f"step{self.index} was given a block at step {block.step}"
        x = block.latents.to(self.model.device)
        lids, head = (told if told is None else to_device(told, x.device) for told in (block.lids, block.head_pose))
        pose = control_planes(lids, head, self.model.config.cond_dim, *x.shape[-2:])
        return Row(x, self.sinks.audio, self.sinks.sessions[block.session].text, self.cache(block.session),
                   self.geometry.first_block + block.index, block.sink_distance, pose)

    def done(self, block: Block, latents: torch.Tensor, velocity: torch.Tensor) -> list[Message]:
        """What leaves this step: the block, less noisy, and what the head wants to know. latents [16,3,h,w]; velocity: fp32."""
        out: list[Message] = []
        if self.observe or block.observe:
            out.append(core.Latents(block.session, index=block.index, step=self.index, latents=for_head(latents),
                                    velocity=for_head(velocity)))
        if block.session in self.fresh:
            self.fresh.remove(block.session)
            if self._finishes(block):
                out.append(core.CleanLatent(block.session, index=block.index, latent=for_head(latents[:, :1])))
        features = None if self.last else block.features  # the decoder does not listen
        return [*out, replace(block, step=block.step + 1, latents=latents, features=features)]


def for_head(tensor: torch.Tensor) -> torch.Tensor:
    """A copy for the head: contiguous fp32 on the CPU, holding on to nothing larger."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


# ---------------------------------------------------------------- decode


class Decoder:
    """Clean latents -> uint8 pictures through the streaming VAE; one state per session, primed at Open.

    Priming with the motion latents happens when the session opens, not on the way of its first picture, and
    lets block 0 give all its pictures (model.md section 12).
    """

    def __init__(self, vae):
        self.vae = vae
        self.states: dict[str, object] = {}

    @torch.inference_mode()
    def __call__(self, message: Message) -> list[Message]:
        match message:
            case Open():
                state = self.states[message.session] = self.vae.new_state()
                self.vae.decode(message.motion[:, :PRIMING_LATENTS].to(self.vae.device), state)
                return [core.Opened(message.session)]
            case Close():
                self.states.pop(message.session, None)
                return [core.Closed(message.session)]
            case Block():
                return [core.Frames(message.session, index=message.index, epoch=message.epoch, pictures=to_bytes(self.pictures(message)))]
        return []

    def pictures(self, block: Block) -> torch.Tensor:
        """Float [3,T,H,W] in [-1, 1]."""
        return self.vae.decode(block.latents.to(self.vae.device), self.states[block.session])


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """Float [-1, 1] [3,T,H,W] -> uint8 [T,H,W,3] on the CPU, rounded."""
    return to_levels(pictures).cpu()


def to_levels(pictures: torch.Tensor) -> torch.Tensor:
    """Float [-1, 1] [3,T,H,W] -> uint8 [T,H,W,3] where it is, rounded."""
    scaled = ((pictures.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return scaled.permute(1, 2, 3, 0).contiguous()


class ChainEnd:
    """Ends a chain that has no decoder (a rollout fixture has no VAE): answers Open and Close, swallows blocks."""

    def __call__(self, message: Message) -> list[Message]:
        match message:
            case Open():
                return [core.Opened(message.session)]
            case Close():
                return [core.Closed(message.session)]
        return []
