"""Streaming VAE: pieces equal the whole, sessions do not touch each other, the fixture holds."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file

from liveavatar.core import InputError, WeightsError
from liveavatar.models.vae import StreamingVAE, compile_decoder, plan_official_vae, stored_as, wan_name

PARITY = Path("/work/shared/parity")
SMALL = dict(
    base_dim=8,
    z_dim=16,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=8,
)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return StreamingVAE.from_module(AutoencoderKLWan(**SMALL).eval())


@pytest.fixture(scope="module")
def latents():
    return torch.randn(16, 6, 3, 4, generator=torch.Generator().manual_seed(1))


def decode_in(vae, latents, sizes, state=None):
    state = state or vae.new_state()
    return torch.cat([vae.decode(piece, state) for piece in latents.split(sizes, dim=1)], dim=1)


def whole(vae, latents):
    """What diffusers' own decode makes of all latents at once."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        return vae.module.decode(latents[None] * std + mean).sample[0]


def test_strides_come_from_the_config(vae):
    assert (vae.z_dim, vae.spatial_stride, vae.temporal_stride) == (16, 8, 4)
    plain = StreamingVAE.from_module(AutoencoderKLWan(base_dim=8))
    assert (plain.spatial_stride, plain.temporal_stride) == (8, 4)


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [1, 5], [3, 3], [2, 3, 1], [1, 3, 2]], ids=str)
def test_pieces_equal_the_whole(vae, latents, sizes):
    pictures = decode_in(vae, latents, sizes)
    assert pictures.shape == (3, 21, 24, 32) and pictures.dtype == torch.float32
    torch.testing.assert_close(pictures, whole(vae, latents), atol=2e-5, rtol=0)


@torch.inference_mode()
def test_a_compiled_decoder_is_one_graph_and_makes_the_same_pictures():
    """In the runtime's order: seven latents that prime, then three a block; and a call that begins a stream is not compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    made, draw = StreamingVAE.from_module(AutoencoderKLWan(**SMALL).eval().requires_grad_(False)), torch.Generator().manual_seed(1)
    stream, sizes = torch.randn(16, 19, 3, 4, generator=draw), [7, 3, 3, 3, 3]
    expected, settling = decode_in(made, stream, sizes), decode_in(made, stream[:, :4], [1] * 4)
    torch._dynamo.reset()
    compile_decoder(made, backend=backend)
    assert torch.equal(decode_in(made, stream, sizes), expected) and len(graphs) == 1
    assert torch.equal(decode_in(made, stream, sizes), expected) and len(graphs) == 1, "the next session finds it there"
    assert torch.equal(decode_in(made, stream[:, :4], [1] * 4), settling) and len(graphs) == 2, "of one latent a call"
    torch._dynamo.reset()


def test_first_latent_makes_one_picture_others_four(vae, latents):
    state = vae.new_state()
    counts = [vae.decode(latents[:, i : i + 1], state).shape[1] for i in range(3)]
    assert counts == [1, 4, 4] and state.latents == 3


def test_interleaved_sessions_do_not_interfere(vae, latents):
    other = latents.flip(1)
    states = vae.new_state(), vae.new_state()
    parts = ([], [])
    for i in range(0, 6, 3):
        for k, stream in enumerate((latents, other)):
            parts[k].append(vae.decode(stream[:, i : i + 3], states[k]))
    assert torch.equal(torch.cat(parts[0], 1), decode_in(vae, latents, [3, 3]))
    assert torch.equal(torch.cat(parts[1], 1), decode_in(vae, other, [3, 3]))


def test_reset_starts_over_and_clone_is_independent(vae, latents):
    state = vae.new_state()
    assert state.nbytes == 0
    vae.decode(latents[:, :3], state)
    assert state.nbytes == sum(t.nbytes for t in state.cache if torch.is_tensor(t)) > 0
    twin = state.clone().to("cpu")
    expected = vae.decode(latents[:, 3:], state)
    assert torch.equal(vae.decode(latents[:, 3:], twin), expected)
    state.reset()
    assert torch.equal(decode_in(vae, latents, [3, 3], state), decode_in(vae, latents, [3, 3]))


def test_dropping_the_state_between_calls_would_show(vae, latents):
    fresh = vae.decode(latents[:, 3:], vae.new_state())
    assert fresh.shape[1] == 9  # a new stream again: 1 + 4 + 4
    assert (fresh[:, -8:] - decode_in(vae, latents, [3, 3])[:, -8:]).abs().max() > 1e-3


def test_a_failed_call_leaves_the_state_alone(vae, latents):
    state = vae.new_state()
    vae.decode(latents[:, :2], state)
    twin = state.clone()
    with pytest.raises(RuntimeError):
        vae.decode(latents[:, 2:, :2], state)  # another height than the cache was made with
    assert torch.equal(vae.decode(latents[:, 2:], state), vae.decode(latents[:, 2:], twin))


def test_encode_equals_the_module(vae):
    pictures = torch.rand(3, 9, 24, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    encoded = vae.encode(pictures)
    assert encoded.shape == (16, 3, 3, 4) and encoded.dtype == torch.float32
    with torch.no_grad():
        mu = vae.module.encode(pictures[None]).latent_dist.mode()[0]
    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    torch.testing.assert_close(encoded, (mu - mean) / std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [2, 4, 8, 10])
def test_encode_refuses_other_counts(vae, frames):
    with pytest.raises(InputError, match=f"{frames} pictures.*1 \\+ 4n"):
        vae.encode(torch.zeros(3, frames, 16, 16))


def test_encode_refuses_odd_sides(vae):
    with pytest.raises(InputError, match="20x16.*multiples of 8"):
        vae.encode(torch.zeros(3, 1, 16, 20))


def test_folder_round_trip_is_strict(vae, latents, tmp_path):
    vae.module.save_pretrained(tmp_path)
    loaded = StreamingVAE.from_folder(tmp_path)
    state, stored = vae.module.state_dict(), loaded.module.state_dict()
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in state)
    # Not bit for bit: loading puts the convolutions channels last.
    torch.testing.assert_close(decode_in(loaded, latents, [3, 3]), decode_in(vae, latents, [3, 3]), atol=2e-5, rtol=0)
    half = StreamingVAE.from_folder(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.decode(latents, half.new_state()).dtype == torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"base_dim": 4}))
    with pytest.raises(WeightsError, match="wrongly shaped.*expected .* found"):
        StreamingVAE.from_folder(tmp_path)


# ---------------------------------------------------------------- the fixture

parity = pytest.mark.skipif(not PARITY.is_dir(), reason="parity fixtures are not on this machine")


@pytest.fixture(scope="module")
def fixture_case():
    facts = json.loads((PARITY / "vae_stream.json").read_text())
    tensors = load_file(PARITY / "vae_stream.safetensors")
    official = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    module = AutoencoderKLWan(**facts["config"])
    module.load_state_dict(convert_wan_vae_to_diffusers(official), strict=True)
    return facts, tensors, StreamingVAE.from_module(module.eval())


@parity
@pytest.mark.parametrize("sizes", [None, [7], [1] * 7, [2, 5]], ids=str)
def test_fixture_decode(fixture_case, sizes):
    facts, tensors, vae = fixture_case
    state = vae.new_state()
    pieces = [vae.decode(z, state) for z in tensors["in.z"][0].split(sizes or facts["call_sizes"], dim=1)]
    if sizes is None:
        assert [p.shape[1] for p in pieces] == facts["frames_per_call"]
    error = (torch.cat(pieces, 1) - tensors["expect.decode"][0]).abs().max().item()
    assert error <= facts["tolerance"]["decode_max_abs"]


@parity
def test_fixture_encode(fixture_case):
    facts, tensors, vae = fixture_case
    image = tensors["in.image"][0]
    for pictures, name in ((image, "image_latent"), (image.repeat(1, 13, 1, 1), "repeat13_latents")):
        error = (vae.encode(pictures) - tensors[f"expect.{name}"][0]).abs().max().item()
        assert error <= facts["tolerance"]["encode_max_abs"]


@parity
def test_official_file_loads_by_its_own_names(fixture_case, tmp_path):
    _, tensors, vae = fixture_case
    official = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(official, path)
    loaded = StreamingVAE(plan_official_vae(path).load(stored_as(torch.float32, "cpu")))
    z = tensors["in.z"][0][:, :2]
    torch.testing.assert_close(decode_in(loaded, z, [1, 1]), decode_in(vae, z, [1, 1]), atol=2e-5, rtol=0)
    torch.save({k: v for k, v in official.items() if k != "conv1.bias"}, path)
    with pytest.raises(WeightsError, match="1 missing: quant_conv.bias"):
        plan_official_vae(path).check()


def test_full_size_module_has_the_official_count():
    with torch.device("meta"):
        module = AutoencoderKLWan()
    assert len(module.state_dict()) == 194 and sum(p.numel() for p in module.parameters()) == 126_892_531


# ---------------------------------------------------------------- Wan's own names


def test_names_agree_with_the_converter_where_it_knows_the_layout():
    with torch.device("meta"):
        module = AutoencoderKLWan()
    wan = {wan_name(name, module.config): name for name in module.state_dict()}
    assert convert_wan_vae_to_diffusers(dict(wan)) == {name: name for name in module.state_dict()}


@pytest.mark.parametrize("sizes, pairs", [
    (SMALL, {"decoder.up_blocks.1.upsamplers.0.time_conv.bias": "decoder.upsamples.5.time_conv.bias",
             "decoder.up_blocks.2.resnets.1.conv2.weight": "decoder.upsamples.7.residual.6.weight"}),
    ({"dim_mult": [1, 2, 2, 4]}, {"decoder.up_blocks.2.resnets.0.conv_shortcut.bias": "decoder.upsamples.8.shortcut.bias"}),
    ({"is_residual": True}, {"decoder.up_blocks.0.upsampler.resample.1.weight": "decoder.upsamples.0.upsamples.3.resample.1.weight",
                             "encoder.down_blocks.1.downsampler.time_conv.bias": "encoder.downsamples.1.downsamples.2.time_conv.bias",
                             "encoder.down_blocks.1.resnets.0.conv_shortcut.bias": "encoder.downsamples.1.downsamples.0.shortcut.bias"}),
], ids=["levels", "widths", "residual"])
def test_names_of_other_layouts(sizes, pairs):
    with torch.device("meta"):
        module = AutoencoderKLWan(**{"base_dim": 8, **sizes})
    names = {name: wan_name(name, module.config) for name in module.state_dict()}
    assert len(set(names.values())) == len(names) and pairs.items() <= names.items()
