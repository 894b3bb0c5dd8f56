"""One optimizer step of ours is the same step in plain PyTorch (stored by tests/golden/make_update.py)."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from azr_jax.config import Config, LearnConfig, MeshConfig, RolloutConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.learn.packing import Trajectory, pack
from azr_jax.learn.prepare import token_weights
from azr_jax.learn.state import init_state, param_shardings
from azr_jax.learn.step import make_update
from azr_jax.models.config import ModelConfig
from azr_jax.models.weights import load_weights, save_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = [(5, 9), (3, 12), (8, 1), (2, 6), (11, 7)]  # these numbers stand in make_update.py, too
CONFIG = Config(
    rollout=RolloutConfig(temperature=0.8, max_prompt=12, max_response=12),
    learn=LearnConfig(
        lr=1e-3, beta2=0.95, weight_decay=0.1, grad_clip=0.5, clip_high=0.28, entropy_coef=0.01, rows=4, row_tokens=24
    ),
)


def test_the_step_is_torchs(tmp_path):
    stored = load_file(GOLDEN / "update" / "step.safetensors")
    trajectories = []
    for i, (prompt, response) in enumerate(SIZES):
        ids = stored[f"tokens_{i}"]
        assert len(ids) == prompt + response
        trajectories.append(Trajectory(ids[:prompt], ids[prompt:], stored[f"old_{i}"], 0.0, i))
    batch = pack(trajectories, stored["advantages"], 24, 4, 2, *token_weights(trajectories, CONFIG))
    model = ModelConfig.load(GOLDEN / "qwen2_untied")
    mesh = make_mesh(MeshConfig(1, 4, 2))
    params = load_weights(GOLDEN / "qwen2_untied", model, param_shardings(model, mesh))
    state, metrics = make_update(CONFIG, model, mesh)(init_state(params, CONFIG, model, mesh), batch)
    assert metrics["learner/loss"] == pytest.approx(float(stored["loss"]), abs=1e-5)
    assert metrics["learner/grad_norm"] == pytest.approx(float(stored["norm"]), rel=1e-5)
    assert metrics["learner/clip_low"] > 0 and metrics["learner/clip_high"] > 0
    save_weights(tmp_path, model, jax.device_get(state.params))
    ours = load_file(tmp_path / "model.safetensors")
    before = load_file(GOLDEN / "qwen2_untied" / "model.safetensors")
    for key, weight in ours.items():
        want = stored[f"after/{key}"]
        assert np.abs(want - before[key]).max() > 5e-4, "the step moved this weight"
        np.testing.assert_allclose(weight, want, atol=1e-5, err_msg=key)
