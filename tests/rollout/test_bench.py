"""`azr-jax bench rollout`: figures of a run that compiled nothing and decoded what was drawn."""

from __future__ import annotations

import io
import json

from azr_jax.config import Config, MeshConfig, RolloutConfig
from azr_jax.rollout.bench import REQUESTS_A_SLOT, bench_command, workload

CONFIG = Config(
    rollout=RolloutConfig(max_prompt=32, max_response=16, slots=8, block=4, page=16, prefill_tokens=64),
    mesh=MeshConfig(1, 0, 1),
)


def test_figures_add_up() -> None:
    out = io.StringIO()
    assert bench_command(CONFIG, True, out) == 0
    found = json.loads(out.getvalue())
    wanted = workload(CONFIG, 151, REQUESTS_A_SLOT * 8)
    assert len({request.max_tokens for request in wanted}) > 4
    assert found["engine"]["sequences"] == len(wanted)
    assert found["engine"]["tokens"] == sum(request.max_tokens or 0 for request in wanted)
    assert found["recompiles"] == 0
    assert 0 < found["slot_use"] <= 1 and 0 < found["device_share"] <= 1
    assert found["tokens_per_second"] > 0 and found["roofline_share"] > 0
    assert {"device", "versions", "config"} <= found.keys()
