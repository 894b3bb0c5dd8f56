"""Compiles the sampler's prefill and decode programs for TPU slices, without a TPU, and prints the memory of a chip.

    pip install -e ".[tpu]"
    python benchmarks/aot_rollout.py --out benchmarks/results/aot_rollout.json

Weights in bfloat16, 512 slots, prompts of up to 6,144 and responses of up to 8,096 tokens, attention by the ragged
paged kernel. The cache gets the share of the chip's memory that a run would give it; `dense_gib` is what a cache of
512 full-length rows would take on each chip. Compiled by the TPU compiler itself (libtpu); no time is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from aot import AHEAD  # sets the environment libtpu needs
from jax.experimental import topologies
from result import about, write

from azr_jax.chips import CHIPS
from azr_jax.config import RolloutConfig
from azr_jax.models.sizes import published_size
from azr_jax.plan_compile import memory_of
from azr_jax.rollout.device import Device
from azr_jax.rollout.sizing import DEVICE_SHARE, longest
from azr_jax.rollout.weights import decode_mesh, weights_bytes

CASES = [
    ("qwen2.5-7b", "v5e:2x2"),
    ("qwen2.5-7b", "v5e:2x4"),
    ("qwen2.5-7b", "v6e:2x2"),
    ("qwen2.5-7b", "v5p:2x2x1"),
]
SLOTS = 512


def measure(name: str, topology: str) -> dict[str, Any]:
    """Compile the longest prefill and the decode block of one case; GiB of a chip."""
    model = published_size(name)
    mesh = decode_mesh(model, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    limit = CHIPS[topology.split(":")[0]].usable / 2**30
    weights = weights_bytes(model, "bfloat16") / mesh.shape["tensor"] / 2**30
    config = RolloutConfig(slots=SLOTS, page=128, cache_gb=DEVICE_SHARE * (limit - weights))
    device = Device(model, config, mesh, SLOTS, frozenset({0, 1}), "splash", "bfloat16")
    layout = device.layout
    split = mesh.shape["tensor"]
    dense = SLOTS // layout.shards * longest(config) * layout.bytes_per_page(model) / layout.page / split / 2**30
    case: dict[str, Any] = {"model": name, "topology": topology, "mesh": dict(mesh.shape)}
    case |= {"usable_gib": round(limit, 2)}
    case |= {"weights_gib": round(weights, 2), "cache_gib": round(config.cache_gb, 2), "dense_gib": round(dense, 1)}
    case |= {"cached_tokens_a_shard": layout.pages * layout.page}
    for kind, size in (("prefill", device.buckets[-1]), ("decode", device.widths[-1])):
        start = time.monotonic()
        parts = memory_of(device.program(kind, size), "tpu")
        used = (parts["argument"] + parts["temp"] + parts["output"] - parts["alias"]) / 2**30
        found: dict[str, Any] = {f"{part}_gib": round(size / 2**30, 2) for part, size in parts.items()}
        found |= {"used_gib": round(used, 2), "fits": used < limit}
        case[kind] = found | {"compile_seconds": round(time.monotonic() - start, 1)}
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write all cases to this JSON file")
    parser.add_argument("--only", default="", help="only cases whose model and topology contain this text")
    args = parser.parse_args()
    found = []
    for name, topology in CASES:
        if args.only in f"{name} {topology}":
            found.append(measure(name, topology))
            sys.stdout.write(json.dumps(found[-1]) + "\n")
            sys.stdout.flush()
    if args.out:
        write(args.out, about(AHEAD) | {"cases": found})


if __name__ == "__main__":
    main()
