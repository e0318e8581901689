"""What a rank runs: the roles of its stage, in order, made from a checkpoint with only the weights they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from liveavatar import ops
from liveavatar.config import Config
from liveavatar.core import Audio, Block, Close, ConfigError, Message, Open, latents_of
from liveavatar.diffusion.rollout import Step
from liveavatar.models.rows import ALONE, Exchange
from liveavatar.runtime.beside import decoder_on
from liveavatar.runtime.graphs import cuda_recorder
from liveavatar.runtime.links import QueueLink
from liveavatar.runtime.pump import Pump
from liveavatar.runtime.register import Register
from liveavatar.runtime.roles import ChainEnd, Conditioner, Decoder, Denoiser, Role, StageSinks
from liveavatar.runtime.sources import StageSource, open_source


def build_stage(config: Config, stage_names: Sequence[str], device: torch.device | str, exchange: Exchange = ALONE) -> list[Role]:
    """The roles of one rank, in order, with only the weights they need; warm where the first blocks would be slow (`warm`).

    stage_names: a slice of the chain, e.g. ("condition", "step0"). exchange: with the ranks that share the stage. Raises WeightsError, ConfigError, InputError.
    """
    source, device = open_source(config), torch.device(device)
    fast = config.model.fast
    ops.use_own_kernels(fast.kernels)
    ops.use_attention(fast.attention)
    if fast.graphs and device.type != "cuda":
        raise ConfigError(f"model.fast.graphs: CUDA graphs need a GPU, and this rank runs on {device.type}")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # what is said to be fp32 is (wav2vec2, the audio encoder), as matmuls are
        if "decode" in stage_names:  # its shapes are constant; each process measures for itself, so two starts may differ in their last bits
            torch.backends.cudnn.benchmark = True
    dtype = source.dtype(device)
    steps = [step_of(name) for name in stage_names if name.startswith("step")]
    pictures = {"condition", "decode"} & set(stage_names)
    vae = source.vae(dtype, device) if source.has_vae and pictures else None
    roles: list[Role] = []
    if "condition" in stage_names:
        roles.append(Conditioner(geometry=source.geometry, latent_channels=source.model_config.in_dim,
                                 sink_policy=source.sink_policy, dtype=dtype, device=device, vae=vae,
                                 front_end=source.front_end(device), encode_prompt=source.prompt_encoder(dtype, device), lids=source.lids,
                                 head_motion=source.head_motion))
    if steps:
        roles += _denoisers(source, steps, dtype, device, config, exchange)
    if "decode" in stage_names:
        roles.append(decoder_on(Decoder(vae), device, bool(steps) and config.runtime.decode_beside))
    elif stage_names[-1] == source.chain[-1]:
        roles.append(ChainEnd())
    if device.type == "cuda":
        warm(roles, source, stage_names, dtype, device, 1)
        warm(roles, source, stage_names, dtype, device, config.runtime.sessions)  # again, and every seat: see graphs.py
        torch.cuda.synchronize(device)
    elif fast.compile:
        warm(roles, source, stage_names, dtype, device, 1)
    return roles


def _denoisers(source: StageSource, steps: Sequence[int], dtype: torch.dtype, device: torch.device, config: Config,
               exchange: Exchange) -> list[Role]:
    model = source.transformer(dtype, device)
    sinks, last = StageSinks(model, exchange), len(source.sigmas) - 2
    with torch.inference_mode():
        levels = [Step(source.sigmas[k], source.sigmas[k + 1], model.modulation(source.timesteps[k])) for k in steps]
    recorder = cuda_recorder(device) if config.model.fast.graphs else None
    denoisers = [Denoiser(model, k, level, sinks, source.geometry, last=k == last, observe=source.observe, recorder=recorder)
                 for k, level in zip(steps, levels)]
    shift = config.runtime.shift_register and len(steps) > 1
    if shift or config.runtime.batch > 1:
        return [Register(sinks, denoisers, shift=shift, batch=config.runtime.batch)]
    return [sinks, *denoisers]


def warm(roles: Sequence[Role], source: StageSource, stage_names: Sequence[str], dtype: torch.dtype, device: torch.device, sessions: int) -> None:
    """Sessions of zeros, side by side, through the roles of a stage: what is compiled, planned, captured or allocated the first time is
    then there. Each has blocks enough for every place in its ring (StepCache.place). Twice, where forwards are captured (graphs.py)."""
    g = source.geometry
    blocks = 2 * g.ring_blocks - g.anchor_blocks - 1
    streams = [silence(f"warm-up-{n}", source, stage_names, dtype, device, blocks) for n in range(sessions)]
    inbox = QueueLink(sum(map(len, streams)))
    for message in chain(*zip(*streams)):
        inbox.send(message)
    inbox.close()
    Pump(roles, inbox, None, lambda message: None).run()


def silence(session: str, source: StageSource, stage_names: Sequence[str], dtype: torch.dtype, device: torch.device, blocks: int) -> list[Message]:
    """A session of so many blocks as it comes to a stage, from opening to closing; all zeros."""
    g, c = source.geometry, source.model_config
    zeros = partial(torch.zeros, dtype=dtype, device=device)
    features = torch.zeros(c.audio_layers, c.audio_dim, g.frames_per_block)
    latents = zeros(c.in_dim, g.block_latents, g.latent_height, g.latent_width)
    motion = zeros(c.in_dim, latents_of(g.motion_frames), g.latent_height, g.latent_width)
    opened = Open(session, reference=latents[:, :1], motion=motion, context=torch.zeros(1, c.text_dim))
    if "condition" in stage_names:
        if source.has_vae:
            opened = replace(opened, picture=torch.zeros(3, g.height, g.width, dtype=torch.uint8))
        ahead = torch.zeros(g.samples_per_block + source.lookahead_samples)
        said = [Audio(session, index=n, pcm=ahead if n == 0 else ahead[: g.samples_per_block], features=None if source.has_vae else features)
                for n in range(blocks)]  # fmt: skip
    else:
        step = min((step_of(name) for name in stage_names if name != "decode"), default=len(source.timesteps))
        lids = torch.zeros(g.frames_per_block) if source.lids else None
        head = torch.zeros(g.frames_per_block, 3) if source.head_motion is not None else None
        said = [Block(session, index=n, step=step, latents=latents, features=features.to(device), lids=lids, head_pose=head)
                for n in range(blocks)]  # fmt: skip
    return [opened, *said, Close(session)]


def step_of(name: str) -> int:
    """Number of the step that a role's name says."""
    return int(name.removeprefix("step"))
