"""Two processes share the learner's mesh and decode each on their own devices: every host says what one alone says."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.learn.state import param_shardings
from tests.learn.test_two_processes import run_two
from tests.rollout.engines import EOS, MODEL, SHORT, Letters, params_of, requests

PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from safetensors.numpy import save_file
from tests.rollout.test_two_processes import decoded

assert jax.process_count() == 2 and jax.device_count() == 8 and jax.local_device_count() == 4
# Hosts decode different numbers of requests: neither waits for the other.
save_file(decoded((2, 2, 2), 24 if jax.process_index() else 7), sys.argv[3])
"""


def decoded(mesh: tuple[int, int, int], count: int) -> dict[str, np.ndarray]:
    """Tokens and log-probabilities of the first `count` requests, on this host's part of the mesh."""
    from azr_jax.rollout.engine import Engine

    whole = make_mesh(MeshConfig(*mesh))
    engine = Engine(MODEL, SHORT, Letters(EOS), whole)  # type: ignore[arg-type]
    host = jax.tree.map(np.asarray, params_of())
    params = jax.tree.map(
        lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]),
        host,
        param_shardings(MODEL, whole),
    )
    completions = engine.generate(params, requests(24)[:count])
    assert {d.process_index for d in engine._device.mesh.devices.flat} == {jax.process_index()}
    tokens = {f"tokens_{i}": c.tokens for i, c in enumerate(completions)}
    return tokens | {f"logprobs_{i}": c.logprobs for i, c in enumerate(completions)}


def test_hosts_decode_alone_from_shared_weights(tmp_path: Path) -> None:
    run_two(PROCESS, *([str(tmp_path / f"{i}.safetensors")] for i in range(2)))
    alone = decoded((2, 2, 2), 24)
    for i, count in enumerate((7, 24)):
        found = load_file(tmp_path / f"{i}.safetensors")
        assert len(found) == 2 * count
        for name, value in found.items():
            if name.startswith("tokens"):
                np.testing.assert_array_equal(value, alone[name])
            else:
                np.testing.assert_allclose(value, alone[name], atol=1e-5)
