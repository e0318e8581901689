"""A stage shared by several ranks: the same pictures as one rank makes, half the ring on each, and what is refused."""

from dataclasses import replace

import pytest
import torch
from test_chain_equality import CHAIN, Player, config_of
from test_placement import CHAIN as FULL_CHAIN
from test_placement import USUAL, config, gpus

from liveavatar import core
from liveavatar.core import ConfigError, PlacementError
from liveavatar.models.s2v import S2VConfig
from liveavatar.runtime import launchers
from liveavatar.runtime.placement import check_shards, plan
from liveavatar.runtime.seats import seats_of

STAGES = (CHAIN[:1], CHAIN[1:5], CHAIN[5:])
SIX = (FULL_CHAIN[:1], *((name,) for name in FULL_CHAIN[1:]))


def shared(folder, launcher: str, shards: tuple[int, ...] | None):
    made = config_of(folder, STAGES, launcher)
    return replace(made, runtime=replace(made.runtime, shards=shards))


def heard(config, pcm) -> dict:
    chain = launchers.launch(config)
    try:
        player = Player(chain)
        player.play(pcm)
    finally:
        chain.stop()
    return player.heard


def test_two_ranks_share_a_stage_and_make_the_same_pictures(tmp_path):
    """gloo, local processes; the script of test_chain_equality: two sessions, a refresh, a prompt, a portrait, an interrupt; blinks."""
    from conftest import save_tiny, speech

    tiny_folder = save_tiny(tmp_path, control={"kind": "lids"})
    pcm = {name: torch.from_numpy(speech(5.0, seed)) for seed, name in enumerate("ab")}
    together, alone = heard(shared(tiny_folder, "local", (1, 2, 1)), pcm), heard(shared(tiny_folder, "inproc", None), pcm)
    assert together.keys() == alone.keys()
    for key, messages in together.items():
        for mine, theirs in zip(messages, alone[key], strict=True):
            if isinstance(mine, core.Frames):
                assert (mine.index, mine.epoch) == (theirs.index, theirs.epoch)
                assert (mine.pictures.int() - theirs.pictures.int()).abs().max() <= 1
            if isinstance(mine, core.CleanLatent):
                torch.testing.assert_close(mine.latent, theirs.latent, atol=2e-4, rtol=0)


def test_seats_follow_the_stages_and_their_shards():
    made = replace(config(stages=SIX), runtime=replace(config().runtime, shards=(1, 2, 2, 2, 2, 1)))
    seats = seats_of(made)
    assert [(s.stage, s.shard, s.leader) for s in seats[:5]] == [(0, 0, 0), (1, 0, 1), (1, 1, 1), (2, 0, 3), (2, 1, 3)]
    assert len(seats) == 10 and [s.rank for s in seats] == list(range(10)) and list(seats[3].others) == [4]


def test_a_shared_stage_needs_more_devices_and_half_the_ring_on_each():
    made = replace(config(stages=SIX), runtime=replace(config().runtime, shards=(1, 2, 2, 2, 2, 1), launcher="local"))
    whole, halves = plan(config(stages=SIX), S2VConfig(), USUAL, gpus(6)), plan(made, S2VConfig(), USUAL, gpus(10))
    one, two = whole.ranks[1].per_session, halves.ranks[2].per_session
    assert two["1 x step cache"] == one["1 x step cache"] / 2 and two["sink"] == one["sink"] / 2 and two["text"] == one["text"]
    assert halves.ranks[1].fixed["transformer"] == whole.ranks[1].fixed["transformer"], "weights are whole on every rank"
    assert halves.stages == SIX
    with pytest.raises(PlacementError, match="6 stages .*10 ranks.* need 10 devices, there are 6"):
        plan(made, S2VConfig(), USUAL, gpus(6))


@pytest.mark.parametrize("runtime,stages,said", [
    ({"shards": (1, 2)}, SIX, "one number for each of the 6 stages"),
    ({"shards": (2, 1, 1, 1, 1, 1)}, SIX, "steps alone"),
    ({"shards": (1, 3, 1, 1, 1, 1)}, SIX, "40 heads do not divide by 3"),
    ({"shards": (1, 8, 1, 1, 1, 1), "launcher": "local"}, SIX, None),
    ({"shards": (1, 5, 1, 1, 1, 1)}, SIX, "rows of tokens of .* do not divide by 5"),
    ({"shards": (1, 2, 1, 1, 1, 1), "launcher": "inproc"}, SIX, "launcher=local"),
    ({"shards": (1, 2, 1), "launcher": "local", "shift_register": True}, (FULL_CHAIN[:1], FULL_CHAIN[1:5], FULL_CHAIN[5:]), "not together"),
])
def test_what_cannot_be_shared_is_refused(runtime, stages, said):
    made = replace(config(stages=stages), runtime=replace(config().runtime, **runtime))
    if said is None:
        check_shards(made, stages, S2VConfig(), USUAL)
        return
    with pytest.raises(ConfigError, match=said):
        check_shards(made, stages, S2VConfig(), USUAL)
