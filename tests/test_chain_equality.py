"""The real chain: one rank == any cut == any launcher, byte for byte.

Two interleaved sessions of a tiny checkpoint, with a refresh from a generated latent (AAS), a new prompt, a
new portrait and an interrupt in the script; it is told when to blink and how to hold its head. Messages go to the chain itself, so that each takes effect at
the same block however fast the ranks are.
"""

import dataclasses
import importlib.util
import time

import numpy as np
import pytest
import torch
from conftest import TINY_SIZE, save_tiny, speech, tiny_model
from liveavatar import core
from liveavatar.conditioning.behaviour import LIDS_AND_HEAD, lid_closure
from liveavatar.config import Config, ModelConfig, RuntimeConfig, VideoConfig
from liveavatar.runtime import launchers

BLOCK, LOOKAHEAD, REFRESH_BLOCK = 7680, 2000, 4  # samples; samples of the log-mel front end; AAS
BLOCKS = {"a": 7, "b": 5}
CHAIN = ("condition", "step0", "step1", "step2", "step3", "decode")
CUTS = {
    "2": (CHAIN[:3], CHAIN[3:]),
    "3": (CHAIN[:1], CHAIN[1:4], CHAIN[4:]),
    "5": (CHAIN[:2], *((name,) for name in CHAIN[2:])),
}


def config_of(folder, stages, launcher) -> Config:
    return Config(model=ModelConfig(path=str(folder), device="cpu", dtype="float32"), stages=stages,
                  video=VideoConfig(height=TINY_SIZE, width=TINY_SIZE), runtime=RuntimeConfig(launcher=launcher, threads=1))


def picture(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, TINY_SIZE, TINY_SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Player:
    """Sends a script and keeps what comes up, by (session, kind). slices: of each refresh, one before each block from its own on."""

    def __init__(self, chain, slices: int = 1):
        self.chain, self.slices, self.heard = chain, slices, {}

    def take(self, timeout: float) -> None:
        came = self.chain.receive(timeout)
        if came is not None:
            assert not isinstance(came, core.Failed), came
            self.heard.setdefault((came.session, type(came).__name__), []).append(came)

    def wait(self, session: str, kind: str, count: int = 1) -> core.Message:
        end = time.monotonic() + 60
        while len(self.heard.get((session, kind), ())) < count:
            assert time.monotonic() < end, f"no {kind} of {session}"
            self.take(0.5)
        return self.heard[session, kind][count - 1]

    def play(self, pcm: dict[str, torch.Tensor]) -> None:
        for seed, name in enumerate(BLOCKS):
            self.chain.send(core.Open(name, seed=seed, prompt=f"{name} speaks", picture=picture(seed)))
        for index in range(max(BLOCKS.values())):
            for name in (n for n, count in BLOCKS.items() if index < count):
                self.before(name, index)
                start = index * BLOCK + LOOKAHEAD if index and not (name == "a" and index == 5) else index * BLOCK
                self.chain.send(core.Audio(name, index=index, epoch=int(name == "a" and index >= 5), start=start,
                                           pcm=pcm[name][start : (index + 1) * BLOCK + LOOKAHEAD]))
                self.take(0.0)
        for name in BLOCKS:
            self.chain.send(core.Close(name))
        for name in BLOCKS:
            self.wait(name, "Closed")

    def before(self, name: str, index: int) -> None:
        """What is said before block `index` of a session."""
        if 0 <= index - REFRESH_BLOCK < self.slices:
            latent = self.wait(name, "CleanLatent").latent
            self.chain.send(core.Refresh(name, reference=latent, slice=index - REFRESH_BLOCK, slices=self.slices))
        if (name, index) == ("a", 5):  # new speech from here: the look-ahead of block 4 is forgotten
            self.chain.send(core.Interrupt(name, epoch=1, sample=5 * BLOCK))
        if (name, index) == ("a", 2):
            self.chain.send(core.SetPrompt(name, prompt="and now something else"))
        if (name, index) == ("b", 3):
            self.chain.send(core.SetReference(name, picture=picture(9)))


def run(folder, stages, launcher, pcm, slices: int = 1, **sampler) -> dict:
    config = config_of(folder, stages, launcher)
    chain = launchers.launch(dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, **sampler)))
    try:
        player = Player(chain, slices)
        player.play(pcm)
    finally:
        chain.stop()
    return {key: [(getattr(m, "index", None), getattr(m, "epoch", None), tensor_bytes(m)) for m in messages]
            for key, messages in player.heard.items()}


def tensor_bytes(message) -> bytes | None:
    tensor = getattr(message, "pictures", getattr(message, "latent", None))
    return None if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A checkpoint whose control travels with the blocks; read only."""
    return save_tiny(tmp_path_factory.mktemp("told"), transformer=tiny_model(cond_dim=20), control=LIDS_AND_HEAD)


@pytest.fixture(scope="module")
def pcm():
    return {name: torch.from_numpy(speech(5.0, seed)) for seed, name in enumerate(BLOCKS)}


@pytest.fixture(scope="module")
def expected(tiny_folder, pcm):
    heard = run(tiny_folder, (CHAIN,), "inproc", pcm)
    for name, count in BLOCKS.items():
        frames = heard[name, "Frames"]
        assert [f[0] for f in frames] == list(range(count)) and len({f[2] for f in frames}) == count
        assert all(len(f[2]) == 12 * TINY_SIZE * TINY_SIZE * 3 for f in frames)
    assert [f[1] for f in heard["a", "Frames"]] == [0] * 5 + [1] * 2
    return heard


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_in_process(cut, tiny_folder, pcm, expected):
    assert run(tiny_folder, CUTS[cut], "inproc", pcm) == expected


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_in_local_processes(cut, tiny_folder, pcm, expected):
    assert run(tiny_folder, CUTS[cut], "local", pcm) == expected


def test_torchrun(tiny_folder, pcm, expected):
    assert run(tiny_folder, CUTS["2"], "torchrun", pcm) == expected


def test_ray(tiny_folder, pcm, expected):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install liveavatar[ray]")
    assert run(tiny_folder, CUTS["2"], "ray", pcm) == expected


def test_any_cut_with_a_sink_in_slices(tiny_folder, pcm, expected):
    """Of three slices "a" sees none before block 6, behind an interrupt; "b" is closed after the first."""
    one = run(tiny_folder, (CHAIN,), "inproc", pcm, 3)
    assert all(run(tiny_folder, CUTS[cut], launcher, pcm, 3) == one for cut, launcher in (("2", "inproc"), ("5", "local")))
    for name in BLOCKS:
        assert [x[2] == y[2] for x, y in zip(one[name, "Frames"], expected[name, "Frames"])] == [n < REFRESH_BLOCK for n in range(BLOCKS[name])]
    never = run(tiny_folder, (CHAIN,), "inproc", pcm, 0)
    assert never["b", "Frames"] == one["b", "Frames"]
    assert [x[2] == y[2] for x, y in zip(never["a", "Frames"], one["a", "Frames"])] == [n < REFRESH_BLOCK + 2 for n in range(BLOCKS["a"])]


def test_each_control_message_matters(tiny_folder, pcm, expected, monkeypatch):
    """Equality above means something: without the control messages other bytes come out, from their block on."""
    monkeypatch.setattr(Player, "before", lambda *_: None)
    heard = run(tiny_folder, CUTS["2"], "inproc", pcm)
    for name, first_change in (("a", 2), ("b", 3)):
        same = [x[2] == y[2] for x, y in zip(heard[name, "Frames"], expected[name, "Frames"], strict=True)]
        assert same == [index < first_change for index in range(len(same))]


def test_blinks_change_pictures_from_theirs_on_and_can_be_left_out(tiny_folder, pcm, expected):
    """Until the first of them a stream without is the same."""
    heard = run(tiny_folder, (CHAIN,), "inproc", pcm, blinks=False)
    for seed, name in enumerate(BLOCKS):
        first = int(np.flatnonzero(lid_closure(seed, name, 0, 90))[0]) // 12
        same = [x[2] == y[2] for x, y in zip(heard[name, "Frames"], expected[name, "Frames"], strict=True)]
        assert same == [index < first for index in range(len(same))], (name, first, same)
