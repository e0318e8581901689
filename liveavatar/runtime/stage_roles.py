"""What a rank runs: the roles of its stage, in order, made from a checkpoint with only the weights they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liveavatar import ops
from liveavatar.config import Config
from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import Step
from liveavatar.models.rows import ALONE, Exchange
from liveavatar.runtime.beside import decoder_on
from liveavatar.runtime.graphs import cuda_recorder
from liveavatar.runtime.register import Register
from liveavatar.runtime.roles import ChainEnd, Conditioner, Decoder, Denoiser, Role, StageSinks
from liveavatar.runtime.sources import StageSource, open_source


def build_stage(config: Config, stage_names: Sequence[str], device: torch.device | str, exchange: Exchange = ALONE) -> list[Role]:
    """The roles of one rank, in order, with only the weights they need.

    stage_names: a slice of the chain, e.g. ("condition", "step0"). exchange: with the ranks that share the stage. Raises WeightsError, ConfigError, InputError.
    """
    source, device = open_source(config), torch.device(device)
    fast = config.model.fast
    ops.use_own_kernels(fast.kernels)
    ops.use_attention(fast.attention)
    if fast.graphs and device.type != "cuda":
        raise ConfigError(f"model.fast.graphs: CUDA graphs need a GPU, and this rank runs on {device.type}")
    dtype = source.dtype(device)
    steps = [int(name.removeprefix("step")) for name in stage_names if name.startswith("step")]
    pictures = {"condition", "decode"} & set(stage_names)
    vae = source.vae(dtype, device) if source.has_vae and pictures else None
    roles: list[Role] = []
    if "condition" in stage_names:
        roles.append(Conditioner(geometry=source.geometry, latent_channels=source.model_config.in_dim,
                                 sink_policy=source.sink_policy, dtype=dtype, device=device, vae=vae,
                                 front_end=source.front_end(device), encode_prompt=source.prompt_encoder(dtype, device), lids=source.lids))
    if steps:
        roles += _denoisers(source, steps, dtype, device, config, exchange)
    if "decode" in stage_names:
        roles.append(decoder_on(Decoder(vae), device, bool(steps) and config.runtime.decode_beside))
    elif stage_names[-1] == source.chain[-1]:
        roles.append(ChainEnd())
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
