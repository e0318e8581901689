"""What the user may say: frozen dataclasses and a strict YAML loader.

One YAML file is one run. Unknown key, wrong type or impossible value raise ConfigError naming the
file, the key and the nearest right key. Nothing here is ever written to after it was built.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from liveavatar.core import ConfigError

LAUNCHERS = ("inproc", "local", "torchrun", "ray")
FACE_CROPS = ("auto", "none")
ATTENTION = ("auto", "flash3", "cudnn", "flash2", "torch", "fp8")
DTYPES = ("auto", "bfloat16", "float32")
MOST_HEAD_MOTION = 10.0  # degrees of spread; clips that were trained on had 3
MOST_HEAD_POSE = 15.0  # degrees of a pose that is pushed; those clips seldom went past 9


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    """How the transformer is made faster (docs/speed.md), each compared with the plain way by bench/accuracy.py. The defaults change no result
    on a CPU; on a GPU kernels and attention sum in another order than torch's own."""

    kernels: bool = True  # our Triton kernels where there is a GPU; False: the torch references everywhere
    packed_qkv: bool = False  # one matmul for q, k and v of self-attention
    fp8: bool = False  # linears of blocks and injectors in E4M3, a scale per row; half the memory, 7 % rms error of a forward
    compile: bool = False  # torch.compile of what stands around self-attention, and of the decoder; minutes at start
    graphs: bool = False  # CUDA graphs of a step; needs a GPU
    fp8_cache: bool = False  # keys and values of sink and ring in E4M3, a scale per token and head; half the memory of a session
    attention: str = "auto"  # in half precision on a GPU: flash3 | cudnn | flash2 | torch; auto: the best there is; fp8: ours over fp8_cache

    def __post_init__(self):
        if self.attention == "fp8" and not self.fp8_cache:
            raise ConfigError("model.fast.attention: fp8 reads keys and values that are kept so: say model.fast.fp8_cache=true too")
        one_of("model.fast.attention", self.attention, ATTENTION)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where weights lie and how they are run. path: checkpoint folder, or "default" for the embedded one."""

    path: str = "default"
    lora: str | None = None  # a Live-Avatar LoRA file merged at load
    dtype: str = "auto"  # auto: bfloat16 on a GPU or a CPU that is fast at it, else float32
    device: str = "auto"  # auto | cpu | cuda
    fast: FastConfig = field(default_factory=FastConfig)

    def __post_init__(self):
        if self.fast.graphs and self.device == "cpu":
            raise ConfigError("model.fast.graphs: CUDA graphs need a GPU, and model.device says cpu")
        one_of("model.dtype", self.dtype, DTYPES)
        one_of("model.device", self.device, ("auto", "cpu", "cuda"))


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Picture size, and what of a portrait is shown. None: the checkpoint's own size, or by the size rule from the portrait and area_cap."""

    height: int | None = None
    width: int | None = None
    area_cap: int | None = None  # pixels; model.md section 10
    face_crop: str = "auto"  # portraits are cut to the framing that the checkpoint names (conditioning/framing.py); none: only their middle

    def __post_init__(self):
        one_of("video.face_crop", self.face_crop, FACE_CROPS)
        for name in ("height", "width", "area_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"video.{name}={value}: must be positive")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Denoising steps and the policy of the sink."""

    steps: int = 4
    shift: float = 3.0
    finish_after: int | None = None  # pipeline.md section 4: run only this many of the steps, the last jumps to 0
    sink_distance: int | str = "checkpoint"  # rel in 4..30, "random" (a function of seed and block), or what the checkpoint says
    refresh_block: int | None = None  # AAS before this block; 0: never; None: what the checkpoint says
    refresh_slices: int = 1  # blocks the new sink's prefill is spread over, a part before each; the last of them is the first to see it
    anchor_blocks: int = 0  # first blocks that never leave the ring (Anchor-Heavy Identity Sinks); the paper's: 3 of 5
    blinks: bool = True  # given to checkpoints that take them (conditioning/behaviour.py); False: eyes as the weights have them
    head_motion: tuple[float, float, float] | None = (3.0, 1.8, 1.35)  # spread of yaw, pitch and roll that a head is told to drift by, degrees,
    # of checkpoints that take it; 0s: it is held still; None: it moves as the weights have it. The embedded avatar, so told, shows the 3, 2 and
    # 1.2 of its corpus: it goes further than told where it nods, less far where it tilts
    first_position: int = 0  # latent frames that the counter of time positions starts at: a stream as if so much had gone before

    def __post_init__(self):
        head = self.head_motion
        if head is not None and not (len(head) == 3 and all(0 <= spread <= MOST_HEAD_MOTION for spread in head)):
            raise ConfigError(f"sampler.head_motion={list(head)}: yaw, pitch and roll must each be 0..{MOST_HEAD_MOTION:g} degrees; null: not told")
        if not 0 < self.shift < math.inf:
            raise ConfigError(f"sampler.shift={self.shift}: must be a positive number (1.0: evenly spaced steps)")
        if not 1 <= self.steps <= 100:
            raise ConfigError(f"sampler.steps={self.steps}: must be 1..100")
        if self.finish_after is not None and not 1 <= self.finish_after <= self.steps:
            raise ConfigError(f"sampler.finish_after={self.finish_after}: must be 1..steps ({self.steps})")
        if isinstance(self.sink_distance, str):
            one_of("sampler.sink_distance", self.sink_distance, ("random", "checkpoint"))
        elif not 4 <= self.sink_distance <= 30:
            raise ConfigError(f"sampler.sink_distance={self.sink_distance}: must be 4..30, random or checkpoint")
        if self.refresh_block is not None and self.refresh_block < 0:
            raise ConfigError(f"sampler.refresh_block={self.refresh_block}: must be >= 0 (0: never)")
        if self.refresh_slices < 1:
            raise ConfigError(f"sampler.refresh_slices={self.refresh_slices}: must be >= 1 (1: all of it before refresh_block)")
        if self.anchor_blocks < 0:
            raise ConfigError(f"sampler.anchor_blocks={self.anchor_blocks}: must be >= 0 (0: none)")
        if self.first_position < 0:
            raise ConfigError(f"sampler.first_position={self.first_position}: must be >= 0")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Who runs what, and the limits that keep a stream alive."""

    launcher: str = "inproc"
    threads: int | None = None  # CPU threads of one rank; None: cores / ranks, at least 1
    in_flight: int | None = None  # blocks of one session inside the chain; None: one more than it works on at once
    queued_seconds: float = 10.0  # audio a session may hold before push_audio waits
    shards: tuple[int, ...] | None = None  # ranks that share each stage's forwards, a number per stage (sequence parallel); None: one
    decode_beside: bool = False  # decode that shares a GPU with steps runs on a CUDA stream of its own; on a CPU it follows the step
    heartbeat_seconds: float = 2.0  # silence after which a rank is declared dead
    block_seconds: float = 600.0  # one role may spend this long on one message before it counts as hung
    start_seconds: float = 600.0  # a rank must be ready within this
    sessions: int = 4  # sessions one chain holds
    shift_register: bool = False  # steps of one stage run side by side, each on its own block: one read of the weights for all
    batch: int = 1  # blocks of so many sessions go through a step together where they wait for it together
    ray_address: str | None = None
    trace: str | None = None  # file for the trace of the run (telemetry.py), replaced if it exists
    spans: bool = False  # ranks tell how long each role took, trace or none: who serves watches it

    def __post_init__(self):
        one_of("runtime.launcher", self.launcher, LAUNCHERS)
        for name in ("threads", "in_flight", "queued_seconds", "heartbeat_seconds", "block_seconds", "start_seconds", "sessions", "batch"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # so put, not-a-number is refused too
                raise ConfigError(f"runtime.{name}={value}: must be positive")
        if any(count < 1 for count in self.shards or ()):
            raise ConfigError(f"runtime.shards={list(self.shards)}: every stage needs a rank")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. stages: the chain cut into ranks; stage i runs on rank i."""

    model: ModelConfig = field(default_factory=ModelConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    stages: tuple[tuple[str, ...], ...] | None = None  # None: the whole chain on one rank
    prompt: str = ""
    seed: int = 0

    def __post_init__(self):
        if self.stages is not None and not self.stages:
            raise ConfigError("stages is empty: list the roles of each rank, or leave it out for one rank")

    @property
    def steps_run(self) -> int:
        return self.sampler.finish_after or self.sampler.steps

    @property
    def chain(self) -> tuple[str, ...]:
        """All roles in order, e.g. ("condition", "step0", ..., "decode")."""
        return ("condition", *(f"step{k}" for k in range(self.steps_run)), "decode")


# ---------------------------------------------------------------- loader


def one_of(key: str, value: object, allowed: typing.Sequence[str]) -> None:
    """Raise ConfigError naming `key` unless value is one of `allowed`."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key}={value!r}: must be one of {', '.join(allowed)}{hint}")


def build(cls: type, value: object, where: str = "config", key: str = ""):
    """Typed, strict construction of dataclass `cls` from plain YAML values.

    where: file name for messages; key: dotted path so far. Raises ConfigError.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {key or 'top level'} must be a mapping, got {type(value).__name__}")
    hints, known = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}
    arguments = {}
    for name, item in value.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {path!r}{hint}")
        arguments[name] = _convert(hints[name], item, where, path)
    missing = [n for n, f in known.items() if n not in arguments and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{where}: missing key {(key + '.' if key else '') + missing[0]!r}")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint, value, where: str, key: str):
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        problems = []
        for option in (o for o in options if o is not type(None)):
            try:
                return _convert(option, value, where, key)
            except ConfigError as error:
                problems.append(error)
        raise problems[-1]
    if is_dataclass(hint):
        return build(hint, value, where, key)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: {key} must be a list, got {value!r}")
        return tuple(_convert(options[0], item, where, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} must be a mapping, got {value!r}")
        if not options:
            return value
        return {_convert(options[0], name, where, key): _convert(options[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: {key} must be {hint.__name__}, got {value!r}")
    return value


def load_mapping(path: str | Path) -> dict:
    """Plain mapping of a YAML file. Raises ConfigError naming the file (and line) when it is not one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read config ({error.strerror}): give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot read config: not UTF-8 text: give the path of a YAML file") from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: top level must be a mapping")
    return value


def apply_overrides(mapping: dict, overrides: typing.Sequence[str]) -> dict:
    """A copy of `mapping` with each "a.b=value" (value in YAML) set. Raises ConfigError."""
    import copy

    result = copy.deepcopy(mapping)
    for text in overrides:
        path, equals, raw = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {text!r}: must read a.b=value")
        node = result
        *parents, leaf = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {text!r}: {name!r} is not a section")
        try:
            node[leaf] = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise ConfigError(f"override {text!r}: value is not YAML") from None
    return result


def load(path: str | Path | None, overrides: typing.Sequence[str] = (), cls: type = Config):
    """Config from a YAML file (None: all defaults) and overrides. Raises ConfigError."""
    mapping = load_mapping(path) if path is not None else {}
    return build(cls, apply_overrides(mapping, overrides), where=str(path or "command line"))
