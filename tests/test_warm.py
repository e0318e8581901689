"""What a rank does before it says that it is ready: every role has worked, and every forward that will be replayed is captured."""

from dataclasses import replace

import pytest
import torch
from test_chain_equality import CHAIN, config_of
from test_fast import Playback, spoken, through

from liveavatar import core
from liveavatar.config import FastConfig
from liveavatar.models.cache import StepCache
from liveavatar.models.rows import ALONE
from liveavatar.runtime import stage_roles
from liveavatar.runtime.register import Register
from liveavatar.runtime.roles import Conditioner, Decoder, Denoiser, StageSinks
from liveavatar.runtime.sources import open_source
from liveavatar.runtime.stage_roles import build_stage, warm

CPU = torch.device("cpu")


@pytest.mark.parametrize("stage, runtime", [
    (CHAIN, {}), (CHAIN[:1], {}), (CHAIN[:2], {}), (CHAIN[2:5], {}), (CHAIN[4:], {}), (CHAIN[5:], {}), (CHAIN[1:], {"shift_register": True, "batch": 2}),
], ids=str)
def test_every_role_of_a_stage_has_worked_and_nothing_of_it_is_left(stage, runtime, tiny_folder, monkeypatch):
    config, worked = config_of(tiny_folder, None, "inproc"), []
    config = replace(config, runtime=replace(config.runtime, **runtime))
    roles, source = build_stage(config, stage, "cpu"), open_source(config)
    prompts = [role for role in roles if isinstance(role, Conditioner)]
    for role in prompts:
        role.encode_prompt = lambda prompt: pytest.fail("a large encoder would be loaded for it")
    for kind, name in ((Conditioner, "_block"), (Denoiser, "done"), (Decoder, "pictures")):
        plain = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda role, *given, plain=plain: worked.append(getattr(role, "index", type(role))) or plain(role, *given))
    warm(roles, source, stage, torch.float32, CPU, 2)
    everyone = {Conditioner if name == "condition" else Decoder if name == "decode" else int(name[4:]) for name in stage}
    assert {who: worked.count(who) for who in worked} == dict.fromkeys(everyone, 2 * 7)
    for role in (part for role in roles for part in ([role.sinks, *role.steps] if isinstance(role, Register) else [role])):
        assert not getattr(role, "sessions", None) and not getattr(role, "states", None) and not getattr(role, "fresh", None)


@pytest.mark.parametrize("anchors", [0, 3])
def test_a_session_after_the_warm_up_captures_nothing_and_allocates_no_cache(anchors, tiny_folder, monkeypatch):
    config, recorder, made = config_of(tiny_folder, None, "inproc"), Playback(), []
    config = replace(config, sampler=replace(config.sampler, anchor_blocks=anchors))
    graphed = replace(config, model=replace(config.model, device="auto", fast=FastConfig(graphs=True)))
    monkeypatch.setattr(stage_roles, "cuda_recorder", lambda device: recorder)
    init = StepCache.__init__
    monkeypatch.setattr(StepCache, "__init__", lambda cache, **sizes: made.append(cache) or init(cache, **sizes))
    plain, roles = (stage_roles._denoisers(open_source(c), [1, 2], torch.float32, CPU, c, ALONE) for c in (config, graphed))
    for sessions in (1, 2):  # as build_stage does on a GPU, for a server of two seats
        warm(roles, open_source(graphed), CHAIN[2:4], torch.float32, CPU, sessions)
    assert recorder.recorded == 2 * 2 * (7 - anchors) and len(made) == 2 * 2
    messages = [replace(m, step=1) if isinstance(m, core.Block) else m for pair in zip(spoken("a", 10, 1), spoken("b", 10, 2)) for m in pair]
    got = through(roles, messages)
    assert recorder.recorded == 2 * 2 * (7 - anchors) and len(made) == 2 * 2
    assert all(map(torch.equal, got, through(plain, messages))) and len(got) == 20


def test_a_plain_chain_on_a_cpu_starts_at_once_and_a_compiled_one_is_warm(tiny_folder, monkeypatch):
    warmed = []
    monkeypatch.setattr(stage_roles, "warm", lambda roles, source, names, dtype, device, sessions: warmed.append((type(roles[0]), sessions)))
    monkeypatch.setattr("liveavatar.runtime.sources.prepare", lambda model, fast: model)
    config = config_of(tiny_folder, None, "inproc")
    build_stage(config, CHAIN[1:2], "cpu")
    assert not warmed
    build_stage(replace(config, model=replace(config.model, fast=FastConfig(compile=True))), CHAIN[1:2], "cpu")
    assert warmed == [(StageSinks, 1)]
