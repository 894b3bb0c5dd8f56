"""Compiles the forward pass of published shapes for TPU slices, without a TPU, and prints the memory of a chip.

    pip install "azr_jax[tpu]"
    python benchmarks/forward_aot.py                         # 7B and 14B on v5e:4x4 and v6e:2x4, 8,192-token rows
    python benchmarks/forward_aot.py --out benchmarks/results/forward_aot.json

The program is that of scoring: log-probability and entropy of every token, weights in bfloat16 sharded over fsdp x
tensor, activations over fsdp. It is compiled by the TPU compiler itself (libtpu), so the numbers are those a chip would
see; no time is measured here. One JSON line a case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh, row_sharding
from azr_jax.learn.logprobs import next_token_logprobs
from azr_jax.learn.state import param_shardings
from azr_jax.models.attention import attend
from azr_jax.models.config import ModelConfig
from azr_jax.models.sizes import published_size
from azr_jax.models.transformer import Params, Spec, forward, param_specs

HBM_GIB = {"v5e": 16, "v6e": 32, "v5p": 95}  # of a chip, as Google's documentation gives it
CASES = [  # model, topology, fsdp, tensor
    ("qwen2.5-7b", "v5e:4x4", 4, 4),
    ("qwen2.5-14b", "v5e:4x4", 2, 8),
    ("qwen2.5-7b", "v6e:2x4", 2, 4),
    ("qwen2.5-14b", "v6e:2x4", 1, 8),
    ("llama-3.1-8b", "v6e:2x4", 2, 4),
    ("gemma-3-4b", "v6e:2x4", 2, 4),
]
ROW_TOKENS = 8192


def compile_forward(model: ModelConfig, topology: str, fsdp: int, tensor: int, kind: str) -> dict[str, Any]:
    """Memory of a chip for one row a data shard."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor), devices)
    rows = jax.ShapeDtypeStruct((fsdp, ROW_TOKENS), jnp.int32, sharding=row_sharding(mesh))
    params = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=sharding),
        param_specs(model),
        param_shardings(model, mesh),
        is_leaf=lambda x: isinstance(x, Spec),
    )

    @jax.jit
    def score(params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple:
        def constrain(x: jax.Array) -> jax.Array:
            return lax.with_sharding_constraint(x, row_sharding(mesh))

        how = partial(attend, kind=kind, mesh=mesh)
        hidden = forward(params, model, tokens, positions, segments, constrain=constrain, attend=how)
        return next_token_logprobs(params, model, hidden, jnp.roll(tokens, -1, axis=1), 1.0)

    start = time.monotonic()
    memory = score.lower(params, rows, rows, rows).compile().memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    limit = HBM_GIB[topology.split(":")[0]] * 2**30
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "hbm_bytes": limit,
        "fits": used < limit,
        "compile_seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write all cases to this JSON file")
    parser.add_argument("--only", default="", help="only cases whose model contains this text")
    args = parser.parse_args()
    found = []
    for name, topology, fsdp, tensor in CASES:
        if args.only not in name:
            continue
        for kind in ("xla", "splash"):
            case = {"model": name, "topology": topology, "fsdp": fsdp, "tensor": tensor, "attention": kind}
            found.append(case | compile_forward(published_size(name), topology, fsdp, tensor, kind))
            sys.stdout.write(json.dumps(found[-1]) + "\n")
            sys.stdout.flush()
    if args.out:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/forward_aot.py",
            "machine": f"{os.cpu_count()} cores {platform.machine()}, no TPU: compiled ahead of time",
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "row_tokens": ROW_TOKENS,
            "cases": found,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
