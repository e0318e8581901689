"""Roles that need no model: a chain whose output depends on every message, every session and their order.

`condition` makes seeded noise and passes PCM on; each step multiplies by its own matrix and mixes with a
ring of its past; `decode` keeps a running mean. Prompt, refresh and portrait change what follows.
"""

import os
import time
from dataclasses import dataclass, replace

import torch

from liveavatar import core
from liveavatar.runtime.register import Register

SIZE = 16


def seeded(*parts: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(hash(parts) % 2**31)
    return generator


class ToyCondition:
    def __init__(self):
        self.seeds, self.biases = {}, {}

    def __call__(self, message):
        match message:
            case core.Open():
                self.seeds[message.session], self.biases[message.session] = message.seed, 0.0
                return [replace(message, picture=None, reference=(message.picture[None, :1] / 255.0 - 0.5).to(torch.bfloat16))]
            case core.SetPrompt():
                self.biases[message.session] = len(message.prompt) / 100
            case core.Close():
                del self.seeds[message.session], self.biases[message.session]
            case core.Audio():
                latents = torch.randn(SIZE, SIZE, generator=seeded(self.seeds[message.session], message.index))
                features = message.pcm.reshape(4, -1) + self.biases[message.session]
                return [core.Block(message.session, index=message.index, epoch=message.epoch,
                                   latents=latents.to(torch.bfloat16), features=features)]
        return [message]


class ToyStep:
    def __init__(self, index: int, last: bool):
        self.index, self.last, self.rings, self.sinks = index, last, {}, {}
        self.weight = torch.randn(SIZE, SIZE, generator=seeded(77, index)) / SIZE**0.5

    def __call__(self, message):
        match message:
            case core.Open():
                self.rings[message.session] = torch.zeros(SIZE, SIZE)
                self.sinks[message.session] = message.reference.float().mean()
            case core.Refresh(complete=True):
                self.sinks[message.session] = message.reference.float().mean()
            case core.Close():
                del self.rings[message.session], self.sinks[message.session]
            case core.Block():
                return self.denoise(message)
        return [message]

    def denoise(self, block):
        assert block.step == self.index
        x = torch.tanh(block.latents.float() @ self.weight + self.rings[block.session] + self.sinks[block.session])
        self.rings[block.session] = 0.5 * self.rings[block.session] + x * block.features.mean()
        latents = x.to(torch.bfloat16)
        out = [core.CleanLatent(block.session, index=0, latent=latents[:1])] if self.last and block.index == 0 else []
        return [*out, replace(block, step=block.step + 1, latents=latents)]


class ToyDecode:
    """swell: pictures are repeated this often, to make them large."""

    def __init__(self, swell: int):
        self.states, self.swell = {}, swell

    def __call__(self, message):
        match message:
            case core.Open():
                self.states[message.session] = torch.zeros(SIZE, SIZE)
                return [core.Opened(message.session)]
            case core.Close():
                del self.states[message.session]
                return [core.Closed(message.session)]
            case core.Block():
                state = self.states[message.session] = 0.5 * self.states[message.session] + message.latents.float()
                pictures = (state * 1e4).to(torch.int32).view(torch.uint8).repeat(self.swell, 1)
                return [core.Frames(message.session, index=message.index, epoch=message.epoch, pictures=pictures)]
        return []


@dataclass
class Trouble:
    """A role that does something bad at block `index`."""

    what: str
    index: int

    def __call__(self, message):
        if isinstance(message, core.Block) and message.index == self.index:
            if self.what == "raise":
                raise ValueError("the toy broke")
            if self.what == "hang":
                time.sleep(60)
            if self.what == "exit":
                os._exit(3)
        return [message]


@dataclass(frozen=True)
class ToySource:
    """Picklable source of toy stages; at: the stage name beside which trouble sits."""

    what: str | None = None
    at: str = "step1"
    index: int = 1
    swell: int = 1

    def build_stage(self, config, stage_names, device):
        if self.what == "build" and self.at in stage_names:
            raise core.WeightsError("weights of the toy are missing")
        roles = []
        for name in stage_names:
            if name == self.at and self.what:
                roles.append(Trouble(self.what, self.index))
            roles.append(self._role(name, config))
        return roles

    def _role(self, name, config):
        if name == "condition":
            return ToyCondition()
        if name == "decode":
            return ToyDecode(self.swell)
        return ToyStep(int(name[4:]), last=name == f"step{config.steps_run - 1}")


PAYLOAD = {"latents": ((16, 3, 48, 88), torch.bfloat16), "features": ((25, 1024, 12), torch.float32)}  # at 704x384


@dataclass
class FixedRole:
    """Sleeps for its time on every block, a step also on a new sink; passes the rest on as roles do. last: reports a clean latent.
    payload: blocks carry what the 14B model's carry, on this device; None: nothing."""

    name: str
    seconds: float
    refresh: float = 0.0
    last: bool = False
    payload: torch.device | None = None

    def __call__(self, message):
        time.sleep(self.seconds if isinstance(message, core.Audio | core.Block) else 0.0)
        return self.after(message)

    def row(self, block):
        """What a register asks a step for."""

    def after(self, message):
        if isinstance(message, core.Audio) and self.name == "condition":
            made = {name: torch.zeros(shape, dtype=dtype, device=self.payload) for name, (shape, dtype) in PAYLOAD.items()} if self.payload else {}
            message = core.Block(message.session, index=message.index, epoch=message.epoch, **made)
        if self.payload and isinstance(message, core.Block):
            assert message.latents.device.type == message.features.device.type == self.payload.type, (message.latents.device, self.payload)
        if not isinstance(message, core.Block):
            if isinstance(message, core.Refresh) and self.name.startswith("step"):
                time.sleep(self.refresh / message.slices)
            last = {core.Open: core.Opened, core.Close: core.Closed}.get(type(message)) if self.name == "decode" else None
            return [last(message.session)] if last else [] if self.name == "decode" else [message]
        if self.name == "decode":
            return [core.Frames(message.session, index=message.index, epoch=message.epoch, pictures=torch.zeros(12, 2, 2, 3, dtype=torch.uint8))]
        clean = [core.CleanLatent(message.session, index=0, latent=torch.zeros(1))] if self.last and message.index == 0 else []
        return [*clean, message]


class FixedRegister(Register):
    """A register whose forward sleeps: the slowest of its steps, times together[n - 1] for n blocks."""

    def __init__(self, steps, together, **how):
        super().__init__(lambda message: [message], steps, **how)
        self.together = together

    def advance(self):
        time.sleep(max(self.steps[item.place].seconds for item in self.blocks) * self.together[len(self.blocks) - 1])
        made = []
        for item in self.blocks:
            *upward, item.block = self.steps[item.place].after(item.block)
            item.place += 1
            made += upward if item.place < len(self.steps) else [*upward, item.block]
        self.blocks = [item for item in self.blocks if item.place < len(self.steps)]
        return made


@dataclass(frozen=True)
class FixedSource:
    """Picklable source of FixedRoles. seconds: by role; refresh: what a new sink costs a step; together: as FixedRegister's, with
    runtime.shift_register. payload: blocks carry tensors, on the stage's device."""

    seconds: dict
    refresh: float = 0.0
    together: tuple = (1.0,)
    payload: bool = False

    def build_stage(self, config, stage_names, device):
        device = torch.device(device) if self.payload else None
        roles = [FixedRole(name, self.seconds[name], self.refresh, name == f"step{config.steps_run - 1}", device) for name in stage_names]
        steps = [role for role in roles if role.name.startswith("step")]
        if not config.runtime.shift_register or len(steps) < 2:
            return roles
        place = roles.index(steps[0])
        return [*roles[:place], FixedRegister(steps, self.together, shift=True, batch=config.runtime.batch), *roles[place + len(steps) :]]


def script(blocks: int = 6) -> list[core.Message]:
    """Two interleaved sessions with a prompt change, an interrupt, a refresh and uneven lengths."""
    said = []
    for name, seed in (("a", 3), ("b", 4)):
        picture = torch.randint(0, 256, (3, 8, 8), generator=seeded(seed), dtype=torch.uint8)
        said.append(core.Open(name, seed=seed, prompt="x" * (2000 if name == "b" else 3), picture=picture))
    for index in range(blocks):
        for name in ("a", "b")[: 2 if index < blocks - 2 else 1]:
            pcm = torch.randn(64, generator=seeded(ord(name), index))
            said.append(core.Audio(name, index=index, epoch=int(index > 3), start=64 * index, pcm=pcm))
        if index == 2:
            said += [core.SetPrompt("a", prompt="a new prompt"), core.Refresh("b", reference=torch.ones(1, 4))]
        if index == 3:
            said.append(core.Interrupt("a", epoch=1, sample=64 * 4))
    return [*said, core.Close("b"), core.Close("a")]


def play(chain, messages, timeout: float = 30.0) -> dict[str, list[tuple]]:
    """Send all and gather what comes up until every session is closed: per session (kind, index, epoch, bytes).

    Per session and kind the order is that of the stream; between kinds it depends on the cut, so kinds are kept apart.
    """
    waiting, pending, heard = {m.session for m in messages}, list(messages), {}
    end = time.monotonic() + timeout
    while waiting and time.monotonic() < end:
        if pending:
            chain.send(pending.pop(0))
        came = chain.receive(0.0 if pending else 0.5)
        if came is None:
            continue
        tensor = getattr(came, "pictures", getattr(came, "latent", None))
        key = f"{came.session}/{type(came).__name__}"
        heard.setdefault(key, []).append((getattr(came, "index", None), getattr(came, "epoch", None),
                                          None if tensor is None else (str(tensor.dtype), tuple(tensor.shape),
                                                                      tensor.contiguous().view(torch.uint8).numpy().tobytes())))
        if isinstance(came, core.Closed):
            waiting.discard(came.session)
    assert not waiting, f"sessions {waiting} never closed"
    return heard
