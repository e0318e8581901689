"""A stage shared by several ranks: the same pictures as one rank makes, half the ring on each, and what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_chain_equality import CHAIN, Player, config_of
from test_placement import CHAIN as FULL_CHAIN
from test_placement import USUAL, config, gpus

from liveavatar import core
from liveavatar.core import ConfigError, PlacementError
from liveavatar.models.s2v import S2VConfig
from liveavatar.runtime import launchers
from liveavatar.runtime.bands import Bands
from liveavatar.runtime.placement import check_shards, plan
from liveavatar.runtime.seats import Seat, seats_of

STAGES = (CHAIN[:1], CHAIN[1:5], CHAIN[5:])
SIX = (FULL_CHAIN[:1], *((name,) for name in FULL_CHAIN[1:]))


def shared(folder, launcher: str, shards: tuple[int, ...] | None):
    made = config_of(folder, STAGES, launcher)
    return replace(made, runtime=replace(made.runtime, shards=shards))


def heard(config, pcm, slices: int) -> dict:
    chain = launchers.launch(config)
    try:
        player = Player(chain, slices)
        player.play(pcm)
    finally:
        chain.stop()
    return player.heard


@pytest.mark.parametrize("slices", [1, 2])
def test_two_ranks_share_a_stage_and_make_the_same_pictures(slices, tmp_path):
    """gloo, local processes; the script of test_chain_equality: two sessions, a refresh, a prompt, a portrait, an interrupt; blinks."""
    from conftest import save_tiny, speech

    tiny_folder = save_tiny(tmp_path, control={"kind": "lids"})
    pcm = {name: torch.from_numpy(speech(5.0, seed)) for seed, name in enumerate("ab")}
    together, alone = (heard(shared(tiny_folder, *how), pcm, slices) for how in (("local", (1, 2, 1)), ("inproc", None)))
    assert together.keys() == alone.keys()
    for key, messages in together.items():
        for mine, theirs in zip(messages, alone[key], strict=True):
            if isinstance(mine, core.Frames):
                assert (mine.index, mine.epoch) == (theirs.index, theirs.epoch)
                assert (mine.pictures.int() - theirs.pictures.int()).abs().max() <= 1
            if isinstance(mine, core.CleanLatent):
                torch.testing.assert_close(mine.latent, theirs.latent, atol=2e-4, rtol=0)


def all_agree(rank: int, path: str, world: int, dtype: torch.dtype) -> None:
    """Every rank makes the same whole and gives its part through the exchange: what comes is the part of the whole, bit for bit."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    bands = Bands(dist.group.WORLD, Seat(rank, 0, ("step0",), rank, world), torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    latents, rows, columns, heads = 3, 4, 5, 8
    some = lambda *shape: torch.randn(shape, generator=draw).to(dtype)  # noqa: E731
    picture = some(2, 16, latents, rows, columns)
    assert torch.equal(bands.whole(bands.band(picture)), picture) and bands.band(picture).shape[-2] == rows // world
    grids = some(3, 2, latents, rows, columns, heads, 6)  # q, k and v of two rows, by latent, row, column
    order = bands.order(torch.arange(latents * rows * columns).expand(2, -1)[..., None], latents)[0, :, 0]
    by_band = grids.flatten(2, 4)[:, :, order]
    mine = bands.band(grids.permute(0, 1, 2, 5, 6, 3, 4)).permute(0, 1, 2, 5, 6, 3, 4).flatten(2, 4)  # this rank's rows, all heads
    part = bands.to_heads(*mine)
    for got, whole in zip(part, by_band, strict=True):
        assert torch.equal(got, bands.own_heads(whole)) and got.shape == (2, latents * rows * columns, heads // world, 6)
    for got, given in zip(part, mine, strict=True):
        assert torch.equal(bands.to_tokens(got), given)
    dist.destroy_process_group()


@pytest.mark.parametrize("world, dtype", [(2, torch.bfloat16), (4, torch.float32)], ids=str)
def test_what_ranks_exchange_arrives_bit_for_bit(world, dtype, forker, tmp_path):
    forker.run(all_agree, str(tmp_path / "store"), world, dtype, world=world)


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
