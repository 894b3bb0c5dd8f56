"""The documented list of configuration keys, made from config.py itself: docs/config.md is its output.

Types and defaults come from the dataclasses, meanings from the `#:` comment on each key's line.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from azr_jax import config as config_module
from azr_jax.config import PRESETS, Config, PresetRules
from azr_jax.config_loader import describe_type

INTRODUCTION = """# Configuration keys

A run is described by a YAML file and overrides: `azr-jax train configs/demo.yaml learn.lr=1e-4 steps=50`. Keys that are
left out take the defaults below; an unknown key is an error. The resolved configuration is written into the run folder.
This page is the output of `azr-jax config`."""


def config_keys_doc() -> str:
    """Markdown: a table of keys for the top level and for each section, then the rules of the presets."""
    hints = get_type_hints(Config)
    sections = [name for name, hint in hints.items() if is_dataclass(hint)]
    parts = [INTRODUCTION, "## Top level", _table(Config, "")]
    for name in sections:
        parts += [f"## `{name}`", inspect.cleandoc(hints[name].__doc__), _table(hints[name], name + ".")]
    parts += ["## Presets", "Where paper and released code differ; the sources are in differences.md.", _presets()]
    return "\n\n".join(parts) + "\n"


def key_comments(cls: type) -> dict[str, str]:
    """{field name: text of the `#:` comment on its line} of a dataclass of config.py; "" where there is none."""
    source = inspect.getsource(config_module)
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
            return {
                item.target.id: lines[(item.end_lineno or item.lineno) - 1].partition("#:")[2].strip()
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    raise ValueError(f"{cls.__name__} is not a class of {config_module.__name__}")


def _table(cls: type, prefix: str) -> str:
    """The keys of one dataclass as a table; nested sections are left to their own."""
    hints, comments = get_type_hints(cls), key_comments(cls)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for item in fields(cls):
        hint = hints[item.name]
        if not is_dataclass(hint):
            rows.append(
                f"| `{prefix}{item.name}` | {describe_type(hint)} | `{_text(item.default)}` | {comments[item.name]} |"
            )
    return "\n".join(rows)


def _presets() -> str:
    """One row a rule, one column a preset."""
    comments = key_comments(PresetRules)
    rows = [f"| rule | meaning | {' | '.join(PRESETS)} |", "|---" * (2 + len(PRESETS)) + "|"]
    for item in fields(PresetRules):
        chosen = " | ".join(f"`{_text(getattr(rules, item.name))}`" for rules in PRESETS.values())
        rows.append(f"| `{item.name}` | {comments[item.name]} | {chosen} |")
    return "\n".join(rows)


def _text(value: Any) -> str:
    """A value as one would write it in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)
