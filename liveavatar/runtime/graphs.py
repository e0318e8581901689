"""CUDA graphs of a step: the thousand launches of a forward replayed as one.

A graph has its addresses and shapes built in. What changes from block to block (latents, audio, rotations) is copied into
buffers of its own; sink, text and ring lie at addresses that stay for as long as the rank lives (roles.Identity), whatever is
written there; the ring's slot is part of which graph is taken. So there is one graph per session held at once, step and place
in the ring. A place is run as it is once and captured when it comes again, with whatever session: all of that before the rank
is ready (stage_roles.warm). A shape that changes is a fault of the caller and named, never captured silently again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from liveavatar.core import LiveAvatarError
from liveavatar.models.audio_encoder import AudioTokens
from liveavatar.models.cache import StepCache
from liveavatar.models.s2v import CausalS2V, Places, StepModulation, TextCache

Body = Callable[..., torch.Tensor]
Recorder = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""Captures a call that takes nothing: (how to run it again, the tensor its result lies in each time)."""
Place = tuple[int, int]
"""StepCache.place. It says how many anchors there are, too."""


class GraphShapeError(LiveAvatarError):
    """A captured step was called with tensors of other shapes or types; says which and what they were."""


def cuda_recorder(device: torch.device) -> Recorder:
    """torch.cuda.CUDAGraph, all in one pool of memory: what one leaves there another may overwrite.

    That is legal for the steps and sessions of one rank: they run one after the other on one stream, each takes its inputs from
    buffers outside the pool, and its result is kept alive (so never given to another capture) and copied before the next begins.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL has threads of its own
            out = call()
        return graph.replay, out

    return record


@dataclass
class Recorded:
    """The graphs of one cache. bound: objects whose addresses are built in; inputs: buffers filled before each replay."""

    bound: tuple[object, ...]
    inputs: list[torch.Tensor] = field(default_factory=list)
    graphs: dict[Place, tuple[Callable[[], None], torch.Tensor]] = field(default_factory=dict)


class GraphedForward:
    """Stands where a CausalS2V stands in denoise_block, for one step of any number of sessions over StepCaches.

    recorder: how calls are captured (None: CUDA graphs on the model's device).
    """

    def __init__(self, model: CausalS2V, recorder: Recorder | None = None):
        self.model, self.record = model, recorder or cuda_recorder(model.device)
        self._met: set[Place] = set()  # where a block ran as it is: what is compiled and planned for a place is there
        self._caches: WeakKeyDictionary[StepCache, Recorded] = WeakKeyDictionary()

    def __call__(self, x: torch.Tensor, modulation: StepModulation, audio: AudioTokens, text: TextCache, cache: StepCache, *,
                 block: int, sink_distance: int, pose: torch.Tensor | None = None, remember: bool = True) -> torch.Tensor:
        """As CausalS2V.forward for one stream [16, F, h, w]. Raises GraphShapeError."""
        places = self.model.places(block, *x.shape[-3:], sink_distance, cache.anchor_moves(block))
        poses = () if pose is None else (pose[None],)
        tensors = (x[None].to(self.model.device), *audio, places.block, places.reference, *poses, *places.turns)
        mine = self._recorded(cache, (text, cache.sink, modulation), tensors)

        def body(x, tokens, pooled, own, reference, *rest):
            turns = rest[len(poses) :]
            return self.model.velocity(x, Places(own, reference, turns), modulation, AudioTokens(tokens, pooled), text, cache, *rest[: len(poses)])

        velocity = self._run(mine, cache.place, body, tensors)
        if remember:
            cache.advance(block)
        return velocity[0]

    def _recorded(self, cache: StepCache, bound: tuple[object, ...], tensors: tuple[torch.Tensor, ...]) -> Recorded:
        """The cache's graphs, with a buffer for each of `tensors`; none yet where text or sink lie elsewhere than they did."""
        mine = self._caches.get(cache)
        if mine is None or any(a is not b for a, b in zip(mine.bound, bound)):
            mine = self._caches[cache] = Recorded(bound)
        for number, (buffer, given) in enumerate(zip(mine.inputs, tensors)):
            if buffer.shape != given.shape or buffer.dtype != given.dtype:
                raise GraphShapeError(f"input {number} of a captured step is {list(given.shape)} {given.dtype}, it was {list(buffer.shape)} "
                                      f"{buffer.dtype}: a session keeps its size; open another")
        mine.inputs += [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors[len(mine.inputs) :]]  # of the next anchor
        return mine

    def _run(self, mine: Recorded, place: Place, body: Body, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if place not in mine.graphs and place not in self._met:
            self._met.add(place)
            return body(*tensors)
        inputs = mine.inputs[: len(tensors)]
        for buffer, given in zip(inputs, tensors, strict=True):
            buffer.copy_(given)
        if place not in mine.graphs:
            mine.graphs[place] = self.record(lambda: body(*inputs))
        replay, out = mine.graphs[place]
        replay()
        return out.clone()
