"""What the rollout engine does a second on this machine, and how far that is from the floor of reading memory.

A decode step reads every weight once and the keys and values of every sequence in flight. With the bandwidth of a plain
copy, measured in the same run, that gives the least time the blocks could have taken. On a CPU that holds a small model
in its cache the floor means little.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, replace
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from azr_jax import __version__
from azr_jax.config import Config
from azr_jax.dist.mesh import make_mesh
from azr_jax.learn.state import param_shardings
from azr_jax.models.attention_choice import choose_attention
from azr_jax.models.config import ModelConfig
from azr_jax.models.weights import load_weights, model_folder
from azr_jax.rollout.engine import Engine, EngineStats
from azr_jax.rollout.request import Request, request_key
from azr_jax.telemetry.process import CompileCounter

COPY_BYTES = 2**28  # of the array whose copy tells the bandwidth, on one device
REQUESTS_A_SLOT = 4
SPREAD = 1.0  # of the logarithm of a length
SHORTER = 8  # the median length is the longest over this


class _Endless:
    """Stands in for the tokenizer: no token ends a response, so lengths are those that were drawn."""

    eos_ids = frozenset({-1})
    pad_id = 0

    def decode(self, ids: Any) -> str:
        return ""


def workload(config: Config, vocab: int, requests: int) -> list[Request]:
    """Different prompts of random tokens, and response lengths, both log-normal and cut at their limits."""
    rng = np.random.default_rng(config.seed)
    rollout = config.rollout

    def lengths(most: int) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(most / SHORTER), SPREAD, requests), 1, most).astype(int)

    prompts = [tuple(rng.integers(0, vocab, n).tolist()) for n in lengths(rollout.max_prompt)]
    return [
        Request(prompt, request_key(config.seed, "bench", i), rollout.temperature, id=i, max_tokens=int(most))
        for i, (prompt, most) in enumerate(zip(prompts, lengths(rollout.max_response), strict=True))
    ]


def measure(config: Config) -> dict[str, Any]:
    """Figures of REQUESTS_A_SLOT requests a slot, after compiling and one short batch.

    tokens_per_second: of responses, over wall time, prefills included. recompiles: programs compiled meanwhile.
    roofline_share: the floor of the decode steps over the time the device had work. slot_use: tokens over slots times
    decode steps.
    """
    compiles = CompileCounter()
    folder = model_folder(config.model)
    model, mesh = ModelConfig.load(folder), make_mesh(config.mesh)
    dtype = config.learn.dtype
    kind = choose_attention(config.attention, head_dim=model.head_dim, dtype=dtype, windows=bool(model.sliding_layers))
    tokenizer: Any = _Endless()
    engine = Engine(model, config.rollout, tokenizer, mesh, attention=kind, dtype=dtype)
    engine.load(load_weights(folder, model, param_shardings(model, mesh), jnp.dtype(dtype)))
    engine.warm_up()
    requests = workload(config, model.vocab_size, REQUESTS_A_SLOT * config.rollout.slots)
    _run(engine, [replace(request, max_tokens=2) for request in requests[: config.rollout.slots]])
    before, compiled, started = replace(engine.stats), compiles.programs, time.monotonic()
    _run(engine, requests)
    seconds, recompiles = time.monotonic() - started, compiles.programs - compiled
    stats = EngineStats(**{name: value - getattr(before, name) for name, value in asdict(engine.stats).items()})
    bandwidth = copy_bandwidth()
    return {
        "tokens_per_second": stats.tokens / seconds,
        "recompiles": recompiles,
        "seconds": seconds,
        "device_share": stats.device_seconds / seconds,
        "slot_use": stats.tokens / max(1, stats.slot_steps),
        "roofline_share": engine.bytes_read(stats) / bandwidth / max(stats.device_seconds, 1e-9),
        "copy_gb_per_second": bandwidth / 1e9,
        "engine": asdict(stats),
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "attention": kind,
        "versions": {"azr_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "config": asdict(config.rollout) | {"model": config.model, "dtype": dtype},
    }


def copy_bandwidth() -> float:
    """Bytes a second that one device reads and writes while it copies an array; the best of several tries."""
    x = jax.device_put(jnp.zeros(COPY_BYTES // 4, jnp.float32), jax.local_devices()[0])
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    times = []
    for _ in range(8):
        started = time.perf_counter()
        copy(x).block_until_ready()
        times.append(time.perf_counter() - started)
    return 2 * COPY_BYTES / min(times)


def _run(engine: Engine, requests: list[Request]) -> None:
    engine.submit(requests)
    while engine.busy:
        engine.step()
    engine.poll()


def bench_command(config: Config, as_json: bool, out: TextIO) -> int:
    """`azr-jax bench rollout`; returns the exit code."""
    found = measure(config)
    if as_json:
        out.write(json.dumps(found) + "\n")
        return 0
    shown = {
        "response tokens a second": f"{found['tokens_per_second']:.0f}",
        "device busy": f"{100 * found['device_share']:.0f} % of {found['seconds']:.1f} s",
        "slots in use": f"{100 * found['slot_use']:.0f} %",
        "share of the copy roofline": f"{100 * found['roofline_share']:.0f} % ({found['copy_gb_per_second']:.0f} GB/s)",
        "preempted sequences": str(found["engine"]["preempted"]),
        "programs compiled meanwhile": str(found["recompiles"]),
        "on": f"{found['devices']} x {found['device']}, attention {found['attention']}",
    }
    width = max(map(len, shown))
    out.write("".join(f"{name:<{width}}  {value}\n" for name, value in shown.items()))
    return 0
