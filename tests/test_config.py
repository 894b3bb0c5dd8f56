"""Configuration: files, overrides, and one clear line for every mistake."""

from __future__ import annotations

import math
import tempfile
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_jax.config import Config, LearnConfig, PresetRules, RolloutConfig
from azr_jax.config_doc import config_keys_doc, key_comments
from azr_jax.config_loader import (
    AT_LEAST,
    INTERVALS,
    config_leaves,
    config_to_yaml,
    load_config,
    only_section,
)
from azr_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]


def refused(path: Path | None = None, *overrides: str) -> str:
    """The message of the ConfigError that loading must raise; it is one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_nothing_given_is_the_defaults(tmp_path):
    assert load_config(None) == Config()
    assert load_config(file(tmp_path, "tasks:\nsteps: 500\n")) == Config()  # a section may be left empty


def test_file_then_overrides_in_order(tmp_path):
    path = file(tmp_path, "steps: 7\ntasks:\n  batch: 3\nlearn: {lr: 1e-5, schedule: cosine, reuse_estimates: true}\n")
    config = load_config(path, ["tasks.batch=5", "learn.lr = 2e-5", "tasks.batch=6", "run_dir=runs/a=b"])
    assert (config.steps, config.tasks.batch, config.run_dir) == (7, 6, "runs/a=b")
    assert config.learn == LearnConfig(lr=2e-5, schedule="cosine", reuse_estimates=True)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("1E-06", 1e-6), (".5", 0.5), ("5e-1", 0.5), ("0.25", 0.25)]
)
def test_floats_that_yaml_takes_for_strings(tmp_path, text, value):
    for config in (load_config(file(tmp_path, f"learn: {{lr: {text}}}")), load_config(None, [f"learn.lr={text}"])):
        assert config.learn.lr == value


def test_scalars_are_read_by_the_type_of_their_key(tmp_path):
    learn = "learn: {grad_clip: 2, reuse_estimates: TRUE}"
    config = load_config(file(tmp_path, f"run_dir: 2026\nmodel: on\nsteps: 010\n{learn}\n"))
    assert (config.run_dir, config.model, config.steps) == ("2026", "on", 10)
    assert config.learn.grad_clip == 2.0 and isinstance(config.learn.grad_clip, float)
    assert config.learn.reuse_estimates is True


@pytest.mark.parametrize("name", ["demo", "debug_cpu", "paper"])
def test_shipped_configs_load_and_survive_a_round_trip(tmp_path, name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert load_config(file(tmp_path, config_to_yaml(config))) == config
    assert (config.model == "embedded") == (name != "paper")


def test_paper_config_is_table_3():
    config = load_config(ROOT / "configs/paper.yaml")
    assert (config.preset, config.steps, config.control) == ("paper", 500, "none")
    tasks, rollout, learn = config.tasks, config.rollout, config.learn
    assert (tasks.batch, tasks.references, tasks.induction_inputs, tasks.samples) == (64, 6, 10, 8)
    assert (tasks.seed_factor, tasks.buffer_cap) == (4, 16384)
    assert (rollout.max_prompt, rollout.max_response, rollout.temperature) == (6144, 8096, 1.0)
    assert (learn.lr, learn.schedule, learn.warmup, learn.grad_clip) == (1e-6, "constant", 0, 1.0)
    assert (learn.clip_low, learn.clip_high, learn.entropy_coef, learn.weight_decay) == (0.2, 0.2, 0.001, 0.01)
    assert not learn.reuse_estimates


floats = st.floats(min_value=1e-9, max_value=0.999)
texts = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


@given(floats, floats, st.integers(1, 10**6), st.booleans(), texts)
def test_round_trips(lr, temperature, steps, reuse, run_dir):
    config = replace(
        Config(),
        steps=steps,
        run_dir=run_dir,
        learn=LearnConfig(lr=lr, reuse_estimates=reuse),
        rollout=RolloutConfig(temperature=temperature),
    )
    path = Path(tempfile.mkdtemp()) / "run.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("tasks.bach", "`tasks.batch`"),
        ("step", "`steps`"),
        ("task.batch", "`tasks.batch`"),
        ("every", "`eval.every` or `checkpoint.every`"),
        ("lr", "`learn.lr`"),
        ("learn.learning_rate", "`learn` has lr, schedule"),
        ("executor.x", "`executor` has workers, cpu_seconds"),
        ("learn.entropy_coeff", "`learn.entropy_coef`"),
        ("rollout.temprature", "`rollout.temperature`"),
        ("xyzzy", "`azr-jax config` lists all keys"),
    ],
)
def test_unknown_key_is_named_with_what_was_probably_meant(tmp_path, key, meant):
    message = refused(None, f"{key}=1")
    assert f"unknown key `{key}`" in message and meant in message and f"override `{key}=1`" in message
    section, _, name = key.rpartition(".")
    path = file(tmp_path, f"{section}:\n  {name}: 1\n" if section in get_type_hints(Config) else f"{key}: 1\n")
    message = refused(path)
    assert f"unknown key `{key}`" in message and meant in message and str(path) in message


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_sampling_filters_are_explained(tmp_path, name):
    for message in (refused(None, f"rollout.{name}=1"), refused(file(tmp_path, f"rollout: {{{name}: 0.9}}"))):
        assert f"`rollout.{name}` is refused" in message and "policy gradient" in message


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("steps", "1.5", "an integer"),
        ("steps", "true", "an integer"),
        ("steps", "many", "an integer"),
        ("steps", "1" + 400 * "0", "an integer"),
        ("steps", "[1, 2]", "a list"),
        ("steps", "{a: 1}", "a section"),
        ("learn.lr", "fast", "a number"),
        ("learn.lr", "nan", "a number"),
        ("learn.lr", "inf", "a number"),
        ("learn.reuse_estimates", "yes", "true or false"),
        ("learn.reuse_estimates", "1", "true or false"),
        ("learn.remat", "true", "one of block, dots, none"),
        ("preset", "papr", "did you mean paper?"),
        ("preset", "Z", "one of fixed, paper, reference"),
        ("learn.dtype", "bf16", "did you mean bfloat16?"),
        ("run_dir", "[a]", "expected text, got a list"),
        ("run_dir", "", "`run_dir` has no value"),
        ("tasks", "3", "`tasks` is a section of keys"),
    ],
)
def test_wrong_types(tmp_path, key, text, expected):
    section, _, name = key.rpartition(".")
    message = refused(file(tmp_path, f"{section}:\n  {name}: {text}\n" if section else f"{key}: {text}\n"))
    assert key in message and expected in message


def test_override_syntax():
    for override in ("steps", "=3", ""):
        assert "expected section.key=value" in refused(None, override)
    assert "set one of them, such as tasks.batch" in refused(None, "tasks=3")
    assert "has no value" in refused(None, "steps=")
    assert only_section("executor", ["executor.workers=2"]) == ["executor.workers=2"]
    with pytest.raises(ConfigError, match="only the keys of `executor`"):
        only_section("executor", ["steps=2"])


def test_files_that_are_no_configuration(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.yaml")
    assert "is a folder" in refused(tmp_path)
    assert "is empty" in refused(file(tmp_path, "# only a comment\n"))
    assert "line 3, column 1: expected" in refused(file(tmp_path, "steps: 3\nlearn: {lr: 1\n"))
    assert "expected `key: value` lines, got a list" in refused(file(tmp_path, "- steps\n"))
    assert "expected `key: value` lines" in refused(file(tmp_path, "steps=3\n"))
    assert "line 3: key `steps` is given twice" in refused(file(tmp_path, "steps: 3\nseed: 1\nsteps: 4\n"))
    assert "key `lr` is given twice" in refused(file(tmp_path, "learn:\n  lr: 1e-6\n  lr: 1e-5\n"))
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00steps")
    assert "not a YAML file" in refused(path)
    marker = tmp_path / "ran"
    assert "a list" in refused(file(tmp_path, f"steps: !!python/object/apply:os.mkdir ['{marker}']\n"))
    assert not marker.exists()


@given(st.text(st.sampled_from("abst:-{}[]!&*#|>'\" \n\t%@`steps0123456789.e"), max_size=60))
def test_any_text_loads_or_is_refused(text):
    path = Path(tempfile.mkdtemp()) / "run.yaml"
    path.write_text(text)
    try:
        assert isinstance(load_config(path), Config)
    except ConfigError as error:
        assert "\n" not in str(error)


def numeric_keys(kind: type) -> set[str]:
    return {key for key, hint in config_leaves() if hint is kind}


def test_every_number_has_a_range():
    assert set(AT_LEAST) == numeric_keys(int)
    assert set(INTERVALS) == numeric_keys(float)


def test_an_impossible_override_is_not_blamed_on_the_file(tmp_path):
    path = file(tmp_path, "seed: 1\n")
    assert refused(path, "steps=-1") == f"{path} with its overrides: `steps` must be at least 0, got -1"
    path.write_text("steps: -1\n")
    assert refused(path) == f"{path}: `steps` must be at least 0, got -1"


@pytest.mark.parametrize("key", AT_LEAST)
def test_integers_below_their_range(key):
    assert f"`{key}` must be at least {AT_LEAST[key]}" in refused(None, f"{key}={AT_LEAST[key] - 1}")


@pytest.mark.parametrize("key", INTERVALS)
def test_floats_outside_their_interval(key):
    ends, low, high = INTERVALS[key]
    outside = [low - 1] + ([low] if ends[0] == "(" else [])
    if not math.isinf(high):
        outside += [high + 1] + ([high] if ends[1] == ")" else [])
    for value in outside:
        assert f"`{key}` must lie in" in refused(None, f"{key}={value}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tasks.buffer_cap=100"], "smaller than the seed buffer"),
        (["learn.row_tokens=100"], "rollout.max_prompt + rollout.max_response = 14240"),
        (["learn.warmup=11", "steps=10"], "longer than the run"),
        (["learn.advantage=grpo"], "learn.reuse_estimates=true"),
        (["learn.importance_cap=2", "learn.dual_clip=3"], "leave learn.dual_clip at 0"),
        (["learn.dual_clip=0.5"], "must be above 1"),
        (["executor.cpu_seconds=9"], "shorter than executor.cpu_seconds"),
        (["mesh.data=0"], "only one of data, fsdp and tensor can be 0"),
        (["seed=2147483648"], "below 2**31"),
    ],
)
def test_contradictions(overrides, expected):
    assert expected in refused(None, *overrides)


def test_every_key_and_every_choice_is_documented():
    sections = [Config, PresetRules] + [hint for hint in get_type_hints(Config).values() if is_dataclass(hint)]
    for cls in sections:
        missing = [name for name, text in key_comments(cls).items() if not text and name not in get_type_hints(Config)]
        assert not missing, f"{cls.__name__}: {missing} without a `#:` comment"
    page = config_keys_doc()
    for key, hint in config_leaves():
        assert f"| `{key}` |" in page
        assert all(choice in page for choice in get_args(hint))


def test_docs_page_is_current():
    page = (ROOT / "docs/config.md").read_text()
    assert page == config_keys_doc(), "run `azr-jax config > docs/config.md`"
