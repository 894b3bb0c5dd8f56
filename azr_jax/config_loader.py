"""From a YAML file and `a.b=c` overrides to a checked `Config`.

A scalar is read by the type of its key, from its text: `1e-6` is a float although YAML 1.1 takes it for a string,
`010` is ten, `run_dir: 2026` is a folder's name and only `true` and `false` are booleans. So a file and an override
mean the same thing. Every mistake is one `ConfigError` that says where it is, what is wrong and what would be right.

It does not look at the machine: whether a model's folder exists or a mesh fits the devices is for whoever uses them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from azr_jax.config import Config
from azr_jax.errors import ConfigError

SAMPLING_FILTERS = ("top_p", "top_k", "min_p")

#: Smallest value of every integer key.
AT_LEAST = {
    "steps": 0,
    "seed": 0,
    "tasks.batch": 1,
    "tasks.references": 1,
    "tasks.induction_inputs": 2,  # one pair shown, one hidden
    "tasks.samples": 2,  # the mean of one sample is always 0 or 1
    "tasks.seed_factor": 1,
    "tasks.buffer_cap": 1,
    "rollout.max_prompt": 1,
    "rollout.max_response": 1,
    "rollout.slots": 1,
    "rollout.block": 1,
    "rollout.page": 8,
    "rollout.prefill_tokens": 0,
    "learn.warmup": 0,
    "learn.row_tokens": 0,
    "learn.rows": 1,
    "executor.workers": 0,
    "executor.memory_mb": 64,
    "executor.output_chars": 1,
    "executor.determinism_runs": 2,  # one run cannot disagree with itself
    "mesh.data": 0,
    "mesh.fsdp": 0,
    "mesh.tensor": 0,
    "eval.every": 0,
    "eval.per_kind": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
}
#: Interval of every float key: its brackets, lowest and highest value.
INTERVALS = {
    "rollout.temperature": ("()", 0.0, math.inf),
    "rollout.cache_gb": ("[)", 0.0, math.inf),
    "learn.lr": ("()", 0.0, 1.0),
    "learn.dual_clip": ("[)", 0.0, math.inf),
    "learn.kl_coef": ("[)", 0.0, math.inf),
    "learn.importance_cap": ("[)", 0.0, math.inf),
    "learn.beta1": ("[)", 0.0, 1.0),
    "learn.beta2": ("[)", 0.0, 1.0),
    "learn.weight_decay": ("[)", 0.0, math.inf),
    "learn.grad_clip": ("()", 0.0, math.inf),
    "learn.clip_low": ("()", 0.0, 1.0),
    "learn.clip_high": ("()", 0.0, math.inf),
    "learn.entropy_coef": ("[)", 0.0, math.inf),
    "executor.cpu_seconds": ("()", 0.0, math.inf),
    "executor.wall_seconds": ("()", 0.0, math.inf),
}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (None: all defaults) with `section.key=value` overrides on top, later ones win.

    ConfigError: the file cannot be read or is not YAML, a key is unknown or given twice, a value has the wrong type
    or is impossible.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_flatten(_read_yaml(Path(path)), str(path)))
    for override in overrides:
        values.update(_parse_override(override))
    source = "the configuration" if path is None else str(path)
    return _checked(values, f"{source} with its overrides" if overrides else source)


def only_section(section: str, overrides: Sequence[str]) -> list[str]:
    """The overrides, for a command that reads one section; ConfigError on a key of another."""
    for override in overrides:
        if "=" in override and not override.strip().startswith(section + "."):
            raise ConfigError(f"override `{override}`: this command reads only the keys of `{section}`")
    return list(overrides)


def config_to_yaml(config: Config) -> str:
    """Every key with its value; `load_config` of the text gives the same configuration back."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def config_leaves(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every key that holds a value, in the order of the dataclasses."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        if is_dataclass(hint) and isinstance(hint, type):
            yield from config_leaves(hint, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hint


def describe_type(hint: Any) -> str:
    """A type as error messages and docs/config.md name it."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}[hint]


class _Loader(yaml.BaseLoader):
    """YAML with every scalar left as its text, refusing a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class refuses it
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{node.start_mark.name}, line {line}: key `{key_node.value}` is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    """The file's mapping with scalars as text."""
    try:
        with path.open(encoding="utf-8") as stream:
            raw = yaml.load(stream, _Loader)  # a BaseLoader: text, lists and dicts only, no objects
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; configs/ holds ready ones") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a YAML file: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not a YAML file: {_one_line(error)}") from None
    if raw == "" or raw is None:
        raise ConfigError(f"{path} is empty; `azr-jax config` lists the keys it may hold")
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: expected `key: value` lines, got {_shown(raw)}")
    return raw


def _one_line(error: yaml.YAMLError) -> str:
    """A YAML error without the excerpt: its line and its problem."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _parse_override(override: str) -> dict[str, Any]:
    """`section.key=value` as {dotted key: parsed value}."""
    key, equals, text = override.partition("=")
    source = f"override `{override}`"
    if not equals or not key.strip():
        raise ConfigError(f"{source}: expected section.key=value, for example learn.lr=1e-6")
    key = key.strip()
    hints = dict(config_leaves())
    if key not in hints:
        raise ConfigError(f"{source}: {_unknown_key(key)}")
    return {key: _parse_value(text.strip(), hints[key], f"{source}: `{key}`")}


def _flatten(record: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, parsed value) of a nested mapping."""
    hints = dict(config_leaves())
    for name, value in record.items():
        key = f"{prefix}{name}"
        if key in hints:
            yield key, _parse_value(value, hints[key], f"{source}: `{key}`")
        elif not any(known.startswith(key + ".") for known in hints):
            raise ConfigError(f"{source}: {_unknown_key(key)}")
        elif isinstance(value, Mapping):
            yield from _flatten(value, source, key + ".")
        elif value != "":  # a section without any key below it keeps its defaults
            raise ConfigError(f"{source}: `{key}` is a section of keys, got {_shown(value)}")


def _unknown_key(key: str) -> str:
    """What is wrong with a key that does not exist, and which key was probably meant."""
    leaves = [known for known, _ in config_leaves()]
    sections = sorted({known.partition(".")[0] for known in leaves if "." in known})
    name = key.rpartition(".")[2]
    if name in SAMPLING_FILTERS:
        return (
            f"`{key}` is refused: rollouts are trained on, and the policy gradient needs tokens drawn from the whole "
            "distribution whose log-probabilities it uses; rollout.temperature is the only knob"
        )
    if key in sections:
        first = next(known for known in leaves if known.startswith(key + "."))
        return f"`{key}` is a section of keys; set one of them, such as {first}"
    meant = [known for known in leaves if known.rpartition(".")[2] == name]
    alike = leaves if "." in key else leaves + sections
    meant = meant or difflib.get_close_matches(key, alike, n=1, cutoff=0.75)
    if meant:
        return f"unknown key `{key}`; did you mean {' or '.join(f'`{known}`' for known in meant)}?"
    section = key.partition(".")[0] + "."
    there = [known.removeprefix(section) for known in leaves if known.startswith(section)]
    if there:
        return f"unknown key `{key}`; `{section[:-1]}` has {', '.join(there)}"
    return f"unknown key `{key}`; `azr-jax config` lists all keys"


def _parse_value(value: Any, hint: Any, where: str) -> Any:
    """A value of type `hint` from text; anything else, a list or a section, is refused."""
    if value == "":
        raise ConfigError(f"{where} has no value; expected {describe_type(hint)}, or leave the line out")
    problem = ConfigError(f"{where}: expected {describe_type(hint)}, got {_shown(value)}")
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        close = difflib.get_close_matches(str(value), get_args(hint), n=1)
        raise ConfigError(f"{problem}; did you mean {close[0]}?") if close else problem
    if not isinstance(value, str):
        raise problem
    if hint is str:
        return value
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise problem
        return value.lower() == "true"
    try:
        number = hint(value)
        finite = math.isfinite(number)  # OverflowError: an integer larger than any float
    except (ValueError, OverflowError):
        raise problem from None
    if not finite:
        raise problem
    return number


def _shown(value: Any) -> str:
    """A wrong value, short enough for one line."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    text = str(value)
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"


def _checked(values: Mapping[str, Any], source: str) -> Config:
    """The configuration of parsed values, or a ConfigError on the first impossible one."""
    config = _build(Config, values)
    for problem in _problems(config):
        raise ConfigError(f"{source}: {problem}")
    return config


def _build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of `cls` with the values below `prefix`, the rest at their defaults."""
    hints = get_type_hints(cls)
    arguments = {}
    for item in fields(cls):
        key, hint = prefix + item.name, hints[item.name]
        if is_dataclass(hint) and isinstance(hint, type):
            arguments[item.name] = _build(hint, values, key + ".")
        elif key in values:
            arguments[item.name] = values[key]
    return cls(**arguments)


def _problems(config: Config) -> Iterator[str]:
    """What no run can have: values out of range first, then values that contradict one another."""

    def value(key: str) -> Any:
        section, _, name = key.rpartition(".")
        return getattr(getattr(config, section) if section else config, name)

    for key, lowest in AT_LEAST.items():
        if value(key) < lowest:
            yield f"`{key}` must be at least {lowest}, got {value(key)}"
    for key, (ends, low, high) in INTERVALS.items():
        number = value(key)
        above = number > low or (ends[0] == "[" and number == low)
        below = number < high or (ends[1] == "]" and number == high)
        if not (above and below):
            yield f"`{key}` must lie in {ends[0]}{low:g}, {high:g}{ends[1]}, got {number:g}"

    tasks, rollout, learn, executor, mesh = config.tasks, config.rollout, config.learn, config.executor, config.mesh
    if config.seed >= 2**31:
        yield f"`seed` must be below 2**31, got {config.seed}"
    if tasks.buffer_cap < tasks.seed_factor * tasks.batch:
        yield (
            f"`tasks.buffer_cap` ({tasks.buffer_cap}) is smaller than the seed buffer, "
            f"tasks.seed_factor * tasks.batch = {tasks.seed_factor * tasks.batch}"
        )
    if rollout.page > 256 or rollout.page & (rollout.page - 1):
        yield f"`rollout.page` must be 8, 16, 32, 64, 128 or 256, got {rollout.page}"
    longest = rollout.max_prompt + rollout.max_response
    if 0 < learn.row_tokens < longest:
        yield (
            f"`learn.row_tokens` ({learn.row_tokens}) cannot hold the longest sequence, rollout.max_prompt + "
            f"rollout.max_response = {longest}; raise it, or set 0 for exactly that"
        )
    if learn.advantage in ("grpo", "rloo") and not learn.reuse_estimates:
        yield (
            f"`learn.advantage` = {learn.advantage} compares several answers to one task, and only "
            "learn.reuse_estimates=true trains on several"
        )
    if learn.importance_cap > 0 and learn.dual_clip > 0:
        yield "`learn.importance_cap` takes the place of the ratio clips: with it, leave learn.dual_clip at 0"
    if 0 < learn.dual_clip <= 1:
        yield f"`learn.dual_clip` must be above 1 (or 0: none), got {learn.dual_clip:g}"
    if learn.warmup > config.steps > 0:
        yield f"`learn.warmup` ({learn.warmup}) is longer than the run, steps = {config.steps}"
    if executor.wall_seconds < executor.cpu_seconds:
        yield (
            f"`executor.wall_seconds` ({executor.wall_seconds:g}) is shorter than "
            f"executor.cpu_seconds ({executor.cpu_seconds:g})"
        )
    if [mesh.data, mesh.fsdp, mesh.tensor].count(0) > 1:
        yield "`mesh`: only one of data, fsdp and tensor can be 0 (all devices that the others leave)"
