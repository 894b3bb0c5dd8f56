"""Compiles forward pass and update of published shapes for TPU slices, without a TPU, and prints the memory of a chip.

    pip install -e ".[tpu]"
    python benchmarks/aot.py forward --out benchmarks/results/aot_forward.json
    python benchmarks/aot.py update --out benchmarks/results/aot_update.json

`forward` is the program of scoring (log-probability and entropy of every token, weights in bfloat16), `update` the
whole policy-gradient step (float32 master, AdamW, bfloat16 compute copy, one micro-batch at a time, every block
recomputed). They are compiled by the TPU compiler itself (libtpu), so the bytes are those a chip would hold; no time is
measured. For an update it also lists the largest arrays that are gathered: weights of the vocabulary and of one layer,
and one row's activations.
One JSON line a case; a case takes from half a minute to a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several of these may run side by side

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from result import about, write

from azr_jax.chips import CHIPS
from azr_jax.config import Config, LearnConfig, MeshConfig
from azr_jax.dist.mesh import make_mesh, row_sharding
from azr_jax.dist.sequence import token_layout
from azr_jax.learn.logprobs import next_token_logprobs
from azr_jax.learn.packing import pack
from azr_jax.learn.state import init_state, param_shardings, state_shardings
from azr_jax.learn.step import make_update
from azr_jax.models.attention import attend
from azr_jax.models.config import ModelConfig
from azr_jax.models.sizes import published_size
from azr_jax.models.transformer import Attend, Params, Spec, forward, init_params, param_specs
from azr_jax.plan_compile import memory_of

AHEAD = "no TPU: compiled ahead of time"
ROW_TOKENS = 8192
CASES = {  # model, topology, fsdp, tensor
    "forward": [
        ("qwen2.5-7b", "v5e:4x4", 4, 4),
        ("qwen2.5-14b", "v5e:4x4", 2, 8),
        ("qwen2.5-7b", "v6e:2x4", 2, 4),
        ("qwen2.5-14b", "v6e:2x4", 1, 8),
    ],
    "update": [
        ("qwen2.5-7b", "v5e:4x4", 4, 4),
        ("qwen2.5-7b", "v6e:2x4", 2, 4),
        ("qwen2.5-14b", "v5p:2x2x4", 8, 2),
    ],
}


def lower_forward(model: ModelConfig, mesh: Mesh, how: Attend) -> Any:
    """Scoring of one row a data shard."""
    rows = jax.ShapeDtypeStruct((mesh.shape["fsdp"], ROW_TOKENS), jnp.int32, sharding=row_sharding(mesh))
    params = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=sharding),
        param_specs(model),
        param_shardings(model, mesh),
        is_leaf=lambda x: isinstance(x, Spec),
    )

    @jax.jit
    def score(params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple:
        layout = token_layout(mesh, ROW_TOKENS)
        hidden = forward(params, model, tokens, positions, segments, layout=layout, attend=how)
        return next_token_logprobs(params, model, hidden, jnp.roll(tokens, -1, axis=1), 1.0)

    return score.lower(params, rows, rows, rows)


def lower_update(model: ModelConfig, mesh: Mesh, how: Attend) -> Any:
    """The update of `make_update`, one row a data shard and micro-batch."""
    config = Config(learn=LearnConfig(dtype="bfloat16", remat="block", rows=1))
    state = jax.eval_shape(lambda: init_state(init_params(model, 0), config, model, mesh))
    layout = state_shardings(config, model, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
    split = row_sharding(mesh, leading=1)
    empty = vars(pack([], [], ROW_TOKENS, mesh.shape["fsdp"], 4))
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
        for name, x in empty.items()
        if isinstance(x, np.ndarray)
    }
    update = make_update(config, model, mesh, attend=how).compiled  # type: ignore[attr-defined]
    return update.lower(state, batch, np.int32(1), np.float32(1), None)


def largest_gathers(text: str, most: int = 4) -> list[str]:
    """Types of the largest results of all-gathers in a compiled program's text."""
    found = set(re.findall(r"= \(?(?:\w+\[[\d,]*\]\S*, )?((?:bf16|f32)\[[\d,]+\])\S*\)? all-gather(?:-start)?\(", text))
    return sorted(found, key=lambda kind: -np.prod([int(n) for n in kind.split("[")[1][:-1].split(",")]))[:most]


def measure(program: str, name: str, topology: str, fsdp: int, tensor: int, kind: str) -> dict[str, Any]:
    """Compile one case; bytes of a chip."""
    model = published_size(name)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor), devices)
    start = time.monotonic()
    lower = lower_forward if program == "forward" else lower_update
    compiled = lower(model, mesh, partial(attend, kind=kind, mesh=mesh)).compile()
    parts = memory_of(compiled, "tpu")
    used = parts["argument"] + parts["temp"] + parts["output"] - parts["alias"]
    limit = CHIPS[topology.split(":")[0]].usable
    case = {"model": name, "topology": topology, "fsdp": fsdp, "tensor": tensor, "attention": kind}
    case |= {f"{part}_gib": round(size / 2**30, 2) for part, size in parts.items()}
    case |= {"used_gib": round(used / 2**30, 2), "usable_gib": round(limit / 2**30, 2), "fits": used < limit}
    if program == "update":
        try:
            case["largest_gathers"] = largest_gathers(compiled.as_text())
        except jax.errors.JaxRuntimeError as error:  # a newer libtpu writes instructions that jaxlib cannot print
            case["largest_gathers"] = f"the program's text cannot be printed: {str(error).split(chr(10))[0][:80]}"
    return case | {"compile_seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=CASES)
    parser.add_argument("--out", type=Path, help="also write all cases to this JSON file")
    parser.add_argument("--only", default="", help="only cases whose model and topology contain this text")
    parser.add_argument("--attention", default="splash", choices=["splash", "xla"])
    args = parser.parse_args()
    found = []
    for name, topology, fsdp, tensor in CASES[args.program]:
        if args.only in f"{name} {topology}":
            found.append(measure(args.program, name, topology, fsdp, tensor, args.attention))
            sys.stdout.write(json.dumps(found[-1]) + "\n")
            sys.stdout.flush()
    if args.out:
        write(args.out, about(AHEAD) | {"row_tokens": ROW_TOKENS, "cases": found})


if __name__ == "__main__":
    main()
