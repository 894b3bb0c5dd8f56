"""Planned memory against real memory, on this CPU: runs the update and looks at how far the process grew.

    python benchmarks/plan_check.py --out benchmarks/results/plan_check.json

For each case a process of its own makes a state and a batch, compiles the update, gives back what compiling took, and
runs two updates; the growth is the kernel's high-water mark (VmHWM, reset before) less what was resident before the
state was made. Compared with it: the compiler's bytes (arguments + temporaries + outputs - aliased) and plan's
arithmetic. The allocator keeps freed memory, so the growth may be short of the truth by some MiB. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from result import about, write

from azr_jax.config import Config, LearnConfig, RolloutConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.learn.packing import Trajectory, pack
from azr_jax.learn.state import init_state
from azr_jax.learn.step import make_update, place
from azr_jax.models.attention import attend
from azr_jax.models.transformer import init_params
from azr_jax.plan import shape_of
from azr_jax.plan_estimate import Setup
from azr_jax.plan_hardware import parse_target

MIB = 2**20
CASES: dict[str, dict[str, Any]] = {
    "embedded, 8 rows of 160": {"rows": 8, "row_tokens": 160, "remat": "none"},
    "embedded, 8 rows of 2,048": {"rows": 8, "row_tokens": 2048, "remat": "none"},
    "embedded, 8 rows of 2,048, remat block": {"rows": 8, "row_tokens": 2048, "remat": "block"},
    "12 layers of width 768, 2 rows of 1,024": {"rows": 2, "row_tokens": 1024, "remat": "block", "wide": True},
    "12 layers of width 768, 2 rows of 1,024, bfloat16 moments": {
        "rows": 2, "row_tokens": 1024, "remat": "block", "wide": True, "moments_dtype": "bfloat16",
    },
}  # fmt: skip


def resident(field: str) -> float:
    """MiB of this process, `VmRSS` or `VmHWM`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def settle() -> None:
    """Give freed memory back to the system, and forget the high-water mark."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(case: dict[str, Any]) -> dict[str, float]:
    """One case in this process; MiB."""
    case = dict(case)
    model = shape_of("embedded")
    if case.pop("wide", False):
        model = replace(
            model, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=64
        )
    config = Config(rollout=RolloutConfig(max_prompt=96, max_response=64), learn=LearnConfig(**case))
    setup = Setup(config, model, parse_target("cpu"))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    update = make_update(config, model, mesh, attend=partial(attend, kind="xla", mesh=mesh))
    rng = np.random.default_rng(0)
    one = Trajectory(
        rng.integers(1, 64, 96, np.int32), rng.integers(1, 64, 64, np.int32), np.full(64, -3, np.float32), 1.0, 0
    )
    count = setup.rows * (setup.row_tokens // 160)
    batch = pack([one] * count, [1.0] * count, setup.row_tokens, setup.rows, setup.micro_batches_at_most)
    build = jax.eval_shape(lambda: init_state(init_params(model, 0), config, model, mesh))
    arrays = jax.eval_shape(lambda: place(batch, mesh))
    memory = update.compiled.lower(build, arrays, np.int32(1), np.float32(1), None).compile().memory_analysis()  # type: ignore[attr-defined]
    state = init_state(init_params(model, 0), config, model, mesh)
    state, _ = update(state, batch)  # compiles; what that leaves behind is not the program's
    del state
    settle()
    before = resident("VmRSS")
    state = init_state(init_params(model, 0), config, model, mesh)
    state, _ = update(state, batch)
    state, _ = update(state, batch)
    grown = resident("VmHWM") - before
    parts = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
    planned = (sum(parts) - memory.alias_size_in_bytes) / MIB
    return {"grown": grown, "compiler": planned, "shapes": setup.bytes_of("update").total / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write all cases to this JSON file")
    parser.add_argument("--case", help="measure one case in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(CASES[args.case])))
        return
    found = []
    for name in CASES:
        run = subprocess.run([sys.executable, __file__, "--case", name], capture_output=True, text=True, check=True)
        sizes = json.loads(run.stdout.splitlines()[-1])
        errors = {f"{kind}_error": round(sizes[kind] / sizes["grown"] - 1, 3) for kind in ("compiler", "shapes")}
        found.append({"case": name} | {f"{kind}_mib": round(size, 1) for kind, size in sizes.items()} | errors)
        print(json.dumps(found[-1]), flush=True)
    if args.out:
        write(args.out, about() | {"cases": found})


if __name__ == "__main__":
    main()
