"""The embedded avatar's roles on this CPU: seconds of a step and of a decoded block by threads, dtype, packed projections, layout.

    python bench/cpu.py [--threads 1 2] [--rounds 7]

Every way is timed once a round, so that a neighbour's load falls on all alike; the best of the rounds is reported, and the median.
Between two ways only the best is compared: on a shared machine the rest is the neighbours.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from liveavatar import config as configs
from liveavatar.config import FastConfig
from liveavatar.models.fast import prepare
from liveavatar.runtime.sources import FolderSource

from measured import earlier, parser_of, show, write
from step import Stream

COLUMNS = {"role": "", "way": "", "threads": "d", "seconds": ".4f", "median": ".4f"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM = 5  # blocks: the ring and the decoder's caches are full


def step_calls(source: FolderSource) -> dict[str, Callable[[], object]]:
    """One forward of the transformer, by way."""
    device, calls = torch.device("cpu"), {}
    for (name, dtype), packed in itertools.product(DTYPES.items(), (False, True)):
        model = prepare(source.transformer(dtype, device), FastConfig(packed_qkv=packed))
        calls[f"{name}, packed" if packed else name] = Stream(model, source.geometry, graphs=False).block
    return calls


def decode_calls(source: FolderSource) -> dict[str, Callable[[], object]]:
    """One block through the decoder, by way; "contiguous" undoes what a load does to the weights."""
    device, g, calls = torch.device("cpu"), source.geometry, {}
    for (name, dtype), last in itertools.product(DTYPES.items(), (True, False)):
        vae = source.vae(dtype, device)
        for p in () if last else vae.module.parameters():
            p.data = p.data.contiguous()
        state, latents = vae.new_state(), torch.randn(source.model_config.in_dim, g.block_latents, g.latent_height, g.latent_width)
        calls[f"{name}, channels last" if last else f"{name}, contiguous"] = lambda vae=vae, state=state, z=latents: vae.decode(z, state)
    return calls


@torch.inference_mode()
def measure(role: str, calls: dict[str, Callable[[], object]], threads: list[int], rounds: int) -> list[dict]:
    """Rows of all ways of one role."""
    taken: dict[tuple[str, int], list[float]] = {}
    for call in calls.values():
        for _ in range(WARM):
            call()
    for _, count in itertools.product(range(rounds), threads):
        torch.set_num_threads(count)
        for way, call in calls.items():
            call()  # the caches of this number of threads
            began = time.perf_counter()
            call()
            taken.setdefault((way, count), []).append(time.perf_counter() - began)
    return [{"role": role, "way": way, "threads": count, "seconds": min(times), "median": statistics.median(times)} for (way, count), times in taken.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "cpu.json")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    source = FolderSource(configs.load(args.config))
    with torch.inference_mode():
        calls = {"step": step_calls(source), "decode": decode_calls(source)}
    rows = [row for role, ways in calls.items() for row in measure(role, ways, args.threads, args.rounds)]
    show("the embedded avatar on this CPU", rows, COLUMNS, ("role", "way", "threads"), earlier(args.compare, ("role", "way", "threads")))
    roles = {role: min(row["seconds"] for row in rows if row["role"] == role) for role in calls}
    write(args.out, config={"model": "default", "threads": args.threads, "rounds": args.rounds}, rows=rows, roles=roles)


if __name__ == "__main__":
    main()
