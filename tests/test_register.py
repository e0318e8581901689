"""Blocks of a stage that move on together: the same as one after the other, for several steps and several sessions."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY_SIZE, save_tiny, speech, tiny_model

from liveavatar import core
from liveavatar.conditioning.behaviour import LIDS_AND_HEAD
from liveavatar.config import Config, ModelConfig, RuntimeConfig, VideoConfig
from liveavatar.core import ConfigError
from liveavatar.models.rows import Row, forward_rows, stack_modulations
from liveavatar.runtime.engine import resolve
from liveavatar.runtime.links import QueueLink
from liveavatar.runtime.placement import blocks_inside
from liveavatar.runtime.pump import Pump
from liveavatar.runtime.register import Register
from liveavatar.runtime.stage_roles import build_stage

BLOCK, LOOKAHEAD = 7680, 2000
TOLERANCE = 2e-4  # of latents whose size is about 1: matmuls of another height sum in another order


def config_of(folder, **runtime) -> Config:
    return Config(model=ModelConfig(path=str(folder), device="cpu", dtype="float32"), video=VideoConfig(height=TINY_SIZE, width=TINY_SIZE),
                  runtime=RuntimeConfig(threads=1, **runtime))


def picture(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, TINY_SIZE, TINY_SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def script() -> list[core.Message]:
    """Three sessions side by side, with every control message between their blocks; every block is observed."""
    names = ("a", "b", "c")
    pcm = {name: torch.from_numpy(speech(4.0, seed)) for seed, name in enumerate(names)}
    said = [core.Open(name, seed=n, prompt=f"{name} speaks", picture=picture(n)) for n, name in enumerate(names)]
    for index in range(6):
        if index == 3:
            said += [core.SetPrompt("a", prompt="something else"), core.Refresh("b", reference=torch.ones(16, 1, 8, 8) / 3)]
        if index == 4:
            said += [core.Interrupt("a", epoch=1, sample=4 * BLOCK), core.SetReference("c", picture=picture(9))]
        for name in names:
            start = index * BLOCK + (LOOKAHEAD if index and (name, index) != ("a", 4) else 0)
            said.append(core.Audio(name, index=index, epoch=int(name == "a" and index >= 4), start=start, observe=True,
                                   pcm=pcm[name][start : (index + 1) * BLOCK + LOOKAHEAD]))
    return [*said, *(core.Close(name) for name in names)]


def played(config: Config, messages) -> tuple[dict, list[int]]:
    """What comes up, by (session, kind), and how many blocks each forward of a register moved. All messages wait from the start."""
    roles = build_stage(config, config.chain, "cpu")
    sizes = watched([role for role in roles if isinstance(role, Register)])
    inbox, heard = QueueLink(len(messages)), {}
    pump = Pump(roles, inbox, None, lambda m: heard.setdefault((m.session, type(m).__name__), []).append(m))
    for message in messages:
        inbox.send(message)
    inbox.close()
    pump.run()
    return heard, sizes


def watched(registers) -> list[int]:
    sizes = []
    for register in registers:
        advance = register.advance
        register.advance = lambda: [sizes.append(len(register.blocks)), advance()][1]
    return sizes


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A checkpoint that is told when to blink and how to hold its head, each session at times of its own; read only."""
    return save_tiny(tmp_path_factory.mktemp("told"), transformer=tiny_model(cond_dim=20), control=LIDS_AND_HEAD)


@pytest.fixture(scope="module")
def one_by_one(tiny_folder):
    return played(config_of(tiny_folder), script())[0]


def place(message) -> tuple:
    """Where a message stands in its session's stream; steps report side by side, so latents are told apart by it."""
    return tuple(getattr(message, name, 0) for name in ("index", "step", "epoch"))


def compare(heard: dict, expected: dict) -> None:
    assert heard.keys() == expected.keys()
    for key, messages in heard.items():
        if key[1] == "Frames":
            assert [place(m) for m in messages] == [place(m) for m in expected[key]]
        for mine, theirs in zip(sorted(messages, key=place), sorted(expected[key], key=place), strict=True):
            assert place(mine) == place(theirs)
            for name in ("latent", "latents"):
                if getattr(mine, name, None) is not None:
                    torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), atol=TOLERANCE, rtol=0)
            if isinstance(mine, core.Frames):
                assert (mine.pictures.int() - theirs.pictures.int()).abs().max() <= 1


@pytest.mark.parametrize("runtime,most", [({"shift_register": True}, 4), ({"batch": 3}, 3), ({"shift_register": True, "batch": 2}, 8)])
def test_together_equals_one_after_the_other(runtime, most, tiny_folder, one_by_one):
    heard, sizes = played(config_of(tiny_folder, **runtime), script())
    compare(heard, one_by_one)
    assert max(sizes) == most, sizes
    assert sum(sizes) == 3 * 6 * 4, "every block goes once through every step"


@pytest.mark.parametrize("slices", [1, 3])
def test_a_sink_in_slices_empties_the_register_once(slices, tiny_folder):
    """One session whose blocks all wait: the slices before the last go by while its blocks are under way."""
    said = [m for m in script() if m.session == "b" and not isinstance(m, core.Refresh)]
    own = [core.Refresh("b", reference=torch.ones(16, 1, 8, 8) / 3, slice=n, slices=slices) for n in range(slices)]
    for n, slice in enumerate(own):  # the last before block 4, whose place is the sixth
        said.insert(6 + 2 * n - slices, slice)
    heard, sizes = played(config_of(tiny_folder, shift_register=True), said)
    compare(heard, played(config_of(tiny_folder), said)[0])
    assert sizes == [1, 2, 3, 4, 3, 2, 1, 1, 2, 2, 2, 1]


def test_each_control_message_matters(tiny_folder, one_by_one):
    """Equality above means something: without them other latents come out."""
    heard, _ = played(config_of(tiny_folder, shift_register=True), [m for m in script() if not isinstance(m, core.Refresh)])
    with pytest.raises(AssertionError):
        compare(heard, one_by_one)


def test_a_block_alone_is_not_kept_waiting(tiny_folder):
    """No company comes: the block leaves after as many forwards as there are steps."""
    config = config_of(tiny_folder, shift_register=True)
    roles = build_stage(config, config.chain[1:-1], "cpu")
    (register,) = roles[:1]
    conditioner = build_stage(config, config.chain[:1], "cpu")[0]
    register(conditioner(script()[0])[0])
    (block,) = conditioner(next(m for m in script() if isinstance(m, core.Audio)))
    assert not register.holds_back(block) and register(block) == []
    assert register.holds_back(replace(block, index=1)) and register.holds_back(core.Close("a"))
    made = [[type(m).__name__ for m in register.advance() if isinstance(m, core.Block)] for _ in range(4)]
    assert made == [[], [], [], ["Block"]] and not register.under_way()


def test_a_row_alone_is_the_plain_forward_bit_for_bit_and_rows_of_two_sessions_stay_apart():
    model, generator = tiny_model(), torch.Generator().manual_seed(1)
    texts = [model.encode_text(torch.randn(5, 16, generator=generator)) for _ in range(2)]
    times, rel = (model.modulation(900.0), model.modulation(400.0)), 30

    def cache(text):
        made = model.new_cache(8, 8, 3, 4)
        model.set_sink(made, model.prefill(torch.ones(16, 1, 8, 8), torch.zeros(16, 3, 8, 8), text), 8, 8)
        return made

    apart, together = [cache(t) for t in texts], [cache(t) for t in texts]
    for block in range(6):  # the second one is two blocks behind, so rings differ in length and then wrap
        audio = [model.encode_audio(torch.randn(1, 400, 12, generator=generator)) for _ in texts]
        x = torch.randn(2, 16, 3, 8, 8, generator=generator)
        who = (0, 1) if block >= 2 else (0,)
        rows = [Row(x[n], audio[n], texts[n], together[n], block - 2 * n, rel) for n in who]
        got = forward_rows(model, rows, stack_modulations([times[n] for n in who]))
        for place, n in enumerate(who):
            want = model(x[n], times[n], audio[n], texts[n], apart[n], block=block - 2 * n, sink_distance=rel)
            if len(who) == 1:
                assert torch.equal(got[place], want)
            torch.testing.assert_close(got[place], want, atol=1e-5, rtol=1e-5)
    assert together[1].written == apart[1].written == 4


def inside(config: Config) -> int:
    made = resolve(config)[0]
    return blocks_inside(made.stages, made.runtime.shift_register)


def test_what_could_never_move_together_is_refused_and_a_shift_register_gets_blocks_to_fill_it(tiny_folder):
    one, each = config_of(tiny_folder, shift_register=True), config_of(tiny_folder).chain
    assert inside(one) == 4 and inside(config_of(tiny_folder)) == 1
    with pytest.raises(ConfigError, match="no stage holds several steps"):
        resolve(replace(one, stages=tuple((name,) for name in each)))
    with pytest.raises(ConfigError, match="more than runtime.sessions"):
        resolve(config_of(tiny_folder, batch=3, sessions=2))
