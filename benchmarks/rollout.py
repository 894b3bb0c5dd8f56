"""Tokens a second of the rollout engine against `transformers` and google-tunix, on lengths from a heavy tail.

    python -m venv tunixenv && tunixenv/bin/pip install google-tunix==0.1.7     # anywhere; the peer that uses JAX
    pip install torch==2.13.0                                                   # the CPU build, for the other peer
    python benchmarks/rollout.py --tunix-python tunixenv/bin/python --out benchmarks/results/rollout.json

All sides decode the same random weights (one Hugging Face folder), prompts and lengths with as many rows: greedily,
each request to its own length, drawn from a log-normal with a median of a sixteenth of the longest. Only tokens of
responses count. Each side runs in an interpreter of its own, all in turns and `--rounds` times, because machines drift;
loading and compiling are not counted but reported. `same` is the share of requests whose first 32 tokens are those of
`transformers`: with these weights a token depends on all before it, so that says that all compute the same. What each
peer is given is described in rollout_peers.py. All prompts differ, so sharing of prefixes helps nobody.

--gpu-shapes SIZE: the shape of a published Qwen2 model (qwen2.5-3b, ...) in bfloat16, and everything on a GPU; with
--slots 128 256 512, --longest 4096 and some requests more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from demo import machine
from rollout_peers import SIDES, Generate, report

SHAPE: dict[str, Any] = {"model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 16384}
SHAPE |= {"max_position_embeddings": 4096, "tie_word_embeddings": True, "rope_theta": 1e6}
NEEDS = {
    "transformers": "pip install torch==2.13.0 transformers",
    "transformers_continuous": "pip install torch==2.13.0 transformers",
    "tunix": "pip install google-tunix==0.1.7 in an environment of its own, then --tunix-python its interpreter",
}
COMPARED = 32  # tokens; much later, rounding alone may have turned one
SPREAD = 1.0  # of the logarithm of a length


def workload(requests: int, slots: int, longest: int, seed: int) -> dict[str, Any]:
    """Prompts of 16 tokens to a quarter of the longest response, responses of 4 tokens to the longest."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(longest / 16), SPREAD, requests), 4, longest).astype(int)
    widths = np.clip(rng.lognormal(np.log(longest / 16), SPREAD / 2, requests), 16, longest // 4).astype(int)
    prompts = [rng.integers(1, SHAPE["vocab_size"], n).tolist() for n in widths]  # 0 is the peers' padding
    sizes = {"slots": slots, "longest": longest, "longest_prompt": longest // 4}
    return sizes | {"prompts": prompts, "lengths": lengths.tolist()}


def write_model(folder: Path, size: str | None) -> int:
    """Random weights as a Hugging Face folder; the number of parameters.

    Blocks are drawn wide enough that they, not the embedding of the last token, decide the next one.
    """
    from azr_jax.models.config import ModelConfig
    from azr_jax.models.shards import DTYPES
    from azr_jax.models.sizes import published_size
    from azr_jax.models.transformer import param_specs
    from azr_jax.models.weights import Piece, pieces_of, write_weights

    config = published_size(size) if size else ModelConfig.from_hf(SHAPE, "here")
    dtype, rng = DTYPES["BF16" if size else "F32"], np.random.default_rng(0)
    specs = param_specs(config)

    def fetch(piece: Piece) -> np.ndarray:
        kind, _, name = piece.path.rpartition("/")
        spec = specs[kind][name] if kind else specs[name]
        shape = spec.shape[piece.layer is not None :]
        if spec.init != "normal":
            return np.full(shape, float(spec.init == "ones"), np.float32)
        scale = 0.02 if piece.layer is None else config.hidden_size**-0.5
        return scale * rng.standard_normal(shape, np.float32)

    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    write_weights(folder, config, {piece.key: dtype for piece in pieces_of(config)}, fetch)
    return config.num_params


def ours(folder: Path, work: dict[str, Any]) -> tuple[Generate, Callable[[], dict[str, Any]]]:
    """The engine."""
    from azr_jax.config import MeshConfig, RolloutConfig
    from azr_jax.dist.mesh import make_mesh
    from azr_jax.learn.state import param_shardings
    from azr_jax.models.attention_choice import choose_attention
    from azr_jax.models.config import ModelConfig
    from azr_jax.models.weights import load_weights
    from azr_jax.rollout.engine import Engine
    from azr_jax.rollout.request import Request

    class Ids:
        """Stands in for the tokenizer: no token ends a response."""

        eos_ids = frozenset({-1})
        pad_id = 0

    model, mesh = ModelConfig.load(folder), make_mesh(MeshConfig())
    kind = choose_attention("auto", head_dim=model.head_dim, dtype=work["dtype"], windows=False)
    sizes = {"max_prompt": work["longest_prompt"], "max_response": work["longest"], "slots": work["slots"]}
    if work["device"] == "cpu":  # a CPU gains nothing from more prompts at once, and slots become free one by one
        sizes["prefill_tokens"] = work["longest_prompt"]
    engine = Engine(model, RolloutConfig(**sizes), Ids(), mesh, attention=kind, dtype=work["dtype"])  # type: ignore[arg-type]
    engine.load(load_weights(folder, model, param_shardings(model, mesh), work["dtype"]))
    engine.warm_up()

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        engine.submit(
            Request(tuple(prompt), (0, index), temperature=0.0, max_tokens=length, id=index)
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )
        done: dict[object, Any] = {}
        while engine.busy:
            engine.step()
            done |= engine.poll()
        return [done[index].tokens.tolist() for index in range(len(prompts))]

    return generate, lambda: asdict(engine.stats)


def in_a_process(name: str, python: str, folder: Path, device: str) -> dict[str, Any]:
    """Figures of one side in a fresh interpreter."""
    script = Path(__file__).with_name("rollout_peers.py") if name in SIDES else Path(__file__)
    environment = {"HF_HUB_OFFLINE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
    environment["JAX_PLATFORMS"] = device
    side = [name] if name in SIDES else ["--side"]
    done = subprocess.run([python, script, *side, folder], capture_output=True, text=True, env=environment)
    if done.returncode and name == "ours":
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    if done.returncode:  # out of memory, say: the others are still worth measuring
        return {"absent": f"failed: {done.stderr.splitlines()[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def rounds_of(folder: Path, pythons: dict[str, str], device: str, count: int) -> dict[str, list[dict[str, Any]]]:
    """Figures of every side, taken in turns; a side that is absent has one entry that says so."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for number in range(count):
        for name, python in pythons.items():
            if found[name] and "absent" in found[name][0]:
                continue
            figures = in_a_process(name, python, folder, device)
            found[name].append(figures)
            said = figures.get("absent") or f"{figures['tokens_per_second']:.1f} tokens/s"
            sys.stderr.write(f"round {number + 1} of {count}, {name}: {said}\n")
    return found


def summary(found: dict[str, list[dict[str, Any]]], work: dict[str, Any]) -> dict[str, Any]:
    """What a number of slots gave: each side with all its rounds, and ours over the better of the two samplers."""
    present = {name: rounds for name, rounds in found.items() if "absent" not in rounds[0]}
    reference = present.get("transformers", present["ours"])[0]["outputs"]
    sides: dict[str, Any] = {}
    for name, rounds in found.items():
        if name not in present:
            sides[name] = rounds[0] | {"needs": NEEDS[name]}
            continue
        starts = [[output[:COMPARED] for output in outputs] for outputs in (rounds[0]["outputs"], reference)]
        best = max(rounds, key=lambda figures: figures["tokens_per_second"])
        sides[name] = {
            "tokens_per_second": best["tokens_per_second"],
            "rounds": [round(figures["tokens_per_second"], 2) for figures in rounds],
            "cpu_seconds": [round(figures["cpu_seconds"], 2) for figures in rounds],
            "same": statistics.mean(a == b for a, b in zip(*starts, strict=True)),
        }
        sides[name] |= {key: value for key, value in best.items() if key not in sides[name] | {"outputs": 0}}
    sides["ours"]["breakdown"] = breakdown(sides["ours"])
    speed = {name: side["tokens_per_second"] for name, side in sides.items() if name in present}
    ratio = {name: speed["ours"] / theirs for name, theirs in speed.items() if name != "ours"}
    samplers = [ratio[name] for name in ("transformers", "tunix") if name in ratio]
    better = min(samplers) if samplers else None
    return {"slots": work["slots"], "sides": sides, "ratio": ratio, "ratio_to_better_sampler": better}


def breakdown(side: dict[str, Any]) -> dict[str, float]:
    """Where the engine's time went, as shares of all of it."""
    counted, seconds = side["counters"], side["seconds"]
    return {
        "device_busy": counted["device_seconds"] / seconds,
        "host_waits": counted["wait_seconds"] / seconds,
        "plan": counted["plan_seconds"] / seconds,
        "launch": counted["launch_seconds"] / seconds,
        "read": counted["read_seconds"] / seconds,
        "prompts": side["one_token_seconds"] / seconds,  # of generating one token each; everything is compiled by then
        "slots_in_use": counted["tokens"] / counted["slot_steps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[16], help="rows decoded together, each number in turn")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=1024, help="most tokens of a response")
    parser.add_argument("--rounds", type=int, default=2, help="the best of them counts")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths")
    parser.add_argument("--tunix-python", default=sys.executable, help="an interpreter that has google-tunix")
    parser.add_argument("--gpu-shapes", metavar="SIZE", help="measure this published size on a GPU")
    parser.add_argument("--json", action="store_true", help="print the whole record instead of a table")
    parser.add_argument("--out", type=Path, help="also write the record to this file")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return report(ours, args.side)
    device = "cuda" if args.gpu_shapes else "cpu"
    dtype = "bfloat16" if args.gpu_shapes else "float32"
    pythons = {"ours": sys.executable} | dict.fromkeys(SIDES, sys.executable) | {"tunix": args.tunix_python}
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_model(folder, args.gpu_shapes)
        for slots in args.slots:
            work = workload(args.requests, slots, args.longest, args.seed)
            (folder / "work.json").write_text(json.dumps(work | {"device": device, "dtype": dtype}))
            results.append(summary(rounds_of(folder, pythons, device, args.rounds), work))
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/rollout.py", *sys.argv[1:]]),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "parameters": parameters,
        "dtype": dtype,
        "workload": described(work),
        "results": results,
    }
    text = json.dumps(record, indent=1) + "\n"
    sys.stdout.write(text if args.json else table(results))
    if args.out:
        args.out.write_text(text)


def described(work: dict[str, Any]) -> dict[str, Any]:
    """The lengths of a workload in figures."""
    prompts, lengths = [len(prompt) for prompt in work["prompts"]], work["lengths"]
    kinds = {"prompts": prompts, "responses": lengths}
    return {"requests": len(lengths)} | {
        name: {"tokens": sum(some), "median": statistics.median(some), "longest": max(some)}
        for name, some in kinds.items()
    }


def table(results: list[dict[str, Any]]) -> str:
    """For people."""
    lines = ["slots  side                      tokens/s  ours is   CPU s  same"]
    for result in results:
        for name, side in result["sides"].items():
            if "absent" in side:
                lines.append(f"{result['slots']:5}  {name:24}  absent: {side['absent']}; {side['needs']}")
                continue
            figures = f"{side['tokens_per_second']:8.1f}  {result['ratio'].get(name, 1):6.2f}x  "
            figures += f"{min(side['cpu_seconds']):6.1f}  {side['same']:.0%}"
            lines.append(f"{result['slots']:5}  {name:24}  {figures}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
