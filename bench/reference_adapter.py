"""Seconds of the public reference's own forward on this GPU, with random weights, at the shapes of bench/step.py.

    python bench/reference_adapter.py /path/to/LiveAvatar --size 704x384 --out reference.json     # in the reference's environment
    python bench/step.py --reference reference.json                                               # in ours: a column of its table

Two commands, because the checkout's package bears the name of ours. What is asked of the checkout: `liveavatar.models.wan.
causal_model_s2v.CausalWanModel_S2V` and the two methods of `causal_s2v_pipeline_tpp.WanS2V` that make its caches; where a version
differs, the error says which name is missing: --build FILE.py then gives a function build(checkout, width, height) of your own
that returns a call without arguments, one forward of one block. See bench/reference.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

LAYERS = [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39]
SIZES = {"dim": 5120, "ffn_dim": 13824, "freq_dim": 256, "num_heads": 40, "num_layers": 40, "in_dim": 16, "out_dim": 16, "text_len": 512, "cond_dim": 16,
         "audio_dim": 1024, "num_audio_token": 4, "audio_inject_layers": LAYERS, "enable_adain": True, "adain_mode": "attn_norm", "zero_timestep": True,
         "enable_framepack": True, "framepack_drop_mode": "padd", "add_last_motion": True, "enable_motioner": False, "enable_tsm": False}  # fmt: skip
LATENTS, CLIP, TEXT, MOTION = 3, 12, 19, (73, 19)  # latents of a block and of the reference's clip; text rows; motion pictures and latents


def build(checkout: Path, width: int, height: int) -> Callable[[], object]:
    """The reference's model with random weights, its caches and sink; a call runs the next block at one step."""
    sys.path.insert(0, str(checkout))
    model_module = importlib.import_module("liveavatar.models.wan.causal_model_s2v")
    pipeline_class = importlib.import_module("liveavatar.models.wan.causal_s2v_pipeline_tpp").WanS2V
    device, dtype, h, w = torch.device("cuda:0"), torch.bfloat16, height // 8, width // 8
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = model_module.CausalWanModel_S2V(**SIZES)
    torch.set_default_dtype(torch.float32)
    model.to(dtype).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, 0.5 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.02)
    model.freqs = model.freqs.to(device)
    model.num_frame_per_block = LATENTS
    tok = h * w // 4
    pipe = pipeline_class.__new__(pipeline_class)  # without its checkpoints: only what the two methods read
    pipe.noise_model, pipe.num_frames_per_block, pipe.device, pipe.param_dtype = model, LATENTS, device, dtype
    pipe._initialize_kv_cache(batch_size=1, dtype=dtype, device="cuda:0", kv_cache_size=CLIP * tok)
    pipe._initialize_crossattn_cache(batch_size=1, dtype=dtype, device=device)
    noise = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    given = {"context": [noise(TEXT, 4096)], "seq_len": None, "cond_states": noise(1, 16, LATENTS, h, w) * 0, "motion_latents": noise(1, 16, MOTION[1], h, w),
             "ref_latents": noise(1, 16, 1, h, w), "audio_input": noise(1, 25, 1024, 4 * LATENTS), "motion_frames": list(MOTION), "drop_motion_frames": False,
             "kv_cache": pipe.kv_cache1, "crossattn_cache": pipe.crossattn_cache}  # fmt: skip
    x, number = noise(16, LATENTS, h, w), 0

    def forward(t: float, block: int, **more: object) -> object:
        levels = torch.full((1, LATENTS), t, device=device)
        with torch.no_grad(), torch.autocast("cuda", dtype=dtype):
            return model([x], t=levels, **given, current_start=block * LATENTS * tok, current_end=(block + 1) * LATENTS * tok, **more)

    def block() -> object:
        nonlocal number
        number += 1
        return forward(602.15, number - 1)

    forward(0.0, 0, sink_flag=True)
    return block


def own_build(file: Path) -> Callable[[Path, int, int], Callable[[], object]]:
    """`build` of a file of the user's."""
    spec = importlib.util.spec_from_file_location("own_reference", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build


def seconds(call: Callable[[], object], repeat: int, warm: int) -> list[float]:
    """Wall-clock seconds of each call, waited for."""
    taken = []
    for number in range(warm + repeat):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken += [time.perf_counter() - began] if number >= warm else []
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--size", default="704x384", metavar="WIDTHxHEIGHT")
    parser.add_argument("--build", type=Path, help="a file with build(checkout, width, height) of your own")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("reference.json"))
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    call = (own_build(args.build) if args.build else build)(args.checkout, width, height)
    taken = seconds(call, args.repeat, warm=8)  # the ring is full after 4
    head = subprocess.run(["git", "-C", str(args.checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    row = {"size": args.size, "way": "reference", "seconds": statistics.median(taken), "worst": max(taken), "memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    args.out.write_text(json.dumps({"machine": {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}, "commit": head, "rows": [row]}, indent=1) + "\n",
                        encoding="utf-8")  # fmt: skip
    print(row, args.out)


if __name__ == "__main__":
    main()
