"""Audio features: any chunking gives the same bytes; the reference's time base; bounded memory."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model

from liveavatar.conditioning import audio_features
from liveavatar.conditioning.audio_features import (
    LogMelFrontEnd,
    MoonshineFrontEnd,
    VisemeFrontEnd,
    Wav2VecFrontEnd,
    build_front_end,
    frame_to_row,
    interpolate_rows,
    log_mels,
    rows_30hz,
    rows_50hz,
    rows_to_frames,
)
from liveavatar.core import SAMPLE_RATE, ConfigError, InputError
from liveavatar.models.viseme_encoder import VisemeEncoder, VisemeSizes

from conftest import tiny_moonshine

GOLDEN = json.loads((Path(__file__).parent / "golden" / "audio_bucket.json").read_text())
BLOCK = 7680


def voice(samples: int, seed: int = 0) -> np.ndarray:
    """Amplitude-modulated tones and noise, float32 [samples]."""
    rng, t = np.random.default_rng(seed), np.arange(samples) / 16000
    tone = np.sin(2 * np.pi * 180 * t) + 0.5 * np.sin(2 * np.pi * 1250 * t)
    return (0.2 * tone * (1 + np.sin(2 * np.pi * 3 * t)) + 0.02 * rng.standard_normal(samples)).astype(np.float32)


def tiny_wav2vec() -> Wav2Vec2Model:
    """Two layers, real strides (400-sample receptive field, 320 apart), XLSR's stable layer norm."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm="layer",
    )  # fmt: skip
    model = Wav2Vec2Model(config).eval()
    with torch.no_grad():  # a final norm that is not the identity, so that leaving it out shows
        model.encoder.layer_norm.weight.uniform_(0.5, 2.0)
        model.encoder.layer_norm.bias.uniform_(-1.0, 1.0)
    return model


@pytest.fixture(scope="module")
def wav2vec():
    return tiny_wav2vec()


def viseme_encoder(**sizes):
    torch.manual_seed(0)
    return VisemeEncoder(VisemeSizes(width=8, **sizes))


@pytest.fixture(params=["log_mel", "visemes", "moonshine", "wav2vec2"])
def front_end(request, wav2vec):
    if request.param == "moonshine":
        return MoonshineFrontEnd(tiny_moonshine())
    if request.param == "visemes":
        return VisemeFrontEnd(viseme_encoder())
    return LogMelFrontEnd() if request.param == "log_mel" else Wav2VecFrontEnd(wav2vec, window_samples=32_400)


def stream_in_pieces(front_end, pcm, rng, longest):
    """Push random pieces, take every block as soon as its look-ahead is there, finish at the end."""
    stream, blocks, at = front_end.new_stream(), [], 0
    while at < len(pcm):
        size = int(rng.integers(1, longest))
        stream.push(torch.from_numpy(pcm[at : at + size]))
        at += size
        while stream.end >= BLOCK * (len(blocks) + 1) + front_end.lookahead_samples:
            blocks.append(stream.features(len(blocks)))
    stream.finish()
    while BLOCK * len(blocks) < len(pcm):
        blocks.append(stream.features(len(blocks)))
    return torch.cat(blocks, dim=-1)


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("longest", [300, 5000, 60_000])
def test_any_chunking_gives_the_bytes_of_one_chunk(front_end, longest):
    pcm = voice(50_000)
    whole = front_end.features_of(pcm, 84)
    pieces = stream_in_pieces(front_end, pcm, np.random.default_rng(longest), longest)
    assert whole.shape == (front_end.layers, front_end.width, 84) and whole.dtype == torch.float32
    assert torch.equal(pieces, whole)


def test_partial_block_is_a_prefix(front_end):
    pcm = voice(20_000)
    assert torch.equal(front_end.features_of(pcm, 31), front_end.features_of(pcm, 36)[..., :31])
    assert front_end.features_of(pcm, 0).shape == (front_end.layers, front_end.width, 0)


def test_asking_too_early_is_a_clear_error_and_finish_means_silence(front_end):
    pcm, stream = voice(BLOCK), front_end.new_stream()
    stream.push(pcm)
    with pytest.raises(InputError, match=r"needs audio up to sample \d+ .*only 7680 arrived"):
        stream.features(0)
    stream.finish()
    padded = np.concatenate([pcm, np.zeros(100_000, np.float32)])
    assert torch.equal(stream.features(0), front_end.features_of(padded, 12))


def test_lookahead_is_what_features_need_and_no_less_than_that(front_end):
    for block in range(10):
        assert front_end.span(block)[1] <= BLOCK * (block + 1) + front_end.lookahead_samples
    assert any(front_end.span(b)[1] > BLOCK * (b + 1) + front_end.lookahead_samples - 1600 for b in range(5))


def test_truncate_forgets_the_future_and_speech_continues_there(front_end):
    first, other = voice(40_000), voice(40_000, seed=5)
    stream = front_end.new_stream()
    stream.push(first)
    stream.features(0)
    stream.finish()
    stream.truncate(BLOCK + 1000)  # also reopens what had ended
    assert stream.end == BLOCK + 1000
    stream.push(other)
    spoken = np.concatenate([first[: BLOCK + 1000], other])
    assert torch.equal(stream.features(1), front_end.features_of(spoken, 24)[..., 12:])


def test_hours_of_audio_take_constant_memory():
    front_end = LogMelFrontEnd()
    stream, chunk, sizes = front_end.new_stream(), voice(BLOCK), []
    for block in range(1500):
        stream.push(chunk)
        if block:
            stream.features(block - 1)
        sizes.append(stream.nbytes)
    assert sizes[-1] == sizes[3] <= 8 * 4 * BLOCK


def test_block_numbers_far_beyond_any_table(front_end):
    """Block 2**31 gives the bytes of block 58: both are 3 modulo 5, so they lie alike on the 0.1 s grid."""
    features = []
    for block in (2**31, 58):
        start, stop = front_end.span(block)
        stream = front_end.new_stream(start)
        stream.push(voice(stop - start))
        features.append(stream.features(block))
    assert torch.equal(*features)


# ---------------------------------------------------------------- log-mel


def test_log_mel_against_the_definition_written_out():
    pcm, frame = voice(20_000), 14
    edges = np.linspace(2595 * math.log10(1 + 60 / 700), 2595 * math.log10(1 + 7600 / 700), 42)
    corners = 700 * (10 ** (edges / 2595) - 1)

    def tick(m):
        at = 160 * m
        bins = np.fft.rfft(pcm[at - 200 : at + 200] * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)), 512)
        hertz, mels = np.arange(257) * 31.25, []
        for a, b, c in zip(corners, corners[1:], corners[2:]):
            weights = [max(0.0, min((f - a) / (b - a), (c - f) / (c - b))) for f in hertz]
            mels.append((math.log(np.dot(weights, np.abs(bins) ** 2) + 1e-5) + 6) / 3)
        return np.array(mels)

    pairs = [(tick(m) + tick(m + 1)) / 2 for m in range(4 * frame - 8, 4 * frame + 12, 2)]
    got = LogMelFrontEnd().features_of(pcm, 24)[0, :, frame]
    np.testing.assert_allclose(got.numpy(), np.concatenate(pairs), atol=2e-5)


def test_log_mel_sees_exactly_its_window():
    """A change of PCM outside -80-12.5 .. +110+12.5 ms of a picture's start changes nothing."""
    front_end, frame, pcm = LogMelFrontEnd(), 15, voice(24_000)
    before = front_end.features_of(pcm, 24)[..., frame]
    for offset, seen in ((-1481, False), (-1300, True), (1900, True), (1960, False)):
        changed = pcm.copy()
        changed[640 * frame + offset] += 0.5
        assert torch.equal(front_end.features_of(changed, 24)[..., frame], before) != seen


# ---------------------------------------------------------------- the reference's time base


def test_row_counts_and_table_of_the_reference():
    for case in GOLDEN["rows_50hz_of_samples"]:
        assert rows_50hz(case["samples"]) == case["rows"]
    odd = [t for t in range(1, 3001) if rows_30hz(t) != 3 * t // 5]
    assert odd == GOLDEN["rows_30hz_exceptions"]["t50"] and all(rows_30hz(t) == 3 * t // 5 - 1 for t in odd)
    assert [frame_to_row(i) for i in range(len(GOLDEN["frame_to_row"]))] == GOLDEN["frame_to_row"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['rows_30hz']}rows")
def test_features_of_the_reference(case):
    rows50 = torch.tensor(case["features_50hz"])
    rows = interpolate_rows(rows50, rows_30hz(rows50.shape[1]))
    assert rows.shape[1] == case["rows_30hz"]
    frames = rows_to_frames(rows, case["clips"] * case["clip_frames"])
    for got, expected in ((rows, case["features_30hz"]), (frames.transpose(1, 2), case["frames_25fps"])):
        expected = torch.tensor(expected)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= GOLDEN["tolerance_relative"] * max(1.0, expected.abs().max())
    assert int(frames.abs().sum((0, 1)).count_nonzero()) == case["valid_frames"]


# ---------------------------------------------------------------- wav2vec2


def test_last_hidden_state_is_taken_after_the_final_norm(wav2vec):
    front_end, pcm = Wav2VecFrontEnd(wav2vec), voice(8000)
    states = front_end.hidden_states(pcm)
    with torch.no_grad():
        values = torch.from_numpy((pcm - pcm.mean()) / np.sqrt(pcm.var() + 1e-7))[None]
        out = wav2vec(values, output_hidden_states=True)
    assert states.shape == (3, rows_50hz(8000), 32)
    torch.testing.assert_close(states[-1:], out.last_hidden_state, atol=1e-4, rtol=0)
    assert (out.hidden_states[-1] - out.last_hidden_state).abs().max() > 0.1  # the trap is there to be fallen into
    torch.testing.assert_close(states[:-1], torch.cat(out.hidden_states[:-1]), atol=1e-4, rtol=0)


def test_window_over_the_whole_file_equals_whole_file_features_on_the_unstretched_grid(wav2vec):
    """k = 20, window = file: hidden states equal to 1e-5; the map differs from the reference's by <= 2 rows of 50 Hz."""
    k, block, pcm = 20, 2, voice(32_400)
    front_end = Wav2VecFrontEnd(wav2vec, window_samples=400 + 1600 * k, lookahead_samples=32_400 - 3 * BLOCK)
    assert front_end.span(block) == (0, len(pcm))
    streamed = front_end.features_of(pcm, 36)[..., 24:]
    states = front_end.hidden_states(pcm)
    unstretched = rows_to_frames(interpolate_rows(states, 3 * k + 1), 36)[..., 24:]
    assert (streamed - unstretched).abs().max() <= 1e-5
    positions = [frame_to_row(i) * (5 * k) / (rows_30hz(5 * k + 1) - 1) - frame_to_row(i) * 5 / 3 for i in range(49)]
    assert positions[0] == 0 and max(positions) <= 2.0
    whole = front_end.whole_file(pcm, 36)[..., 24:]
    index = [frame_to_row(i) for i in range(24, 36)]
    np.testing.assert_allclose(whole, interpolate_rows(states, rows_30hz(5 * k + 1))[:, index].transpose(1, 2), atol=1e-6)


def test_what_a_block_needs_of_indices_is_made_once(wav2vec):
    """On a GPU each would be a copy that waits. They repeat after 5 blocks."""
    front_end, pcm, made = Wav2VecFrontEnd(wav2vec), voice(54_800), []
    for block in range(12):
        front_end.encode(pcm, block)
        made.append([cached.cache_info().misses for cached in (audio_features._index, audio_features._between)])
    assert made[4:] == [made[4]] * 8 and made[0] != made[4]


def test_every_window_starts_on_the_absolute_grid_and_covers_its_pictures(wav2vec):
    for lookahead in (1040, 3200, 15_360):
        front_end = Wav2VecFrontEnd(wav2vec, lookahead_samples=lookahead)
        for block in (0, 1, 2, 3, 4, 5, 2**31, 2**31 + 1):
            start, stop = front_end.span(block)
            first, last = (frame_to_row(12 * block + j) * 1600 // 3 for j in (0, 11))
            assert start % 1600 == 0 and stop - start == 54_800
            assert start <= first and last + 400 <= stop <= BLOCK * (block + 1) + lookahead


def test_a_window_that_cannot_serve_is_refused(wav2vec):
    with pytest.raises(ConfigError, match="400 \\+ 1600 k"):
        Wav2VecFrontEnd(wav2vec, window_samples=32_000)
    with pytest.raises(ConfigError, match="1040 is enough"):
        Wav2VecFrontEnd(wav2vec, lookahead_samples=1039)
    with pytest.raises(ConfigError, match="shorter than a block"):
        Wav2VecFrontEnd(wav2vec, window_samples=8400)


def test_whole_file_too_short_for_one_row_is_zeros(wav2vec):
    assert not Wav2VecFrontEnd(wav2vec).whole_file(voice(399), 3).any()


# ---------------------------------------------------------------- visemes


def test_articulators_are_those_of_their_moment():
    """Of a sound at one moment only pictures from `ahead` before it to the reach behind it hear anything."""
    encoder = viseme_encoder(dilations=(1, 2), ahead=6)
    front_end, pcm = VisemeFrontEnd(encoder), np.zeros(SAMPLE_RATE, np.float32)
    silence = front_end.features_of(pcm, 25)
    pcm[8000:8001] = 0.5  # tick 50, and by its 25 ms window 49 and 51
    heard = (front_end.features_of(pcm, 25) != silence).any(1)[0].nonzero().flatten().tolist()
    first, last = 49 - 6, 51 + encoder.sizes.reach - 6
    assert heard == [picture for picture in range(25) if first <= 4 * picture <= last]


def test_the_whole_recording_at_once_gives_the_same_articulators():
    encoder, pcm = viseme_encoder(), voice(40_000)
    sizes, frames = encoder.sizes, 60
    before = 160 * (sizes.reach - sizes.ahead) + 200
    window = np.concatenate([np.zeros(before, np.float32), pcm])[: 160 * (4 * (frames - 1) + sizes.reach) + 400]
    with torch.no_grad():
        whole = encoder(torch.from_numpy(log_mels(window).astype(np.float32).T)[None])[..., ::4]
    assert torch.allclose(whole, VisemeFrontEnd(encoder).features_of(pcm, frames), atol=1e-5)


@pytest.mark.parametrize("sizes", [{"width": 0}, {"dilations": ()}, {"ahead": -1}, {"ahead": 10, "dilations": (1,)}])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(ConfigError, match="viseme encoder"):
        VisemeSizes(**sizes)


def test_windows_on_a_recogniser_end_100_ms_after_a_block():
    front_end, sizes = MoonshineFrontEnd(tiny_moonshine()), tiny_moonshine().sizes
    assert front_end.lookahead_samples == 1600 and front_end.span(1)[0] == BLOCK - 384 * sizes.context - 447
    pcm = voice(5 * BLOCK)
    changed = pcm.copy()
    changed[2 * BLOCK + 1600] += 0.5
    before, after = (front_end.features_of(p, 60)[0] for p in (pcm, changed))
    assert torch.equal(before[:, :24], after[:, :24]) and not torch.equal(before[:, 24:36], after[:, 24:36])


@pytest.mark.parametrize("pictures", [4, 12, 16])
def test_tokens_cover_the_pictures_of_any_block(pictures):
    """A token is centred on its moment: what is heard of one picture comes from the two tokens around it."""
    encoder = tiny_moonshine()
    before, after = encoder.sizes.margins(pictures)
    assert after >= 640 * (pictures - 1) + 447 and encoder(torch.zeros(2, before + after), pictures).shape == (2, 8, pictures)
    with pytest.raises(AssertionError, match="samples for"):
        encoder(torch.zeros(1, before), pictures)


@pytest.mark.parametrize("sizes", [{"layers": 0}, {"context": 7}, {"hidden": 41}])
def test_sizes_of_a_recogniser_that_cannot_be_are_refused(sizes):
    with pytest.raises(ConfigError, match="viseme encoder"):
        tiny_moonshine(**sizes)


# ---------------------------------------------------------------- the door


def test_build_front_end(wav2vec):
    assert build_front_end({"kind": "log_mel"}).width == 400
    assert build_front_end({"kind": "wav2vec2", "lookahead_samples": 3200}, wav2vec).lookahead_samples == 3200
    with pytest.raises(ConfigError, match="did you mean 'lookahead_samples'"):
        build_front_end({"kind": "wav2vec2", "lookahead_sample": 3200}, wav2vec)
    assert build_front_end({"kind": "visemes"}, viseme_encoder()).width == 8
    assert build_front_end({"kind": "visemes", "block_frames": 4}, tiny_moonshine()).span(1)[0] == 4 * 640 - 384 * 10 - 447
    with pytest.raises(ConfigError, match="must be one of log_mel, visemes, wav2vec2"):
        build_front_end({"kind": "mel"})
    for kind, folder in (("wav2vec2", "wav2vec2"), ("visemes", "viseme_encoder")):
        with pytest.raises(ConfigError, match=f"no {folder} folder"):
            build_front_end({"kind": kind})
