"""How a trained role is spread over processes: where its weights lie, how gradients meet, how a step is made.

single     every process holds everything; gradients are averaged in one message
fsdp2      weights, gradients, optimiser and average are sharded, block by block (torch fully_shard)
deepspeed  weights are whole everywhere, gradients and optimiser are sharded (ZeRO-2), one engine per trained role

A stage calls the same five things on each: `wrap` before the optimiser is made, `start`, any backward passes,
`update` (average, clip, step), and `optimiser_state` / `load_optimiser_state` for the checkpoint. All three make the
step that one process would make on all their clips together.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from liveavatar.core import ConfigError
from liveavatar.models.s2v import CausalS2V
from liveavatar.training.adapters import Role, unwrapped
from liveavatar.training.groups import average_gradients, device_of, grouped, rank_and_world
from liveavatar.training.memory import compute_blocks_again
from liveavatar.training.optimiser import Optimiser, groups_of

NAMES = ("single", "fsdp2", "deepspeed")
Slots = Mapping[str, torch.Tensor]  # what the optimiser remembers of one parameter


class StepConfig(Protocol):
    """What loop.LoopConfig says of a step."""

    strategy: str
    device: str
    bf16: bool
    checkpointing: bool
    batch: int
    lr: float
    audio_factor: float
    weight_decay: float
    beta1: float
    beta2: float
    muon: bool
    clip: float


class Single:
    """Everything everywhere."""

    def __init__(self, config: StepConfig):
        self.config, self.device = config, device_of(config.device)
        self.world = rank_and_world()[1]
        self.named: dict[str, nn.Parameter] = {}
        self.optimiser: torch.optim.Optimizer | None = None

    def wrap(self, module: nn.Module | Role) -> None:
        """Bring a module (trained or not) to where it will run. Again is no change: roles share their base."""
        model = unwrapped(module)
        if self.config.checkpointing and isinstance(model, CausalS2V):
            compute_blocks_again(model)
        model.to(self.device)

    def start(self, module: nn.Module | Role) -> None:
        """Make the optimiser of what is trained in `module`; `wrap` came before."""
        self.named = dict(module.named_parameters())
        self.optimiser = self._optimiser(self.named)

    def _optimiser(self, named: Mapping[str, nn.Parameter]) -> Optimiser:
        c = self.config
        return Optimiser(groups_of(named, c.weight_decay, c.muon, c.audio_factor), lr=c.lr, betas=(c.beta1, c.beta2))

    def update(self, rate: float) -> float:
        """One step by the gradients at hand, averaged over ranks and clipped; forgets them. Returns their norm before."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        self._average()
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _average(self) -> None:
        if self.world > 1:
            average_gradients(list(self.named.values()), self.world)

    def optimiser_state(self) -> dict[str, Slots]:
        """By name of parameter; nothing for parameters that never had a gradient."""
        return {name: self.optimiser.state[p] for name, p in self.named.items() if p in self.optimiser.state}

    def load_optimiser_state(self, state: Mapping[str, Slots]) -> None:
        """Go on from `state`, whose tensors are sharded as slots_like makes them."""
        for name, slots in state.items():
            self.optimiser.state[self.named[name]] = dict(slots)

    def slot_like(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An empty slot of parameter `name` to read a stored one into."""
        p = self.named[name]
        return torch.empty_like(p, dtype=dtype) if shape == tuple(p.shape) and shape else torch.empty(shape, dtype=dtype)


# ---------------------------------------------------------------- FSDP2


class Sharded(Single):
    """fp32 masters in shards; gathered block by block for compute, in bf16 where the loop says so; reduced in fp32."""

    def wrap(self, module: nn.Module | Role) -> None:
        model = unwrapped(module)
        if isinstance(model, FSDPModule):
            return
        if not isinstance(model, CausalS2V):
            raise ConfigError("strategy fsdp2 is for the transformer; train the codec with strategy single")
        if self.config.checkpointing:
            compute_blocks_again(model)
        shard(model, init_device_mesh(self.device.type, (self.world,)), torch.bfloat16 if self.config.bf16 else None)

    def _average(self) -> None:
        """Was done in the backward passes."""


def shard(model: CausalS2V, mesh, dtype: torch.dtype | None) -> None:
    """Shard a transformer in place: each block and each injector by itself, the rest with the root.

    dtype: of gathered weights, None: as stored; the root, whose parts compute in fp32, always as stored. Methods that
    read weights outside of a module's forward are announced, so that these are gathered for them.
    """
    lower = functools.partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
    for block in model.blocks:
        lower(block)
        announce(block, "modulate", "text_keys_values", "prefill")
    for attention in model.audio_injector.injector:
        lower(attention)
        announce(attention, "keys_values", "cross")
    for adain in model.audio_injector.injector_adain_layers:
        lower(adain.linear)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False))
    announce(model, "forward_clip", "encode_text", "encode_audio", "modulation", "prefill_batch")


def announce(module: nn.Module, *methods: str) -> None:
    """Let FSDP gather the module's weights for these methods too. Where they call each other only the outermost counts:
    FSDP would put the weights away after the innermost, in the middle of the others."""
    inside: list[str] = []

    def guarded(name: str, plain, gathering):
        def call(*args, **kwargs):
            if inside:
                return plain(*args, **kwargs)
            inside.append(name)
            try:
                return gathering(*args, **kwargs)
            finally:
                inside.pop()

        return call

    for name in methods:
        plain = getattr(module, name)
        register_fsdp_forward_method(module, name)
        setattr(module, name, guarded(name, plain, getattr(module, name)))


# ---------------------------------------------------------------- DeepSpeed


class ZeRO2(Single):
    """DeepSpeed's ZeRO-2 over one role's parameters.

    Stage 2 of training makes several backward passes per step (clips one block after the other, the real clips' loss)
    with two roles in turn, while ZeRO-2 reduces at every pass of its one module. So the engine gets parameters of its
    own that share memory with the role's; passes add up in the role's gradients, and one pass of a linear function,
    whose gradient they are, hands the sum over. That costs one buffer of gradients, small for adapters.
    """

    def __init__(self, config: StepConfig):
        super().__init__(config)
        if config.muon:
            raise ConfigError("strategy 'deepspeed' has no muon: ZeRO-2 flattens matrices into slices; say muon: false")

    def start(self, module: nn.Module | Role) -> None:
        deepspeed = imported_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self.named = dict(module.named_parameters())
        self.engine_side = nn.ParameterList(nn.Parameter(p.data) for p in self.named.values())
        c = self.config
        settings = {"train_micro_batch_size_per_gpu": c.batch, "gradient_accumulation_steps": 1, "gradient_clipping": c.clip,
                    "zero_optimization": {"stage": 2, "overlap_comm": False}, "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False, "steps_per_print": 1 << 60}
        self.engine, *_ = deepspeed.initialize(model=self.engine_side, optimizer=self._optimiser(dict(zip(self.named, self.engine_side))), config=settings)
        for p, twin in zip(self.named.values(), self.engine_side):
            p.data = twin.data  # ZeRO moved it into its buffer, where it is updated in place
        self.optimiser = self.engine.optimizer.optimizer

    def update(self, rate: float) -> float:
        self._step([p.grad for p in self.named.values()], rate)
        for p in self.named.values():
            p.grad = None
        return float(self.engine.get_global_grad_norm())

    def _step(self, gradients: list[torch.Tensor | None], rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        pairs = [(twin, gradient) for twin, gradient in zip(self.engine_side, gradients) if gradient is not None]
        self.engine.backward(sum((twin * gradient).sum() for twin, gradient in pairs))
        self.engine.step()

    def optimiser_state(self) -> dict[str, Slots]:
        """Whole tensors, put together from the slices of all ranks one after the other and kept on the CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.optimiser.state:
            return {}
        self._link()
        step = next(iter(self.optimiser.state.values()))["step"]
        return {name: {"step": step.clone(), **{key: safe_get_full_optimizer_state(twin, key).cpu() for key in ("first", "second")}}
                for name, twin in zip(self.named, self.engine_side)}

    def load_optimiser_state(self, state: Mapping[str, Slots]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for p, twin in zip(self.named.values(), self.engine_side):  # its masters are slices of their own
            safe_set_full_fp32_param(twin, p.detach().float())
        if not state:
            return
        self._step([torch.zeros_like(p) for p in self.named.values()], 0.0)  # makes the slots, moves nothing
        self._link()
        for name, twin in zip(self.named, self.engine_side):
            for key in ("first", "second"):
                safe_set_full_optimizer_state(twin, state[name][key].to(twin.device), key)
        for slots in self.optimiser.state.values():
            slots["step"] = next(iter(state.values()))["step"].clone()

    def _link(self) -> None:
        """Tell each parameter where its slices of optimiser state are: ZeRO does so after the first step of the first
        group, when the other groups have none yet."""
        for twin in self.engine_side:
            if twin._hp_mapping is not None:
                flat = self.optimiser.param_groups[twin._hp_mapping.param_group_index]["params"][0]
                twin._hp_mapping.set_optim_state_fragment(flat, self.optimiser.state[flat])


def imported_deepspeed():
    """The package. Raises ConfigError without it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("strategy 'deepspeed' needs deepspeed: pip install 'liveavatar[deepspeed]'") from None
    # Its collectives in shared memory would be compiled now; gloo serves where this runs on a CPU at all.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def strategy_of(config: StepConfig) -> Single:
    """The strategy of a loop. Raises ConfigError."""
    if config.strategy != "single" and not grouped():
        raise ConfigError(f"strategy {config.strategy!r} runs in a group: say processes: 2 or more, or start it with torchrun, Slurm or Ray")
    return {"single": Single, "fsdp2": Sharded, "deepspeed": ZeRO2}[config.strategy](config)
