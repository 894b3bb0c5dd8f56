"""Every config for a TPU slice, cut small, through the TPU compiler: its heads, mesh, kernels, pages and slots compile.

What is cut, so that all of them take two minutes: depth (two layers for a prefill, which leaves most of the last one
out, one for decoding, three for an update, which loops over them), hidden and feed-forward width, vocabulary; prompts,
responses and rows to a few hundred tokens; an update takes random bits from the chip, not from Threefry. Whole ones
take up to an hour: `make plan-all`.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from azr_jax import plan_compile
from azr_jax.config_loader import load_config
from azr_jax.plan import make_plan, shape_of
from azr_jax.plan_estimate import PROGRAMS, Setup
from benchmarks.plan_all import CONFIGS as FOLDER
from benchmarks.plan_all import planned_configs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed; the extra `tpu` brings it",
)

TARGETS = {name: target for name, target in planned_configs() if target.chip.platform == "tpu"}
LAYERS = 3  # of an update: a number that no other dimension has
NARROW = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512}


def twins() -> dict[str, list[str]]:
    """Configs that differ in their weights alone, a base model's and its Coder's; by the first of them."""
    found = defaultdict(list)
    for name in TARGETS:
        found[name.replace("-coder", "")].append(name)
    return {names[0]: names for names in found.values()}


def small(name: str, layers: int, tokens: int = 256) -> Setup:
    """With prompts and responses of at most so many tokens, and rows for one of each."""
    keys = ("rollout.max_prompt", "rollout.max_response", "rollout.prefill_tokens", "learn.row_tokens")
    lengths = (tokens, tokens, tokens, 2 * tokens)
    config = load_config(FOLDER / f"{name}.yaml", [f"{key}={length}" for key, length in zip(keys, lengths)])
    model = shape_of(config.model)
    cut = replace(model, **NARROW, num_layers=layers, sliding_layers=model.sliding_layers[:layers])
    return Setup(config, cut, TARGETS[name])


@pytest.fixture(autouse=True)
def kept_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is read from or left in the user's folder."""
    monkeypatch.setenv(plan_compile.CACHE_VARIABLE, str(tmp_path))


@pytest.mark.parametrize("name", twins())
def test_a_config_compiles_for_its_slice(name):
    for program in ("prefill", "decode"):
        setup = small(name, 2 if program == "prefill" else 1)
        found = plan_compile.compiled(setup, program)
        expected = setup.bytes_of(program)
        if program == "prefill":  # of the last of two layers it takes what makes keys and values
            assert expected.argument / 2 < found["argument_bytes"] < 1.05 * expected.argument
        else:
            assert found["argument_bytes"] == pytest.approx(expected.argument, rel=0.05)
        assert found["alias_bytes"] == pytest.approx(expected.alias, rel=0.05)  # the cache is written in place
        assert (setup.host_mesh.shape["tensor"] > 1) == bool(found["collectives"])
    for twin in twins()[name]:  # whose programs are the same, so that a plan finds them compiled
        keys = [plan_compile._key(small(each, 1), program) for program in PROGRAMS for each in (name, twin)]
        assert len(set(keys)) == len(PROGRAMS)


@pytest.mark.parametrize("name", twins())
def test_an_update_compiles_for_its_slice(name):
    setup = small(name, LAYERS, tokens=64)
    with jax.default_prng_impl("rbg"):  # Threefry would be a third of the work, for the rounding of moments
        done, text = plan_compile.compile_to_text(plan_compile.lower(setup, "update"))
    memory, expected = plan_compile.memory_of(done, "tpu"), setup.bytes_of("update")
    assert memory["argument"] == pytest.approx(expected.argument, rel=0.05)
    assert memory["alias"] == pytest.approx(expected.alias, rel=0.05)  # the state is given up
    gathers = re.findall(r" = (.*?) all-gather(?:-start)?\(", text)
    sizes = [int(first) for types in gathers for first in re.findall(r"(?:bf16|f32)\[(\d+),", types)]
    assert 1 in sizes and LAYERS not in sizes  # weights are gathered, and never those of all layers at once
    whole = f"[1,{setup.row_tokens},{NARROW['hidden_size']}]"  # tokens of a row, of which a chip has a share
    kinds = {found for types in gathers for found in re.findall(r"(bf16|f32)" + re.escape(whole), types)}
    assert kinds == ({"bf16"} if setup.mesh.shape["tensor"] > 1 else set())


def test_temporaries_are_what_the_compiler_sets_aside(tmp_path):
    """For a program with the update's outline: weights given up, and gradients added up over layers in a loop."""

    def update(weights, x, count):
        def loss(weights):
            layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
            return jnp.sum(jax.lax.scan(layer, x, weights)[0])

        def add(_, total):
            return total + jax.grad(loss)(weights.astype(jnp.bfloat16)).astype(jnp.float32)

        total = jax.lax.fori_loop(0, count, add, jnp.zeros(weights.shape))
        return weights - total * jnp.where(jnp.linalg.norm(total) > 1, 1.0, 2.0)

    chip = plan_compile._devices(small("qwen2.5-7b_v5e-16", 1), "v5e:2x2")[0]
    on_chip = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(chip))
    arguments = on_chip((32, 2048, 2048), jnp.float32), on_chip((2048, 2048), jnp.bfloat16), on_chip((), jnp.int32)
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    done = jax.jit(update, donate_argnums=0).lower(*arguments).compile(compiler_options=options)
    written = next(tmp_path.glob("*buffer-assignment.txt")).read_text()
    in_hbm = re.findall(r"allocation \d+: size (\d+), preallocated-temp", written)  # other memory has a color
    memory = plan_compile.memory_of(done, "tpu")
    assert memory["alias"] == memory["output"] == 2**29
    assert memory["temp"] == pytest.approx(int(in_hbm[0]), abs=2**20)


def test_a_plan_for_a_slice(monkeypatch):
    """What comes out of the command, for programs that fit and one that the compiler finds too large."""
    name = "qwen2.5-7b_v5e-16"
    setup = small(name, 1)
    monkeypatch.setattr("azr_jax.plan.shape_of", lambda _: setup.model)
    sizes = {"argument_bytes": 2**30, "temp_bytes": 2**20, "output_bytes": 2**30, "alias_bytes": 2**30}
    rest = {"collectives": {"all-gather": 7}, "compile_seconds": 3.5, "cached": False}
    monkeypatch.setattr("azr_jax.plan_compile.compiled", lambda setup, program: sizes | rest)
    record = make_plan(setup.config, setup.target)
    assert record["fits"] and record["attention"] == "splash" and record["learner_mesh"]["fsdp"] == 4
    for program in PROGRAMS:
        held = 0 if program == "update" else record["learner_resident_bytes"]
        assert record[program]["compiled"] and record[program]["peak_bytes"] == 2**30 + 2**20 + held
    needed = 20.5 * 2**30
    monkeypatch.setattr("azr_jax.plan_compile.compiled", lambda setup, program: rest | {"needed_bytes": needed})
    record = make_plan(setup.config, setup.target)
    assert not record["fits"] and record["update"]["peak_bytes"] == needed
