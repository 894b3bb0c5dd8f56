"""Small engines, requests and comparisons for the tests beside this file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from azr_jax.config import MeshConfig, RolloutConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Params, Spec, param_specs
from azr_jax.rollout import sizing
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Completion, Request, request_key

MODEL = ModelConfig(64, 32, 64, 2, 4, 2, 8)
#: Two padded lengths of prompts; a response takes up to five pages.
SHORT = RolloutConfig(max_prompt=12, max_response=24, slots=16, block=4, page=8)
#: Longer than a chunk of the working copy: two widths of table.
LONG = RolloutConfig(max_prompt=24, max_response=480, slots=4, block=16, page=32)
ONE = MeshConfig(1, 1, 1)
EOS = frozenset({3, 9, 22, 40})  # about half of the short responses end with one of them


class Letters:
    """Stands in for the tokenizer: token i is one of some letters, end-of-sequence and `silent` ids are nothing."""

    pad_id = 0

    def __init__(self, eos_ids: frozenset[int], letters: str = "abcd", silent: Iterable[int] = ()) -> None:
        self.eos_ids, self.letters = eos_ids, letters
        self.silent = eos_ids | set(silent)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.letters[i % len(self.letters)] for i in ids if i not in self.silent)


@cache
def params_of(seed: int = 5) -> Params:
    """Random weights whose distributions are neither flat nor certain."""
    rng = np.random.default_rng(seed)

    def made(spec: Spec) -> jax.Array:
        return jnp.asarray((spec.init == "ones") + 0.2 * rng.normal(size=spec.shape), jnp.float32)

    params: Params = jax.tree.map(made, param_specs(MODEL), is_leaf=lambda x: isinstance(x, Spec))
    return params | {"final_norm": 0.8 * params["final_norm"]}


@cache
def _programs(*_: Any) -> dict[Any, Any]:
    """Compiled programs of engines that are alike: compiling takes far longer than anything else here."""
    return {}


def engine(
    config: RolloutConfig = SHORT,
    eos: frozenset[int] = EOS,
    mesh: MeshConfig = ONE,
    stop: tuple[str, ...] = (),
    kind: str = "working",
    tokenizer: Any = None,
    banned: tuple[int, ...] = (),
    compiled: bool = True,
) -> Engine:
    """A new engine: no requests, no weights, an empty cache. compiled=False: nor any programs of those before it."""
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    made = Engine(MODEL, config, tokenizer or Letters(eos), make_mesh(mesh, devices), stop)
    device = made._device
    device.kind = kind
    device.widths = sizing.table_widths(config, kind)
    if banned:
        made.ban(np.isin(np.arange(MODEL.vocab_size), banned))
    if compiled:
        device._programs = _programs(config, eos, mesh, kind, bool(banned))
    return made


def requests(count: int, temperature: float = 1.0, longest: int = 6, **others: Any) -> list[Request]:
    """Prompts of 1 to `longest` tokens; every third repeats an earlier one with another key."""
    rng = np.random.default_rng(0)
    made: list[Request] = []
    for i in range(count):
        prompt = tuple(int(t) for t in rng.integers(0, 64, rng.integers(1, longest + 1)))
        if i % 3 == 2:
            prompt = made[int(rng.integers(0, i))].prompt
        made.append(Request(prompt, request_key(0, "test", i), temperature, id=i, **others))
    return made


def finish(engine: Engine) -> dict[object, Completion]:
    """Step until nothing is under way."""
    done = {}
    while engine.busy:
        engine.step()
        done |= engine.poll()
    return done


def assert_same(got: Sequence[Completion], want: Sequence[Completion], atol: float = 0.0) -> None:
    """Tokens and endings exactly; log-probabilities to `atol`, by default bit for bit."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=atol, rtol=0)
        assert a.finish == b.finish
