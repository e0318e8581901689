"""Student, critic and teacher as LoRA adapters over one frozen transformer (training.md 2.8).

Which adapter a forward uses is an argument of that forward: `base.as_("student")` is the transformer with the student's
adapter, and two of them can be called in turn, nested, or computed again in a backward pass without disturbing each
other. It travels in a context variable, because the transformer's own layers know nothing of adapters; nothing is
switched on the modules, as PEFT's `set_adapter` would do, and nothing stays set after the call.
"""

from __future__ import annotations

import contextvars
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.diffusion.denoise import draw_seed
from liveavatar.models.lora import DEFAULT_ALPHA, lora_targets
from liveavatar.models.s2v import CausalS2V
from liveavatar.models.weights import load_transformer

IN_USE: contextvars.ContextVar[str | None] = contextvars.ContextVar("adapter in use", default=None)
BASE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen transformer and the size of the adapters on it. folder: checkpoint folder of any layout that serving
    reads; dtype: of the frozen weights in memory (parts that compute in fp32 stay fp32)."""

    folder: str
    rank: int = 128
    alpha: float = DEFAULT_ALPHA
    dtype: str = "bfloat16"

    def __post_init__(self):
        one_of("base.dtype", self.dtype, tuple(BASE_DTYPES))
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"base: rank={self.rank}, alpha={self.alpha}: must be positive")


@functools.cache
def _adapted_linear() -> type[nn.Module]:
    """PEFT's LoRA linear, told by the context which of its adapters to add. Raises ConfigError without PEFT."""
    try:
        from peft.tuners.lora.layer import Linear
    except ImportError:
        raise ConfigError("training adapters needs peft: pip install 'liveavatar[train]'") from None

    class AdaptedLinear(Linear):
        @property
        def active_adapters(self) -> list[str]:
            name = IN_USE.get()
            return [] if name is None else [name]

    return AdaptedLinear


class Base:
    """A frozen CausalS2V that carries any number of adapters of one size."""

    def __init__(self, model: CausalS2V, rank: int, alpha: float, seed: int = 0):
        self.model, self.rank, self.alpha, self.seed = model.eval().requires_grad_(False), rank, alpha, seed
        self.targets = lora_targets(model)
        self.adapters: set[str] = set()

    @classmethod
    def load(cls, config: BaseConfig, seed: int) -> Base:
        """From a checkpoint folder, on the CPU (mapped where no cast is needed). Raises WeightsError."""
        return cls(load_transformer(config.folder, BASE_DTYPES[config.dtype]), config.rank, config.alpha, seed)

    def as_(self, adapter: str | None) -> Role:
        """The transformer with `adapter` added, which is made at first use and changes nothing until trained; None: without any."""
        if adapter is not None and adapter not in self.adapters:
            self._add(adapter)
        return Role(self, adapter)

    def _add(self, adapter: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        linear = _adapted_linear()
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets), bias="none")
        config._register_custom_module({nn.Linear: linear})
        vars(self.model).pop("peft_config", None)  # PEFT keeps the first adapter's there and warns of a second
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed("adapter", self.seed, adapter))
            inject_adapter_in_model(config, self.model, adapter)
        found = {name for name, module in self.model.named_modules() if isinstance(module, linear)}
        assert found == self.targets.keys(), found ^ self.targets.keys()
        self.adapters.add(adapter)
        for name, p in self.model.named_parameters():
            if owner_of(name) == adapter:
                p.data = p.data.float()  # PEFT follows the base; steps of 1e-5 vanish in bf16
            p.requires_grad_(owner_of(name) is not None)


def owner_of(parameter: str) -> str | None:
    """The adapter that a parameter of an adapted transformer belongs to; None: the base."""
    parts = parameter.split(".")
    return parts[-2] if parts[-3:-2] in (["lora_A"], ["lora_B"]) else None


class Role:
    """A transformer with one adapter: called as a CausalS2V is, its parameters are the adapter's, under PEFT's names
    (`blocks.0.self_attn.q.lora_A.weight`), the same for every adapter."""

    def __init__(self, base: Base, adapter: str | None):
        self.base, self.adapter = base, adapter

    def __getattr__(self, name: str):
        value = getattr(self.base.model, name)
        return functools.partial(self._run, value) if callable(value) else value

    def __call__(self, *args, **kwargs):
        return self._run(self.base.model, *args, **kwargs)

    def _run(self, function, *args, **kwargs):
        token = IN_USE.set(self.adapter)
        try:
            made = function(*args, **kwargs)
        finally:
            IN_USE.reset(token)
        return self if made is self.base.model else made

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, in the order of the modules."""
        for name, p in self.base.model.named_parameters():
            if self.adapter is not None and owner_of(name) == self.adapter:
                yield name.removesuffix(f".{self.adapter}.weight") + ".weight", p

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    def requires_grad_(self, wanted: bool = True) -> Role:
        """For the adapter alone."""
        for p in self.parameters():
            p.requires_grad_(wanted)
        return self


def unwrapped(model: CausalS2V | Role) -> CausalS2V:
    """The modules behind a model."""
    return model.base.model if isinstance(model, Role) else model


@torch.no_grad()
def save_adapter(path: str | Path, weights: dict[str, torch.Tensor], rank: int, alpha: float, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write an adapter as the public Live-Avatar LoRA is laid out: `MODULE.lora_A.weight`, `MODULE.lora_B.weight`, nothing
    else at alpha 64 (896 tensors at 14B), `MODULE.alpha` too at any other. models/lora.py reads it. weights: by Role's names."""
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    if alpha != DEFAULT_ALPHA:
        state |= {name.removesuffix("lora_A.weight") + "alpha": torch.tensor(float(alpha)) for name in weights if name.endswith("lora_A.weight")}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".partial")
    save_file(state, part, metadata={"format": "pt", "rank": str(rank), "alpha": str(alpha)})
    os.replace(part, path)
    return path
