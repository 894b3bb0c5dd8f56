"""Two processes that share a mesh make the same update as one: gloo on loopback, four devices each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from azr_jax.config import MeshConfig
from azr_jax.learn.state import init_state
from azr_jax.learn.step import make_update
from tests.compiling import xla_flags
from tests.learn.test_step import CONFIG, MODEL, mesh_of, packed, params_of

ROOT = Path(__file__).parents[2]
PROCESS = """
import os, sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file
from azr_jax.config import MeshConfig
from azr_jax.learn.state import init_state
from azr_jax.learn.step import make_update
from tests.learn.test_step import CONFIG, MODEL, mesh_of, packed, params_of

assert jax.process_count() == 2 and jax.device_count() == 8 and jax.local_device_count() == 4
mesh = mesh_of(MeshConfig(*map(int, sys.argv[4].split("x"))))
state = init_state(jax.tree.map(np.asarray, params_of()), CONFIG, MODEL, mesh)
update = make_update(CONFIG, MODEL, mesh)
arrays = {}
for step in (1, 2):
    state, metrics = update(state, packed(8))
    for name, tree in (("weight", state.params), ("moment", state.opt_state[1].mu)):
        leaves = jax.tree.leaves(multihost_utils.process_allgather(tree, tiled=True))
        arrays |= {f"{name}_{step}_{i}": np.ascontiguousarray(x) for i, x in enumerate(leaves)}
if jax.process_index() == 0:
    save_file(arrays | {name: np.array(value, np.float32) for name, value in metrics.items()}, sys.argv[3])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(program: str, *arguments: list[str]) -> None:
    """Two processes of four devices each: `program` gets an address for both, its own number, and its arguments."""
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"XLA_FLAGS": xla_flags(4, quick=True)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(i), *own],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, own in enumerate(arguments)
    ]
    said = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def test_the_same_update(tmp_path):
    mesh = "2x2x2"  # `data` runs across the processes, `fsdp` and `tensor` within
    out = tmp_path / "two.safetensors"
    run_two(PROCESS, [str(out), mesh], [str(out), mesh])
    shape = MeshConfig(*map(int, mesh.split("x")))
    state = init_state(jax.tree.map(jnp.copy, params_of()), CONFIG, MODEL, mesh_of(shape))
    update = make_update(CONFIG, MODEL, mesh_of(shape))
    two = load_file(out)
    metrics: dict[str, float] = {}
    for step in (1, 2):
        state, metrics = update(state, packed(8))
        moments, weights = (jax.tree.leaves(jax.device_get(x)) for x in (state.opt_state[1].mu, state.params))
        largest = max(np.abs(moment).max() for moment in moments)
        # The first moment after update 1 is the gradient, times a constant; it agrees to 3e-8 of its largest element.
        for i, moment in enumerate(moments):
            np.testing.assert_allclose(two[f"moment_{step}_{i}"], moment, rtol=0, atol=1e-6 * largest)
        # Adam divides an element by its own size: where the gradient all but vanishes (one of a key bias is 1e-6 of
        # the largest), its rounding becomes visible as a share of the step, which is 1e-3.
        for i, (moment, weight) in enumerate(zip(moments, weights, strict=True)):
            found, felt = two[f"weight_{step}_{i}"], np.abs(moment) > 1e-4 * largest
            np.testing.assert_allclose(found[felt], weight[felt], rtol=0, atol=1e-6)
            np.testing.assert_allclose(found, weight, rtol=0, atol=2e-5)
    for name, value in metrics.items():
        assert float(two[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
