"""The VAE decoder with random weights: seconds of one block of 3 latents, plain, channels last, compiled, and latent by latent.

    python bench/decode.py                      # 704x384 and 384x256 at the size of Wan2.1; one GPU
    python bench/decode.py --scale              # a small decoder on a CPU, to show that it runs

The stream runs (the caches of the convolutions are full); pictures stay on the device, "bytes" adds their way to uint8 on the
host, which the decode rank has to go too. cuDNN searches its algorithms for every shape (cudnn.benchmark), as build_stage asks of it,
but for "unsearched". `liveavatar plan --measured` reads the rows of what the runtime does, by model.fast.compile.
"""

from __future__ import annotations

import itertools

import torch
from liveavatar.core import Geometry
from liveavatar.models.vae import StreamingVAE, build_module, compile_decoder, stored_as
from liveavatar.runtime.placement import WAN_VAE, decode_flops
from liveavatar.runtime.roles import to_bytes

from measured import Rows, earlier, matmul_rate, parser_of, seconds, show, spread_of

SCALED = {"base_dim": 16, "z_dim": 16}
WAYS = ("plain", "channels last", "compiled", "one latent a call", "channels last + bytes", "channels last + bytes, unsearched", "compiled + bytes")
RUNTIME = {"channels last + bytes": {"compile": False}, "compiled + bytes": {"compile": True}}  # way -> options of model.fast that make it
COLUMNS = {"size": "", "way": "", "seconds": ".4f", "worst": ".4f", "tflops": ".1f", "matmul_share": ".1%", "memory_gb": ".1f", "state_gb": ".2f", "problem": ""}


def random_vae(config: dict, last: bool, device: torch.device, dtype: torch.dtype) -> StreamingVAE:
    """A decoder of random weights; last: convolutions channels last, as a load keeps them."""
    torch.manual_seed(0)
    module = build_module(config)
    keep = stored_as(dtype, device) if last else lambda name, tensor: tensor.to(device, dtype)
    for name, p in (*module.named_parameters(), *module.named_buffers()):
        p.data = keep(name, p.data)
    return StreamingVAE(module.eval().requires_grad_(False))


@torch.inference_mode()
def measure(config: dict, geometry: Geometry, way: str, device: torch.device, dtype: torch.dtype, repeat: int, rate: float) -> dict:
    """One row."""
    if device.type == "cuda":
        torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats(device)
    vae = random_vae(config, way != "plain", device, dtype)
    if way.startswith("compiled"):
        torch._dynamo.reset()
        compile_decoder(vae)
    state, g = vae.new_state(), geometry
    latents = torch.randn(config["z_dim"], g.block_latents, g.latent_height, g.latent_width, device=device)
    parts = latents.split(1, dim=1) if way == "one latent a call" else [latents]

    def block() -> None:
        for part in parts:
            pictures = vae.decode(part, state)
            if "bytes" in way:
                to_bytes(pictures)

    torch.backends.cudnn.benchmark = "unsearched" not in way
    row = spread_of(seconds(block, device, repeat, warm=4))  # two latents fill the caches, then shapes are constant
    row["tflops"] = decode_flops(config, geometry) / row["seconds"] / 1e12
    return row | {"matmul_share": row["tflops"] / rate, "state_gb": state.nbytes / 1e9,
                  "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "decode.json", resume=True)
    parser.add_argument("--sizes", nargs="+", metavar="WIDTHxHEIGHT", help="default: 704x384 384x256; with --scale 64x64")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--scale", action="store_true", help="a small decoder, on whatever device there is")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, dtype = dict(SCALED if args.scale else WAN_VAE), torch.bfloat16
    sizes = args.sizes or (["64x64"] if args.scale else ["704x384", "384x256"])
    rate, before = matmul_rate(device, 512 if device.type == "cpu" else 8192), earlier(args.compare, ("size", "way"))

    said = {"matmul_tflops": {"bf16": rate}, "config": {"vae": config, "dtype": str(dtype), "repeat": args.repeat, "scaled": args.scale}}

    def measured(size: str, way: str) -> dict:
        width, height = map(int, size.split("x"))
        row = measure(config, Geometry(height=height, width=width), way, device, dtype, args.repeat, rate)
        return row | ({"role": "decode", "fast": RUNTIME[way]} if way in RUNTIME else {})

    rows = Rows(args.out, ("size", "way"), device, said, args.resume)
    for size, way in itertools.product(sizes, args.ways):
        rows.add({"size": size, "way": way}, lambda: measured(size, way))
    show("one block of the decoder", rows.made, COLUMNS, ("size", "way"), before)
    rows.write()


if __name__ == "__main__":
    main()
