"""Loading and exporting a checkpoint of several gigabytes: time, bytes read, peak host memory.

    python benchmarks/load_weights.py --out benchmarks/results/load_weights.json [--size qwen2.5-1.5b] [--scratch /tmp]

Writes a random bfloat16 checkpoint of that size with a sharded index, then loads it in fresh processes: float32 and
bfloat16, on one device, on meshes of 8 (virtual CPU devices, whose memory is this process's), and with two processes
of 4 devices each, of which each reads its own shards only. For each: seconds on the clock and of the processor, bytes
asked of the files, and the rise of the resident set at its peak over the bytes of weights that the process then holds
(1.0 is no overhead at all; below it, virtual devices share the memory of what they hold alike).
`plain` is the yardstick of the same run: reading the same files with `safetensors.numpy.load_file`, one after
the other, in the checkpoint's dtype and layout and nothing else. The files are in the page cache in all cases.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from demo import machine

#: name: (dtype, mesh, processes)
CASES: dict[str, tuple[str, dict[str, int], int]] = {
    "bfloat16, one device": ("bfloat16", {"fsdp": 1}, 1),
    "float32, one device": ("float32", {"fsdp": 1}, 1),
    "float32, fsdp 8": ("float32", {"fsdp": 8}, 1),
    "float32, tensor 4 x fsdp 2": ("float32", {"fsdp": 2, "tensor": 4}, 1),
    "bfloat16, data 2 x fsdp 2 x tensor 2": ("bfloat16", {"data": 2, "fsdp": 2, "tensor": 2}, 1),
    "float32, fsdp 8 over two processes": ("float32", {"fsdp": 8}, 2),
}


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def load(folder: Path, case: str, process: int, address: str) -> dict[str, Any]:
    """One process of a case, in a fresh interpreter."""
    dtype, axes, processes = CASES[case]
    os.environ["JAX_PLATFORMS"] = "cpu"
    devices = int(np.prod(list(axes.values()))) // processes
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    if processes > 1:
        jax.distributed.initialize(address, processes, process)
    from azr_jax.config import MeshConfig
    from azr_jax.dist.mesh import make_mesh
    from azr_jax.learn.state import param_shardings
    from azr_jax.models import shards
    from azr_jax.models.config import ModelConfig
    from azr_jax.models.weights import load_weights

    asked = 0
    read = shards.Stored.read

    def counted(self: Any, index: Any = ()) -> np.ndarray:
        nonlocal asked
        piece = read(self, index)
        asked += piece.nbytes
        return piece

    shards.Stored.read = counted  # type: ignore[method-assign]
    config = ModelConfig.load(folder)
    shardings = param_shardings(config, make_mesh(MeshConfig(**{"fsdp": 1} | axes)))
    jax.block_until_ready(jax.device_put(np.zeros(1), jax.local_devices()[0]))
    before, started, busy = memory("VmRSS"), time.monotonic(), time.process_time()
    params = load_weights(folder, config, shardings, dtype)
    seconds, busy, peak = time.monotonic() - started, time.process_time() - busy, memory("VmHWM") - before
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "asked_gb": round(asked / 1e9, 3),
        "held_gb": round(held / 1e9, 3),
        "peak_gb": round(peak / 1e9, 3),
        "peak_over_held": round(peak / held, 3),
    }


def run(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)


def measure(folder: Path, case: str) -> list[dict[str, Any]]:
    """All processes of a case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs = [
        run("--load", str(folder), "--case", case, "--process", str(i), "--address", address)
        for i in range(CASES[case][2])
    ]
    texts = [job.communicate()[0] for job in jobs]
    assert not any(job.returncode for job in jobs), f"{case} failed"
    return [json.loads(text.splitlines()[-1]) for text in texts]


def write_random(folder: Path, size: str) -> dict[str, Any]:
    """A random bfloat16 checkpoint in files of at most 1 GB."""
    from azr_jax.models.shards import DTYPES
    from azr_jax.models.sizes import published_size
    from azr_jax.models.transformer import param_specs
    from azr_jax.models.weights import Piece, pieces_of, write_weights

    config = published_size(size)
    specs, rng = param_specs(config), np.random.default_rng(0)

    def fetch(piece: Piece) -> np.ndarray:
        spec: Any = specs
        for name in piece.path.split("/"):
            spec = spec[name]
        bits = rng.integers(0, 1 << 14, spec.shape[piece.layer is not None :], np.uint16)  # finite as bfloat16
        return bits.view(DTYPES["BF16"])

    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    dtypes = {piece.key: DTYPES["BF16"] for piece in pieces_of(config)}
    writer = write_weights(folder, config, dtypes, fetch, max_bytes=10**9)
    return {
        "size": size,
        "parameters": config.num_params,
        "files": len(writer.names),
        "gb": round(writer.size / 1e9, 3),
    }


def plain(folder: Path) -> dict[str, float]:
    """Reading all files with the library alone."""
    from safetensors.numpy import load_file

    started, busy = time.monotonic(), time.process_time()
    for file in sorted(folder.glob("*.safetensors")):
        load_file(file)
    return {"seconds": round(time.monotonic() - started, 2), "cpu_seconds": round(time.process_time() - busy, 2)}


def export(folder: Path, out: Path) -> dict[str, Any]:
    """Export in a fresh process, and whether every file came out byte-equal."""
    script = (
        "import json, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from load_weights import memory\nfrom azr_jax.export import export\n"
        "before, started, busy = memory('VmRSS'), time.monotonic(), time.process_time()\n"
        "export(sys.argv[2], Path(sys.argv[3]), 'as-loaded', 10**9)\n"
        "figures = {'seconds': round(time.monotonic() - started, 2)}\n"
        "figures |= {'cpu_seconds': round(time.process_time() - busy, 2)}\n"
        "print(json.dumps(figures | {'peak_gb': round((memory('VmHWM') - before) / 1e9, 3)}))"
    )
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), str(folder), str(out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    names = [file.name for file in sorted(folder.glob("model*"))]
    equal = all(subprocess.run(["cmp", "-s", folder / name, out / name]).returncode == 0 for name in names)
    return json.loads(done.stdout.splitlines()[-1]) | {"byte_equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/load_weights.json"))
    parser.add_argument("--size", default="qwen2.5-1.5b")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    for name in ("load", "case", "process", "address"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(Path(args.load), args.case, int(args.process), args.address)))
        return
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        folder = scratch / "model"
        folder.mkdir()
        result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
        result["checkpoint"] = write_random(folder, args.size)
        plain(folder)  # into the page cache
        result["plain"] = plain(folder)
        result["load"] = {case: measure(folder, case) for case in CASES}
        result["export"] = export(folder, scratch / "out")
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(result, indent=2))
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
