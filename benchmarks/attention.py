"""Attention kernels against the reference on the device there is: difference and time, in one run.

    python benchmarks/attention.py                          # what `attention: auto` picks here, heads of Qwen2.5 7B
    python benchmarks/attention.py --tokens 14240 --heads 28 --kv-heads 4 --head-dim 128 --segments 12
    python benchmarks/attention.py --aot v5e:2x2            # compile splash for a TPU slice without one: memory a chip

Prints one JSON object. Times are medians of whole calls (forward, and forward with backward) of compiled programs on
random packed rows; `error` is the largest difference to float32 results of the reference, relative to the largest.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.models.attention import Array, Visibility, attend
from azr_jax.models.attention_choice import choose_attention
from azr_jax.plan_compile import memory_of


def packed_rows(rows: int, tokens: int, segments: int) -> Visibility:
    """Rows filled with `segments` segments of random lengths, and a little padding."""
    rng = np.random.default_rng(0)
    ids, positions = np.zeros((rows, tokens), np.int32), np.zeros((rows, tokens), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, tokens), segments, replace=False))
        for index, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            ids[row, start:end], positions[row, start:end] = index + 1, np.arange(end - start)
    return Visibility.within(jnp.asarray(ids), jnp.asarray(positions))


def step(q: Array, k: Array, v: Array, visibility: Visibility, **options: Any) -> Array:
    return attend(q, k, v, visibility, scale=q.shape[-1] ** -0.5, **options)


def gradients(q: Array, k: Array, v: Array, visibility: Visibility, **options: Any) -> tuple[Array, ...]:
    """Of a loss that is quadratic in the result."""

    def loss(q: Array, k: Array, v: Array) -> Array:
        return jnp.sum(step(q, k, v, visibility, **options).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def median_ms(function: Any, *arguments: Any, repeats: int) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Every kind that runs here, against XLA."""
    kind = choose_attention("auto", head_dim=args.head_dim, dtype=args.dtype)
    visibility = packed_rows(args.rows, args.tokens, args.segments)
    rng = np.random.default_rng(1)
    heads = (args.heads, args.kv_heads, args.kv_heads)
    exact = [rng.standard_normal((args.rows, args.tokens, n, args.head_dim), np.float32) for n in heads]
    inputs = [jnp.asarray(x, args.dtype) for x in exact]
    with jax.default_matmul_precision("highest"):
        true = [x.astype(jnp.float32) for x in inputs]
        expected = [jax.jit(step)(*true, visibility), *jax.jit(gradients)(*true, visibility)]
    figures = {}
    for name in dict.fromkeys((kind, "xla")):
        forward, backward = (jax.jit(partial(function, kind=name)) for function in (step, gradients))
        found = [forward(*inputs, visibility), *backward(*inputs, visibility)]
        errors = [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(found, expected, strict=True)]
        figures[name] = {
            "forward_ms": median_ms(forward, *inputs, visibility, repeats=args.repeats),
            "forward_backward_ms": median_ms(backward, *inputs, visibility, repeats=args.repeats),
            "error": dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)),
        }
    speedup = {key: figures["xla"][key] / figures[kind][key] for key in ("forward_ms", "forward_backward_ms")}
    return {"device": jax.devices()[0].device_kind, "kind": kind, "figures": figures, "speedup": speedup}


def compile_ahead(args: argparse.Namespace) -> dict[str, Any]:
    """Splash attention, forward and backward, compiled for a TPU topology; rows over fsdp."""
    devices = topologies.get_topology_desc(args.aot, "tpu").devices
    mesh = make_mesh(MeshConfig(1, 0, 1), devices)
    rows = args.rows * len(devices)

    def shape(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    heads = (args.heads, args.kv_heads, args.kv_heads)
    inputs = [shape(rows, args.tokens, n, args.head_dim, dtype=args.dtype) for n in heads]
    seen = Visibility(*(shape(rows, args.tokens, dtype=jnp.int32) for _ in range(4)))
    start = time.perf_counter()
    compiled = jax.jit(partial(gradients, kind="splash", mesh=mesh)).lower(*inputs, seen).compile()
    memory = memory_of(compiled, "tpu")
    return {
        "topology": args.aot,
        "compile_seconds": round(time.perf_counter() - start, 1),
        "argument_mib": memory["argument"] / 2**20,
        "temporary_mib": memory["temp"] / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--aot", metavar="TOPOLOGY", help="such as v5e:2x2 or v6e:2x2; needs libtpu")
    args = parser.parse_args()
    shape = {name: value for name, value in vars(args).items() if name != "aot"}
    figures = compile_ahead(args) if args.aot else compare(args)
    print(json.dumps({"jax": jax.__version__, "shape": shape, **figures}, indent=2))


if __name__ == "__main__":
    main()
