"""Planning: what is known of hardware, bytes and flops against independent counts, compiling for TPUs, verdicts."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from azr_jax import plan_compile
from azr_jax.chips import CHIPS, GIB
from azr_jax.cli import build_parser, main
from azr_jax.config import Config, LearnConfig, MeshConfig, RolloutConfig
from azr_jax.config_loader import load_config
from azr_jax.dist.mesh import make_mesh
from azr_jax.errors import ConfigError, UserError
from azr_jax.learn.state import init_state
from azr_jax.models.sizes import SIZES, published_size
from azr_jax.models.transformer import init_params
from azr_jax.plan import make_plan, render, shape_of
from azr_jax.plan_collectives import collectives
from azr_jax.plan_estimate import PROGRAMS, Setup
from azr_jax.plan_hardware import accelerator_type, known_targets, parse_target
from azr_jax.rollout.device import Device
from azr_jax.rollout.weights import decode_mesh
from benchmarks.plan_all import PAGE, planned_configs, with_tables

ROOT = Path(__file__).parents[1]
CONFIGS = dict(planned_configs())
CONTRACT = {"argument_bytes", "temp_bytes", "output_bytes", "peak_bytes", "flops", "bytes_accessed"}
CONTRACT |= {"compile_seconds", "roofline_seconds"}


@pytest.fixture(autouse=True)
def kept_results(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is read from or left in the user's folder."""
    folder = tmp_path_factory.mktemp("plans")
    monkeypatch.setenv(plan_compile.CACHE_VARIABLE, str(folder))
    return folder


# Hardware


@pytest.mark.parametrize(
    ("text", "name", "kind", "chips", "hosts", "host"),
    [
        ("v5e:2x4", "v5e:2x4", "v5litepod-8", 8, 1, "v5e:2x4"),
        ("v5e-16", "v5e:4x4", "v5litepod-16", 16, 4, "v5e:2x2"),
        ("v5litepod-64", "v5e:8x8", "v5litepod-64", 64, 16, "v5e:2x2"),
        ("v6e:2x4", "v6e:2x4", "v6e-8", 8, 1, "v6e:2x4"),
        ("v5p:2x2x1", "v5p:2x2x1", "v5p-8", 4, 1, "v5p:2x2x1"),
        ("v5p-16", "v5p:2x2x2", "v5p-16", 8, 2, "v5p:2x2x1"),
    ],
)
def test_slices(text, name, kind, chips, hosts, host):
    target = parse_target(text)
    assert (target.name, accelerator_type(target), target.chips, target.hosts) == (name, kind, chips, hosts)
    assert target.host_name == host


def test_every_name_means_one_target():
    for target in known_targets():
        assert parse_target(target.name) == target == parse_target(accelerator_type(target))
        assert target.chips == target.hosts * target.host_chips
    assert parse_target("cpu").chips == parse_target("h200:1").chips == 1


@pytest.mark.parametrize("text", ["v5e", "v5e:3x3", "v5e-5", "h200", "h200:3", "a100:1", "", "v5e:4x4x1"])
def test_unknown_topology_exits_2_with_the_list(text, capsys):
    assert main(["plan", str(ROOT / "configs/tiny.yaml"), "--topology", text]) == 2
    message = capsys.readouterr().err
    assert "v5e:4x4" in message and "h200:1" in message and "cpu" in message and "Traceback" not in message


def test_topologies_are_those_of_the_compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu")
    for text in ("v5e-16", "v6e-8", "v5p-16"):
        target = parse_target(text)
        setup = Setup(Config(), shape_of("embedded"), target)
        assert len(plan_compile._devices(setup, target.name)) == target.chips
        assert len(plan_compile._devices(setup, target.host_name)) == target.host_chips


# Arithmetic


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_state_of_a_chip_is_what_lies_on_a_device(sizes, moments):
    model = shape_of("embedded")
    config = Config(learn=LearnConfig(moments_dtype=moments), mesh=MeshConfig(*sizes))
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    state = init_state(init_params(model, 0), config, model, mesh)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state) if x.ndim)
    assert Setup(config, model, parse_target("v5e-8")).resident == held


def test_flops_are_those_that_xla_counts():
    """In the sampler's programs layers stand one after the other, and the loop over tokens is counted once."""
    rollout = RolloutConfig(max_prompt=64, max_response=64, slots=4, prefill_tokens=256, page=32)
    model = replace(shape_of("embedded"), num_layers=2)
    setup = Setup(Config(rollout=rollout), model, parse_target("cpu"))
    for program, calls in (("prefill", 1), ("decode", rollout.block)):
        counted = plan_compile.lower(setup, program).compile().cost_analysis()["flops"]
        assert setup.work_of(program)[0] / calls == pytest.approx(counted, rel=0.2), program


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(SIZES)),
    st.sampled_from(known_targets()),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
    st.integers(1, 512),
)
def test_sums_hold_for_any_model_and_slice(name, target, dtype, offload, slots):
    config = Config(learn=LearnConfig(dtype=dtype, offload=offload), rollout=RolloutConfig(slots=slots))
    setup = Setup(config, published_size(name), target)
    for program in PROGRAMS:
        found = setup.bytes_of(program)
        assert min(found.argument, found.temp, found.output) > 0 and found.total >= found.argument
        assert setup.roofline(program) > 0
    assert setup.starved or setup.resident + setup.copy + setup.cache <= target.chip.usable
    kept = replace(config, learn=replace(config.learn, offload=False, moments_dtype="bfloat16"))
    full = replace(kept, learn=replace(kept.learn, moments_dtype="float32"))
    resident = [Setup(each, setup.model, target).resident for each in (kept, full)]
    assert resident[1] == pytest.approx(1.5 * resident[0])
    assert setup.resident <= resident[1]


def test_a_larger_cache_decodes_more_at_once_until_slots_are_full():
    config = Config(learn=LearnConfig(dtype="bfloat16"), rollout=RolloutConfig(slots=64, page=128))
    model = published_size("qwen2.5-7b")
    active = []
    for size in (0.3, 0.6, 1.2, 2.4):
        rollout = replace(config.rollout, cache_gb=size)
        active.append(Setup(replace(config, rollout=rollout), model, parse_target("v5e-8")).active)
    assert active == sorted(active) and active[0] < active[-1] == 64


@pytest.mark.parametrize("name", ["debug_cpu", "tiny"])
@pytest.mark.parametrize("room", ["0.00001", "1", "0"])  # 0: what is free
def test_a_planned_cache_is_the_engines(name, room):
    config = load_config(ROOT / f"configs/{name}.yaml", [f"rollout.cache_gb={room}"])
    model = shape_of(config.model)
    setup = Setup(config, model, parse_target("cpu"))
    mesh = decode_mesh(model, jax.devices()[:1])
    device = Device(model, config.rollout, mesh, setup.slots, frozenset({0}), setup.attention, setup.dtype)
    assert setup.starved == (room == "0.00001")
    if setup.starved:
        with pytest.raises(UserError, match="one sequence"):
            _ = device.layout
    else:
        assert setup.layout == device.layout


def test_a_block_of_decoding_reads_the_weights_and_the_live_cache_at_every_token():
    """Qwen2.5-7B by hand: 28 layers, width 3584, 28 heads and 4 key heads of 128, feed-forward 18944, untied."""
    width, kv, heads, wide, table = 3584, 4 * 128, 28 * 128, 18944, 152064 * 3584
    split = 28 * (2 * width * (heads + kv) + heads + 2 * kv + 3 * width * wide) + 2 * table  # over tensor
    copy = 2 * (split / 4 + (2 * 28 + 1) * width)  # bfloat16 on four chips of a host; every chip has the norms
    token = 2 * 28 * kv / 4 * 2  # keys and values
    seen = 6144 / 8 + 8096 / 8 / 2  # the assumed mean prompt and half of the mean response
    for room, live in ((0, 192), (1, 2**30 // (128 * token) * 128 / (768 + 1012))):  # full slots; what 1 GiB holds
        plan = planned("qwen2.5-7b_v5e-16", "--topology", "v5e:4x4", f"rollout.cache_gb={room}")
        assert plan["expected"]["assumptions"]["solutions_at_once_on_a_host"] == pytest.approx(live)
        assert plan["decode"]["bytes_accessed"] == pytest.approx(16 * (copy + live * seen * token))


def test_expected_times_are_those_worked_out_by_hand():
    """The same model on four hosts of four v5e: 64 tasks of 3 kinds, half of the proposals valid, half of the peaks."""
    chip = CHIPS["v5e"]
    layer = 3584 * (2 * 28 * 128 + 2 * 4 * 128) + 3 * 3584 * 18944  # weights of its matrices
    head, copy, token = 152064 * 3584, 3.8084e9, 14336  # bytes a chip: of the sampler's weights, of a cached token
    scores = 4 * 28 * 28 * 128  # flops of a query and key in all layers

    def seconds(sequences):  # decoding waits for memory: for a token of each all weights and all caches are read
        return (copy + sequences * 1274 * token) / chip.bandwidth / 0.5

    # a prefill is one prompt's 6144 tokens, 8 mean ones, without the last layer and the head: 2.5 prompts a proposal
    prefill = 6144 * (2 * 28 * layer + scores * 6144 / 2) * 27 / 28 / 4 / chip.flops / 0.5 * (2.5 * 192 / 8 / 4)
    # a host has 48 of 192 proposals, then 240 of the solutions (one each, eight of those that are valid) in 192 slots
    decode = 1012 * (seconds(48) + 240 / 192 * seconds(192))
    rate = (192 + 960) * 1012 / decode
    # 6 * 64 trajectories and 5 % padding: forward, again while going backward, and backward, which is twice as much
    tokens = 6 * 64 * (768 + 1012)
    update = 4 * tokens / 0.95 * (2 * (28 * layer + head) + scores * 1780 / 2) / 16 / chip.flops / 0.5
    expected = planned("qwen2.5-7b_v5e-16", "--topology", "v5e:4x4")["expected"]
    rates = [expected[f"{name}_tokens_per_second"] for name in ("decode", "update")]
    assert rates == pytest.approx([rate, tokens / update], rel=1e-3)
    times = [expected[f"{name}_seconds"] for name in (*PROGRAMS, "step", "longest_response")]
    assert times == pytest.approx([prefill, decode, update, prefill + decode + update, 8096 * seconds(1)], rel=1e-3)
    assert (round(rate, -3), round(times[3])) == (34_000, 64)  # as docs/hardware.md says


# Collectives


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("x",))
    split = NamedSharding(mesh, PartitionSpec(None, "x"))

    @jax.jit
    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            y = lax.with_sharding_constraint(x @ w, NamedSharding(mesh, PartitionSpec()))  # [8, 64], summed over x
            return lax.with_sharding_constraint(jnp.tanh(y), split), None

        return lax.scan(layer, x, weights)[0]

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split)
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "x")))
    assert collectives(layers.lower(x, weights).compile().as_text())["all-reduce"] == 5 * 8 * 64 * 4


def test_collectives_read_the_compilers_text():
    text = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body.1 (arg: (s32[], /*index=1*/f32[8])) -> (s32[], f32[8]) {
  %ag = (bf16[4,8]{1,0}, bf16[16,8]{1,0:T(8,128)S(1)}) all-gather-start(%x), dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%ag)
  ROOT %t = (s32[], f32[8]) tuple(%i, %y)
}

%cond.1 (arg: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%body.2 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %aa = f32[8]{0} all-to-all(%x), dimensions={0}
}

%cond.2 (arg: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt.2 = pred[] compare(%i, %limit), direction=LT
}

%all-reduce-scatter.2 (p: f32[64]) -> f32[16] {
  %ar.2 = f32[64]{0} all-reduce(%p), replica_groups={}, to_apply=%sum
  ROOT %part = f32[16]{0} dynamic-slice(%ar.2, %i), dynamic_slice_sizes={16}
}

%start (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %ag.2 = bf16[16,8]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="4"}
}

%product_meanwhile (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %ag.3 = bf16[16,8]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="4"}
}

ENTRY %main.1 (p: f32[8]) -> f32[8] {
  %s = bf16[16,8]{1,0} fusion(%p), kind=kCustom, calls=%start
  %m = bf16[16,8]{1,0} fusion(%p), kind=kOutput, calls=%product_meanwhile
  %part = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2
  %w.2 = (s32[], f32[8]) while(%init), condition=%cond.2, body=%body.2
  %w.3 = (s32[], f32[8]) while(%init), condition=%cond.1, body=%body.2
  %w = (s32[], f32[8]) while(%init), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"28"}}
  %rs = f32[2]{0} reduce-scatter(f32[8]{0} %z), dimensions={0}, to_apply=%sum
  ROOT %ar = f32[8]{0} all-reduce(%z), replica_groups={}, to_apply=%sum
}
"""
    gathered, scattered = 29 * 16 * 8 * 2, 64 * 4 + 32
    assert collectives(text) == {
        "all-gather": gathered,
        "all-reduce": 32,
        "all-to-all": (3 + 1) * 32,
        "reduce-scatter": scattered,
    }
    assert collectives("") == {}


# Plans


def test_plan_of_the_embedded_model_on_this_cpu_is_what_the_compiler_says(capsys, kept_results, monkeypatch):
    arguments = ["plan", str(ROOT / "configs/debug_cpu.yaml"), "--topology", "cpu", "--layers", "1", "--json"]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] is True and record["hbm_bytes_per_chip"] > GIB and record["reduced"]
    for program in PROGRAMS:
        assert record[program].keys() >= CONTRACT
        each = record[program]
        assert each["compile_seconds"] > 0 and each["roofline_seconds"] > 0 and not each["cached"]
        parts = [each[f"{part}_bytes"] for part in ("argument", "temp", "output", "resident")]
        assert each["peak_bytes"] == sum(parts) - each["alias_bytes"]
    weights = 4 * record["parameters"]
    assert record["update"]["argument_bytes"] > 3 * weights == record["learner_resident_bytes"]
    assert len(list(kept_results.glob("*.json"))) == len(PROGRAMS)

    monkeypatch.setattr(plan_compile, "_compile", None)  # nothing is compiled again
    assert main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert all(again[program]["cached"] for program in PROGRAMS)
    assert all(again[name] == record[name] for name in record if name not in PROGRAMS)


def test_a_kept_result_is_for_the_same_config_only(kept_results, monkeypatch):
    config = load_config(ROOT / "configs/debug_cpu.yaml")
    model, target = shape_of("embedded"), parse_target("cpu")

    def key(config: Config) -> str:
        return plan_compile._key(Setup(config, model, target), "update")

    assert key(config) == key(replace(config, seed=5, run_dir="elsewhere"))
    changed = [replace(config.learn, remat="block"), replace(config.learn, rows=8), replace(config.learn, kl="k3")]
    assert len({key(config), *(key(replace(config, learn=learn)) for learn in changed)}) == 4
    path = kept_results / f"{key(config)}.json"
    path.write_text("{torn")
    assert plan_compile._read(path) is None


def test_layers_are_cut_and_it_is_said():
    config = load_config(ROOT / "configs/qwen2.5-coder-3b_h100.yaml")
    record = make_plan(config, parse_target("h100:1"), layers=2)
    assert record["reduced"] and record["layers"] == 2 and "ONLY 2 LAYERS" in render(record)
    with pytest.raises(UserError, match="has 36"):
        make_plan(config, parse_target("h100:1"), layers=37)


def test_what_does_not_fit_exits_3_and_the_change_it_names_fits(capsys):
    config = str(ROOT / "configs/qwen2.5-7b_h200.yaml")
    overrides = ["learn.moments_dtype=float32"]
    assert main(["plan", config, *overrides, "--topology", "h200:1", "--json"]) == 3
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] is False and record["nearest_change"] == "learn.moments_dtype=bfloat16"
    assert main(["plan", config, record["nearest_change"], "--topology", "h200:1"]) == 0
    assert "verdict: fits" in capsys.readouterr().out
    assert main(["plan", config, "--topology", "h100:1"]) == 3
    said = capsys.readouterr().out
    assert "verdict: does not fit; by arithmetic this would: --topology h100:2" in said
    assert main(["plan", config, "model=qwen2.5-14b", "--topology", "h100:1", "--json"]) == 3
    change = json.loads(capsys.readouterr().out)["nearest_change"].split()
    assert main(["plan", config, "model=qwen2.5-14b", *change]) == 0


def planned(name: str, *words: str) -> dict[str, Any]:
    """The plan from shapes of a shipped config and what follows it on the command line, where later words win."""
    args, rest = build_parser().parse_known_args(["plan", str(ROOT / f"configs/{name}.yaml"), *words])
    config = load_config(args.config, [*args.overrides, *rest])
    return make_plan(config, parse_target(args.topology), compiling=False)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--topology v5e:4x4 mesh.data=4 mesh.fsdp=1", "mesh.data=1 mesh.fsdp=0"),
        ("--topology v5e:4x4 mesh.data=0 mesh.fsdp=1", "mesh.data=1 mesh.fsdp=0"),
        ("--topology v5e:4x4 mesh.data=4 mesh.fsdp=1 mesh.tensor=0", "mesh.data=1 mesh.fsdp=0 mesh.tensor=4"),
        ("--topology v5e:2x4 mesh.data=2 mesh.fsdp=1", "mesh.data=1 mesh.fsdp=0 learn.offload=true"),
        ("--topology v5e:2x2 mesh.fsdp=1", "--topology v5e:2x4 mesh.fsdp=0 learn.offload=true"),
        ("--topology v5e:2x2 mesh.fsdp=0", "--topology v5e:2x4 learn.offload=true"),
        ("--topology v5e:2x2 mesh.fsdp=0 learn.moments_dtype=float32", "--topology v5e:2x4 learn.offload=true"),
        ("--topology v5e:4x4 rollout.slots=16384", None),
    ],
)
def test_advice_is_the_least_that_fits(words, advice):
    assert planned("qwen2.5-7b_v5e-16", *words.split())["nearest_change"] == advice


@pytest.mark.parametrize("name", [name for name, target in CONFIGS.items() if target.chip.platform == "tpu"])
def test_advice_on_a_bad_mesh_loads_and_fits_and_holds_nothing_needless(name):
    own = CONFIGS[name]
    tensor = load_config(ROOT / f"configs/{name}.yaml").mesh.tensor
    for target in [each for each in known_targets(own.chip.name) if each.chips in (own.chips // 2, own.chips)]:
        copies = target.chips // tensor
        for mesh in (f"data={copies} fsdp=1", "data=0 fsdp=1", f"data={copies} fsdp=1 tensor=0"):
            words = ["--topology", target.name, *(f"mesh.{each}" for each in mesh.split())]
            plan = planned(name, *words)
            if plan["fits"]:
                continue
            advice = plan["nearest_change"].split()
            assert planned(name, *words, *advice)["fits"], (words, advice)
            if target == own:  # where the shipped mesh fits
                assert all(word.startswith("mesh.") for word in advice), (words, advice)
            for word in [each for each in advice if each.startswith(("learn.", "rollout."))]:
                without = [each for each in advice if each != word]
                assert not planned(name, *words, *without)["fits"], (words, advice, word)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_process_that_compiles(number):
    """And are Python's again afterwards."""
    program = (
        "import signal; from azr_jax.plan_compile import _ended_by_signals as ended\n"
        "with ended(): pass\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        f"with ended(): signal.raise_signal({int(number)})\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (-number, "")


def test_mistakes(capsys, monkeypatch):
    tiny = str(ROOT / "configs/tiny.yaml")
    assert main(["plan", tiny, "model=qwen9-1b", "--topology", "cpu"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["plan", tiny, "mesh.fsdp=3", "--topology", "v5e:2x2"]) == 2
    assert "mesh.fsdp=3" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else found(name, *a))
    assert main(["plan", tiny, "--topology", "v5e:2x2"]) == 1
    assert '-m pip install -e ".[tpu]"' in capsys.readouterr().err
    assert main(["plan", tiny, "--topology", "h200:1"]) == 0  # which needs no compiler


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_fits_by_arithmetic(name):
    config = load_config(ROOT / f"configs/{name}.yaml")
    target = CONFIGS[name]
    for layers in (2, None):
        record = make_plan(config, target, layers=layers, compiling=False)
        assert record["fits"], render(record)
    assert (record["learner_mesh"]["tensor"] <= target.host_chips) and config.learn.dtype == "bfloat16"
    assert config.rollout.page == (128 if target.chip.platform == "tpu" else 64)
    assert (config.rollout.max_prompt, config.rollout.max_response, config.tasks.batch) == (6144, 8096, 64)
    assert record["kv_tokens_per_host"] > 4 * (config.rollout.max_prompt + config.rollout.max_response)


def test_tiny_runs_on_slices_of_any_size():
    config = load_config(ROOT / "configs/tiny.yaml")
    for text in ("v5e-8", "v5e-64", "v6e-4", "v5p-8", "h100:1"):
        assert make_plan(config, parse_target(text), compiling=False)["fits"]


def test_bad_names_are_config_errors():
    with pytest.raises(ConfigError):
        parse_target("v4:2x2x1")


def test_tables_are_those_of_the_recorded_plans():
    page = PAGE.read_text()
    assert page == with_tables(page), "run `make plan-all` or its --tables"
