"""The viseme encoder: speech by many voices with its phones in time, what is learned from it, and how it gets into an avatar."""

import dataclasses
import re
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from liveavatar.conditioning.audio_features import TICKS_PER_FRAME, LogMelFrontEnd, VisemeFrontEnd, log_mels
from liveavatar.conditioning.behaviour import closure_of
from liveavatar.conditioning.phones import PHONES, VOWELS
from liveavatar.conditioning.visemes import CLOSE
from liveavatar.core import ConfigError, InputError, WeightsError
from liveavatar.models import weights
from liveavatar.models.s2v import S2VConfig
from liveavatar.models.viseme_encoder import MoonshineSizes, MoonshineVisemes, VisemeEncoder, VisemeSizes, load_viseme_encoder
from liveavatar.training import codec, export, hearing, moonshine, recipe, shards, unpack
from liveavatar.training.checkpoints import load_average
from liveavatar.training.loop import LoopConfig
from liveavatar.training.synth import narrators, speakers, speech

from conftest import TINY_MOONSHINE, tiny_model, tiny_moonshine, tiny_vae

MICRO = Path(__file__).parents[1] / "configs" / "train_micro.yaml"
LOOP = LoopConfig(iterations=160, batch=4, lr=8e-3, warmup=5, cooldown=0.5, ema=0.9, threads=1, log_every=1, bf16=False, device="cpu")
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed (apt install flite)")


def config_of(folder, **settings):
    return hearing.VisemesConfig(**{"loop": LOOP, "folder": str(folder), "voices": {"slt": 1}, "sizes": VisemeSizes(width=24, dilations=(1, 2, 4)),
                                    "seconds": 2.0, "changed": 0.0, "warp": 0.0, "tilt": 0.0, **settings})


# ---------------------------------------------------------------- voices


@pytest.mark.parametrize(("language", "said", "ours"), [
    (speakers.ITALIAN, "p a1 tS E1 dz rr j pau", "p aa ch eh z d y pau"),
    (speakers.CZECH, "m a: s~ r~ ch n* o: #", "m aa sh zh hh ng ao pau"),
    (speakers.FINNISH, "p: 7 @ y m: u: N", "p uh ae uw m uw ng"),
    (speakers.CATALAN, "B e1 Z ax L i1 u1", "b eh zh ax y iy uw"),
    (speakers.RUSSIAN, "pp aa mm yy ch ur ae vv", "p aa m ih ch uh eh v"),
    (speakers.ENGLISH, "hh ax l ow pau _", "hh ax l ow pau pau"),
    (speakers.BRITISH, "h @ l ou uh u @@ ch #", "hh ax l ow ah uh er ch pau"),
])  # fmt: skip
def test_phones_of_other_languages_have_the_mouths_of_ours(language, said, ours):
    assert [language.phone(name) for name in said.split()] == ours.split()
    assert set(language._ours.values()) <= PHONES


def test_every_phone_of_ours_has_a_name_that_a_british_voice_knows():
    theirs = {ours: name for name, ours in speakers.BRITISH._ours.items()}
    assert {speakers.BRITISH.phone(theirs.get(phone, phone)) for phone in PHONES} == PHONES


@needs_flite
def test_a_copied_voice_says_what_flite_would_as_long_as_it_would(monkeypatch):
    copied = []
    monkeypatch.setattr(speakers.speech, "flite", lambda *how, made=speech.flite: copied.append(made(*how)) or copied[-1])
    said = re.findall(r'\("(\S+)" ([\d.]+)( \(0 \d+\))?\)', speakers.BRITISH.said(np.random.default_rng(3)))
    assert [speakers.BRITISH.phone(name) for name, *_ in said] == [phone.name for phone in copied[0].phones]
    assert [float(long) for _, long, _ in said] == pytest.approx([phone.end - phone.start for phone in copied[0].phones], abs=1e-4)
    assert all(bool(pitch) == (phone.name in VOWELS) for (*_, pitch), phone in zip(said, copied[0].phones))


@needs_flite
def test_who_does_not_tell_its_phones_is_listened_to(monkeypatch):
    """A voice of flite as if its phones were not known, one text of three not to be aligned: the lips move as they should."""
    known, texts = [], iter(["Xyzzyq.", "Pam bought five purple maps.", "Move over.", "Why not."])

    def say(voice, text, out, rng):
        known.append(speech.flite(text.replace("Xyzzyq", "Bob"), voice, 100.0, 1.0))
        write_sound(out, known[-1].pcm)

    monkeypatch.setitem(narrators.NARRATORS, "slt", narrators.Narrator(say, "slt", "flite", "BSD-style"))
    (said,) = narrators.utterances("slt", 1, np.random.default_rng(0), lambda rng: next(texts))
    assert len(known) == 2 and said.text == "move over why not" and said.voice == "slt"
    heard, true = hearing.articulators_of(said), hearing.articulators_of(speech.trimmed(known[1]))
    best = max(np.corrcoef(heard[a : a + 100, CLOSE], true[b : b + 100, CLOSE])[0, 1] for a in range(12) for b in range(12))
    assert best > 0.9  # trimmed at the first phone found, a few hundredths apart


def test_texts_that_cannot_be_aligned_do_not_go_on_for_ever(monkeypatch):
    def silent(voice, text, out, rng):
        write_sound(out, np.zeros(1600))

    monkeypatch.setitem(narrators.NARRATORS, "bdl", narrators.Narrator(silent, "bdl", "rhvoice", "BSD-style"))
    with pytest.raises(speech.SpeechError, match="bdl: 20 texts in a row could not be aligned"):
        next(narrators.utterances("bdl", 1, np.random.default_rng(0), lambda rng: "Xyzzyq."))


@needs_flite
def test_recordings_of_people_are_a_share_of_what_is_heard(spoken, tmp_path, caplog):
    """Two people, one with two files, of which one cannot be aligned; what came later is added, what is there stays; half of the share is each one's."""
    said = {"ann__1": "Pam bought five purple maps.", "ann__2": "Xyzzyq.", "bob__1": "Move over, maybe not!"}
    for name, text in said.items():
        write_sound(tmp_path / f"{name}.wav", speech.flite(text.replace("Xyzzyq", "Why not"), "slt", 170.0, 1.0).pcm)
        (tmp_path / f"{name}.txt").write_text(text + "\n")
    config = config_of(tmp_path / "corpus", recordings=str(tmp_path), recorded=1.0)
    assert hearing.speak(config, 5) == 3 and hearing.speak(config, 5) == 0
    assert "ann__2.txt: left out: not in the dictionary: xyzzyq" in caplog.text
    corpus, again = hearing.Spoken(config), hearing.Spoken(dataclasses.replace(config, recordings=""))
    assert len(corpus.said) == len(again.said) == 1 and [len(clips) for clips in corpus.recorded] == [1, 1] and not again.recorded
    drawn = [corpus._draw(np.random.default_rng(k)) for k in range(40)]
    assert {id(one) for one in drawn} == {id(clips[0]) for clips in corpus.recorded}
    with pytest.raises(InputError, match="no SPEAKER__NAME.txt beside"):
        hearing.speak(config_of(tmp_path / "corpus", recordings=str(tmp_path / "corpus")), 5)
    (tmp_path / "bob__1.wav").unlink()
    with pytest.raises(InputError, match="bob__1.txt: no sound file bob__1"):
        hearing.speak(config, 5)


def write_sound(path, pcm):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes((np.asarray(pcm) * 32767).astype("<i2").tobytes())


def test_a_voice_that_is_not_installed_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(speakers.FestivalMissing, match="apt install festival"):
        next(speakers.utterances("ked_diphone", 1, 0))
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    with pytest.raises(speakers.FestivalMissing, match="has no voice ked_diphone"):
        next(speakers.utterances("ked_diphone", 1, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for voice, package in (("bdl", "rhvoice-english"), ("pico_gb", "libttspico-utils")):
        with pytest.raises(narrators.NarratorMissing, match=f"is not installed: install .*{package}.* take {voice} out of visemes.voices"):
            next(speakers.utterances(voice, 1, 0))


def test_what_festival_gives_up_on_is_said_otherwise(monkeypatch):
    """Of every call only the second utterance is written, of a call for one that one: all that were asked for come in the end."""
    def festival(command, **how):
        script = Path(command[2])
        made = script.parent / ("1" if "1.wav" in script.read_text() else "0")
        write_sound(f"{made}.wav", 0.1 * np.sin(np.arange(8000) / 9))
        Path(f"{made}.lab").write_text("#\n 0.25 100 pau\n 0.5 100 m\n")

    monkeypatch.setattr(shutil, "which", lambda name: "festival")
    monkeypatch.setattr(speakers.subprocess, "run", festival)
    said = list(speakers.utterances("ked_diphone", 3, 0))
    assert [[p.name for p in one.phones] for one in said] == [["pau", "m"]] * 3


def test_marks_of_festival_fill_the_sound():
    pcm = np.sin(np.arange(16_000) / 9).astype(np.float32)
    said = speakers._marked(pcm, "#\n 0.2500 100 #\n 0.4 100 p:\n0.8 100 a:\n 1.5 100 m\n", speakers.FINNISH, "v")
    assert [(p.name, p.start, p.end) for p in said.phones] == [("pau", 0, 0.25), ("p", 0.25, 0.4), ("aa", 0.4, 0.8), ("m", 0.8, 1.0)]
    assert np.abs(said.pcm).max() == pytest.approx(speech.LOUDEST)


@needs_flite
def test_the_same_seed_says_the_same_and_another_voice_something_else():
    one, again = (next(speakers.utterances("slt", 1, 3)) for _ in range(2))
    assert np.array_equal(one.pcm, again.pcm) and one.phones == again.phones and one.seconds >= speakers.SECONDS
    assert next(speakers.utterances("rms", 1, 3)).text != one.text


@pytest.mark.skipif(shutil.which("festival") is None, reason="festival is not installed (apt install festival)")
def test_festival_speaks_with_its_phones():
    try:
        said = list(speakers.utterances("kal_diphone", 2, 0))
    except speakers.FestivalMissing as error:
        pytest.skip(str(error))
    for one in said:
        loud = hearing.articulators_of(one)[:, CLOSE]
        assert one.phones[-1].end == pytest.approx(one.seconds) and {p.name for p in one.phones} <= PHONES and len(loud) == int(one.seconds * 100)


# ---------------------------------------------------------------- the corpus


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A corpus of one utterance."""
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed (apt install flite)")
    folder = tmp_path_factory.mktemp("spoken")
    assert hearing.speak(config_of(folder), 5) == 1 and hearing.speak(config_of(folder), 5) == 0, "what is there stays"
    return folder


def test_pieces_are_what_the_front_end_will_hear(spoken):
    """Column j of a batch's mels, reach - ahead ticks on, is the moment of articulators j; also where a piece begins before the sound."""
    config = config_of(spoken, seconds=1.0)
    said, sizes = hearing.Spoken(config).said[0], config.sizes
    before = sizes.reach - sizes.ahead
    whole = log_mels(hearing.padded(said["pcm"], -160 * before - 200, 160 * (len(said["articulators"]) + sizes.ahead) + 200))
    starts = {}
    for k in range(40):
        mels, wanted = (part[0].numpy() for part in hearing.Spoken(config).batch(np.random.default_rng(k), 1))
        found = [s for s in range(len(said["articulators"]) - 99) if np.array_equal(wanted.T, said["articulators"][s : s + 100].astype(np.float32))]
        if len(found) == 1:  # silence is like silence
            assert np.allclose(mels.T, whole[found[0] : found[0] + mels.shape[1]], atol=1e-5)
            starts[found[0]] = True
    assert len(starts) > 10


def test_a_stranger_has_other_bands_and_the_same_moments(spoken):
    config, mels = config_of(spoken, warp=0.15, tilt=0.3), np.random.default_rng(0).normal(size=(50, 40))
    made = [hearing.strange(mels, config, np.random.default_rng(k)) for k in range(8)]
    assert all(m.shape == mels.shape for m in made) and sum(np.allclose(m, mels) for m in made) < 4
    still = np.broadcast_to(mels[:1], mels.shape)
    assert all(np.ptp(hearing.strange(still, config, np.random.default_rng(k)), axis=0).max() < 1e-9 for k in range(8))


def test_what_was_trained_on_one_sentence_says_it_as_served(spoken, tmp_path):
    """Training, front end and articulators agree on what time it is: r .9 at lag 0 through the streaming door, in two sittings."""
    config = config_of(spoken)
    first = hearing.train_visemes(config, tmp_path, 0, stop_after=4)
    assert not (tmp_path / "visemes").exists()
    losses = first + hearing.train_visemes(config, tmp_path, 0)
    assert len(losses) == LOOP.iterations and np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    encoder, trained = weights.load_viseme_encoder(tmp_path / "visemes"), hearing.new_encoder(config, 0)
    load_average(trained, tmp_path / "visemes.pt")
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), trained.state_dict().values(), strict=True))
    said = next(speakers.utterances("slt", 1, 5))
    frames, true = int(said.seconds * 25), hearing.articulators_of(said)[::TICKS_PER_FRAME]
    heard = VisemeFrontEnd(encoder).features_of(said.pcm, frames)[0].T.numpy()
    r = {lag: np.corrcoef(heard[2 + lag : frames - 2 + lag, CLOSE], true[2 : frames - 2, CLOSE])[0, 1] for lag in (-1, 0, 1)}
    assert max(r, key=r.get) == 0 and r[0] > 0.9, r
    assert set(hearing.follows(VisemeFrontEnd(encoder), [said])) == {"gap r", "gap slope", "width r", "width slope"}


def test_a_resumed_run_repeats_its_losses(spoken, tmp_path):
    config = config_of(spoken, loop=dataclasses.replace(LOOP, iterations=6))
    whole = hearing.train_visemes(config, tmp_path / "a", 0)
    assert hearing.train_visemes(config, tmp_path / "b", 0, stop_after=3) + hearing.train_visemes(config, tmp_path / "b", 0) == whole


@pytest.mark.parametrize(("settings", "problem"), [
    ({"recorded": 1.5}, "visemes.recorded=1.5"), ({"voices": {"bob": 3}}, "bob: unknown; known: slt"), ({"voices": {}}, "at least one voice"), ({"voices": {"slt": 0}}, "one utterance of each"),
    ({"seconds": 0.0}, "seconds=0.0: positive"), ({"changed": 1.5}, "must|in 0..1"), ({"tilt": -1.0}, "tilt=-1.0: not negative"),
    ({"published": "x.onnx"}, "needs visemes.moonshine"), ({"tempo": 1.0}, "tempo=1.0"), ({"silent": -0.1}, "silent=-0.1"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        config_of("x", **settings)


def test_speech_that_is_not_there_is_missed_by_name(tmp_path):
    with pytest.raises(InputError, match="no speech"):
        hearing.Spoken(config_of(tmp_path / "nowhere"))


# ---------------------------------------------------------------- on a recogniser


def on_a_recogniser(folder, **settings):
    return config_of(folder, **{"moonshine": MoonshineSizes(**TINY_MOONSHINE), "tempo": 0.0, "strange": 0.0, "silent": 0.0, **settings})


def test_windows_are_what_the_front_end_hears(spoken):
    """Without changes a piece that begins with a block is that block's window, and its articulators are those of its pictures."""
    config = on_a_recogniser(spoken)
    corpus, front_end = hearing.SpokenBlocks(config), hearing.viseme_front_end(tiny_moonshine())

    class First:
        """Draws that begin in block 2."""

        def integers(self, *bounds):
            return 0 if len(bounds) == 1 else 2 * 7680

        def random(self):
            return 1.0

    said = corpus.said[0]
    pcm, wanted = corpus._piece(First())
    assert np.array_equal(pcm, hearing.padded(said["pcm"], *front_end.span(2)))
    assert np.allclose(wanted.T, said["articulators"][96:144:4].astype(np.float32), atol=1e-6)


def test_pieces_at_another_pace_keep_their_moments(spoken):
    """A click in the middle of a sound and an articulator that jumps there lie together in every piece, however fast it is played."""
    config = on_a_recogniser(spoken, tempo=0.3)
    corpus, found = hearing.SpokenBlocks(config), []
    click, articulators = np.zeros(64_000, np.int16), np.zeros((400, 8), np.float32)
    click[32_000:32_160] = 20_000
    articulators[200:] = 1.0
    corpus.said = [{"pcm": click, "articulators": articulators}]
    before = config.moonshine.margins(12)[0]
    for k in range(300):
        pcm, wanted = (part[0].numpy() for part in corpus.batch(np.random.default_rng(k), 1))
        heard = (np.abs(pcm) > 0.1).nonzero()[0]
        if len(heard) and 0.05 < (wanted[0] > 0.5).mean() < 0.95:
            found.append((heard[0] - before) / 640 - int((wanted[0] > 0.5).argmax()))
    assert len(found) > 20 and -1.01 < min(found) and max(found) < 0.51, (min(found), max(found))


def test_another_throat_moves_formants_and_leaves_pitch_and_time(spoken):
    """Pulses at 125 Hz through one resonance: with neither warp nor tilt they stay, with warp the resonance moves, never the pulses."""
    ring = np.exp(-np.arange(400) / 60) * np.sin(2 * np.pi * 1000 * np.arange(400) / 16_000)
    pulses = (np.arange(32_000) % 128 == 0).astype(np.float64)
    pcm = (0.3 * np.convolve(pulses, ring)[:32_000]).astype(np.float32)

    def resonance(sound):
        power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
        return float((power * np.arange(len(power))).sum() / power.sum() * 16_000 / len(sound))

    def pitch(sound):
        power = np.abs(np.fft.rfft(sound, 2 * len(sound))) ** 2
        return 90 + int(np.fft.irfft(power)[90:170].argmax())

    still = on_a_recogniser(spoken, warp=0.0, tilt=0.0)
    assert np.abs(hearing.another_throat(pcm, still, np.random.default_rng(0)) - pcm).max() < 1e-5
    others = [hearing.another_throat(pcm, on_a_recogniser(spoken, warp=0.15, tilt=0.0), np.random.default_rng(k)) for k in range(6)]
    assert all(len(other) == len(pcm) and other.dtype == np.float32 and pitch(other) == 128 for other in others)
    moved = [resonance(other) / resonance(pcm) for other in others]
    assert min(moved) < 0.95 and max(moved) > 1.05, moved


def test_a_share_of_pieces_is_a_pause(spoken):
    corpus = hearing.SpokenBlocks(on_a_recogniser(spoken, silent=1.0))
    pcm, wanted = corpus.batch(np.random.default_rng(0), 8)
    assert pcm.abs().amax() < 0.05 and torch.equal(wanted, wanted[:1, :, :1].expand_as(wanted)) and 0 < wanted[0, CLOSE, 0] < 0.5


def test_on_a_recogniser_one_sentence_is_learned_and_served(spoken, tmp_path):
    """From random numbers, in two sittings; what is served are the eight bits that were stored, and it is at lag 0."""
    config = on_a_recogniser(spoken, loop=dataclasses.replace(LOOP, iterations=400, batch=8, lr=6e-3))
    losses = hearing.train_visemes(config, tmp_path, 0, stop_after=3) + hearing.train_visemes(config, tmp_path, 0)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    served = hearing.viseme_front_end(load_viseme_encoder(tmp_path / "visemes"))
    said = next(speakers.utterances("slt", 1, 5))
    frames, true = int(said.seconds * 25), hearing.articulators_of(said)[::TICKS_PER_FRAME]
    heard = served.features_of(said.pcm, frames)[0].T.numpy()
    r = {lag: np.corrcoef(heard[2 + lag : frames - 2 + lag, CLOSE], true[2 : frames - 2, CLOSE])[0, 1] for lag in (-1, 0, 1)}
    assert max(r, key=r.get) == 0 and r[0] > 0.65, r


def test_rows_of_eight_bits_are_near_and_stay_when_stored_again(tmp_path):
    encoder = tiny_moonshine()
    weights.save_viseme_encoder(tmp_path / "a", encoder)
    loaded = load_viseme_encoder(tmp_path / "a")
    assert isinstance(loaded, MoonshineVisemes) and loaded.sizes == encoder.sizes
    for (name, was), now in zip(encoder.state_dict().items(), loaded.state_dict().values(), strict=True):
        step = was.flatten(1).abs().amax(1) / 127 if was.dim() > 1 else torch.zeros(len(was))
        assert ((was - now).flatten(1).abs().amax(1) if was.dim() > 1 else (was - now).abs()).le(0.51 * step).all(), name
    weights.save_viseme_encoder(tmp_path / "b", loaded)
    again = load_viseme_encoder(tmp_path / "b")
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True))
    assert (tmp_path / "a" / "model.safetensors").stat().st_size < 0.4 * sum(4 * p.numel() for p in encoder.parameters())
    (tmp_path / "a" / "config.json").write_text('{"network": "parrot"}')
    with pytest.raises(WeightsError, match="network='parrot'"):
        load_viseme_encoder(tmp_path / "a")


def quantised_onnx(encoder, path):
    """The graph that onnxruntime's dynamic quantisation leaves of this encoder, as far as it is read: names, kinds and numbers."""
    onnx = pytest.importorskip("onnx")
    tensors, nodes, state = [], [], {name: p.numpy() for name, p in encoder.encoder.state_dict().items()}

    def keep(name, array):
        tensors.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(kind, name, *inputs):
        nodes.append(onnx.helper.make_node(kind, list(inputs), [f"{name}_out"], name=name))

    for number, (name, array) in enumerate(state.items()):
        place, _, kind = name.rpartition(".")
        at = "/" + place.replace("self_attn.o_proj", "self_attn.dense").replace("layers.", "layers_").replace(".", "/").replace("layers_", "layers.")
        if name.startswith("conv") and kind == "weight":
            scale, zero = np.float32(np.ptp(array) / 254), np.float32((array.max() + array.min()) / 2)
            keep(f"{name}_quantized", np.round((array - zero) / scale).astype(np.int8))
            keep(f"{name}_scale", [scale])
            keep(f"{name}_zero_point", [zero])
            bias = [keep(f"{place}.bias", state[f"{place}.bias"])] if f"{place}.bias" in state else []
            node("Conv", f"{at}/Conv", "x", f"{name}_add_tensor", *bias)
        elif kind == "weight" and "norm" in place:
            node("Mul", f"{at}/Mul", "x", keep(f"onnx::Mul_{number}", array[:, None] if place == "groupnorm" else array))
        elif kind == "weight":
            base = f"onnx::MatMul_{number}"
            scale, zero = np.float32(np.ptp(array) / 255), np.uint8(np.round(-array.min() / (np.ptp(array) / 255)))
            keep(f"{base}_quantized", np.clip(np.round(array.T / scale) + zero, 0, 255).astype(np.uint8))
            keep(f"{base}_scale", scale)
            keep(f"{base}_zero_point", zero)
            node("MatMulInteger", f"{at}/MatMul_quant", "x", f"{base}_quantized")
        elif place == "groupnorm" or place.endswith(("fc1", "fc2")):
            node("Add", f"{at}/Add", keep(f"onnx::Add_{number}", array[:, None] if place == "groupnorm" else array), "x")
    keep("half", np.float32(0.5))
    node("Add", "/layers.0/mlp/activation_fn/Add", "x", "half")  # what is no weight is passed over
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "encoder", [], [], tensors)), path)


def test_published_weights_are_read_from_the_npm_packages_file(tmp_path):
    published, encoder = tiny_moonshine(1), tiny_moonshine(2, layers=1)
    quantised_onnx(published, tmp_path / "encoder_model.onnx")
    head = encoder.leave.weight.clone()
    moonshine.begin_as_published(encoder, tmp_path / "encoder_model.onnx")
    for name, now in encoder.encoder.state_dict().items():
        was = published.encoder.state_dict()[name]
        assert (was - now).abs().max() <= np.ptp(was.numpy()) / 250 + 1e-7, name
    assert torch.equal(encoder.leave.weight, head)
    with pytest.raises(WeightsError, match="of another shape.*conv1.weight"):
        moonshine.begin_as_published(tiny_moonshine(hidden=48), tmp_path / "encoder_model.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(WeightsError, match="broken.onnx"):
        moonshine.begin_as_published(encoder, tmp_path / "broken.onnx")
    with pytest.raises(WeightsError, match="npm pack"):
        moonshine.begin_as_published(encoder, tmp_path / "nothing.onnx")


def test_published_weights_are_read_from_a_folder_of_transformers(tmp_path):
    from transformers import MoonshineModel

    published, encoder = tiny_moonshine(1), tiny_moonshine(2)
    config = published.encoder.config
    config.decoder_num_hidden_layers, config.decoder_num_attention_heads, config.decoder_num_key_value_heads, config.vocab_size = 1, 2, 2, 8
    whole = MoonshineModel(config)
    whole.encoder.load_state_dict(published.encoder.state_dict())
    whole.save_pretrained(tmp_path / "moonshine-tiny")
    moonshine.begin_as_published(encoder, tmp_path / "moonshine-tiny")
    assert all(torch.equal(a, b) for a, b in zip(encoder.encoder.state_dict().values(), published.encoder.state_dict().values(), strict=True))


def test_published_convolutions_stay_and_layers_learn(spoken, tmp_path):
    quantised_onnx(tiny_moonshine(1), tmp_path / "encoder_model.onnx")
    config = on_a_recogniser(spoken, published=str(tmp_path / "encoder_model.onnx"), loop=dataclasses.replace(LOOP, iterations=2, audio_factor=0.1))
    began = hearing.new_encoder(config, 0).state_dict()
    hearing.train_visemes(config, tmp_path, 0)
    ended = hearing.new_encoder(config, 0)
    load_average(ended, tmp_path / "visemes.pt")
    same = {name for name, p in ended.state_dict().items() if torch.equal(p, began[name])}
    assert same == {name for name in began if name.startswith(("encoder.conv", "encoder.groupnorm"))}
    assert (tmp_path / "visemes" / moonshine.NOTICE).read_text() == moonshine.LICENCE
    assert not moonshine.pass_on_licence(tmp_path, tmp_path / "visemes")  # where there is none, none is made


def test_where_an_encoder_began_is_said_with_its_licence(tmp_path):
    plain, published = (export.media_text(tmp_path, recipe.read_recipe(MICRO).data, (), began) for began in (False, True))
    assert "Moonshine" not in plain and "MIT, (c) 2025 Useful Sensors, Inc." in published and "viseme_encoder/LICENSE" in published
    assert "Permission is hereby granted" in moonshine.LICENCE and "Useful Sensors" in moonshine.LICENCE


# ---------------------------------------------------------------- in an avatar


def test_the_recipe_holds_encoder_and_transformer_together():
    with pytest.raises(ConfigError, match="audio_dim=8: 8 where the recipe has a visemes section"):
        recipe.read_recipe(MICRO, ["visemes=null"])
    with pytest.raises(ConfigError, match="audio_dim=400"):
        recipe.read_recipe(MICRO, ["forcing.model.audio_dim=400"])


@pytest.fixture
def avatar(tmp_path):
    torch.manual_seed(1)
    encoder = VisemeEncoder(VisemeSizes(width=8))
    return weights.save_folder(tmp_path / "avatar", transformer=tiny_model(audio_dim=8), vae=tiny_vae(), viseme_encoder=encoder,
                               audio={"kind": "visemes"}, sampler={}, geometry={}), encoder  # fmt: skip


def test_a_folder_brings_what_it_hears_through(avatar):
    folder, encoder = avatar
    loaded = weights.load_hearing(folder)
    assert loaded.sizes == encoder.sizes and all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), encoder.state_dict().values(), strict=True))
    assert [part.problem for part in weights.inspect_folder(folder).parts if part.name == "viseme_encoder"] == [None]
    (folder / "viseme_encoder" / "config.json").write_text('{"width": 9}')
    assert any("viseme_encoder" in str(problem) or "shape" in str(problem) for problem in weights.inspect_folder(folder).problems)
    with pytest.raises(WeightsError):
        weights.load_hearing(folder)
    shutil.rmtree(folder / "viseme_encoder")
    with pytest.raises(WeightsError, match="without viseme_encoder"):
        weights.load_hearing(folder)


def test_an_avatar_of_the_spectrum_goes_on_with_articulators(tmp_path):
    """Unpacked for a recipe with an encoder, all but its first audio convolutions is as it was, and they do to the clips on the mean what they
    did."""
    r = recipe.read_recipe(MICRO)
    sizes = S2VConfig.from_dict(r.forcing.model)
    before = tiny_model(**{**sizes.to_dict(), "audio_dim": 400, "audio_inject_layers": sizes.audio_inject_layers, "patch_size": (1, 2, 2)})
    rng = np.random.default_rng(0)
    for number in range(3):
        frames = np.zeros((33, 4, 4, 3), np.uint8)
        sound = (3000 * rng.normal(size=37 * 640) * np.repeat(rng.random(37 * 8), 80)).astype(np.int16)
        shards.write_clip(shards.clip_path(tmp_path / "data", "train", number),
                          shards.Clip(frames, frames[0], sound, np.zeros((33, 4), np.float32), np.zeros((33, 2, 4), np.float32),
                                      *(np.zeros(33, np.float32) for _ in range(3)), {"caption": ""}))  # fmt: skip
    weights.save_viseme_encoder(tmp_path / "run" / "visemes", VisemeEncoder(r.visemes.sizes))
    after = unpack.refitted(before, sizes, r.forcing, tmp_path / "run", tmp_path / "data").state_dict()
    fitted = {f"casual_audio_encoder.encoder.{name}.conv.{part}" for name in unpack.FIRST for part in ("weight", "bias")}
    assert {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])} == fitted
    heard = {400: LogMelFrontEnd(), 8: VisemeFrontEnd(weights.load_viseme_encoder(tmp_path / "run" / "visemes"))}
    for name in unpack.FIRST:
        means = []
        for state, width in ((before.state_dict(), 400), (after, 8)):
            x = torch.cat([unpack._taps(heard[width].features_of(shards.read_clip(p).sound, 33)[0]) for p in shards.clip_paths(tmp_path / "data", "train")])
            key = f"casual_audio_encoder.encoder.{name}.conv"
            means.append((x @ state[f"{key}.weight"].flatten(1).T + state[f"{key}.bias"]).mean(0))
        assert torch.allclose(*means, atol=1e-3)
    with pytest.raises(InputError, match="run the data stage"):
        unpack.refitted(before, sizes, r.forcing, tmp_path / "run", tmp_path / "nothing")


# ---------------------------------------------------------------- blinks


def test_pieces_about_a_blink_show_it():
    r, rng = recipe.read_recipe(MICRO), np.random.default_rng(0)
    lid = np.full(60, 0.2, np.float32)
    lid[41:43] = 0.0
    frames = np.zeros((60, 96, 96, 3), np.uint8)
    frames[41:43, 20:28, 20:28] = 255
    eyes = np.broadcast_to(np.array([20, 20, 28, 28], np.float32), (60, 2, 4))
    clip = shards.Clip(frames, frames[0], np.zeros(1, np.int16), np.broadcast_to(np.array([60, 70, 80, 80], np.float32), (60, 4)), eyes, lid, lid, lid, {})
    assert (closure_of(lid) > codec.SHUT).nonzero()[0].tolist() == [41, 42]

    def seen(share: float) -> int:
        config = dataclasses.replace(r.vae, crop=32, blinks=share)
        pieces = (codec.cut_piece(clip, config, 5, rng)[0] for _ in range(60))
        return sum(float(piece.amax()) > 0.9 for piece in pieces)

    assert seen(1.0) > 50 > 20 > seen(0.0)
    with pytest.raises(ConfigError, match="blinks"):
        dataclasses.replace(r.vae, blinks=2.0)
