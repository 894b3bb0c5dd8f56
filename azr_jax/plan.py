"""`azr-jax plan`: will this config fit on that slice, and how fast could it be? Answered without the slice.

For a TPU the run's longest prefill, its block of decoding and its update are compiled for the topology on this machine
(plan_compile.py); for a GPU memory is computed from shapes (plan_estimate.py). Times are rooflines and what follows
from them under the assumptions that are printed: nothing is measured. What is not counted: the runtime's own buffers,
fragmentation, loading and saving.
"""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Any, TextIO

from azr_jax.chips import GIB
from azr_jax.config import Config
from azr_jax.config_loader import load_config
from azr_jax.errors import ConfigError, UserError
from azr_jax.models.config import ModelConfig
from azr_jax.models.sizes import SIZES, published_size
from azr_jax.models.weights import model_folder
from azr_jax.plan_estimate import PROGRAMS, Setup
from azr_jax.plan_hardware import Target, accelerator_type, known_targets, parse_target

log = logging.getLogger(__name__)

DOES_NOT_FIT = 3

Change = tuple[str, str, Any]  # section, key, value

#: Changes to try besides the mesh's; of as many together, those with earlier ones first.
CHANGES: tuple[Change, ...] = (
    ("rollout", "cache_gb", 0.0),
    ("learn", "dtype", "bfloat16"),
    ("learn", "moments_dtype", "bfloat16"),
    ("learn", "offload", True),
    ("learn", "rows", 1),
    ("learn", "row_tokens", 0),
    ("learn", "remat", "block"),
)


def plan_command(args: Namespace, out: TextIO) -> int:
    """Print the plan of `args.config` on `args.topology`; 0 if it fits, 3 if not."""
    target = parse_target(args.topology)
    config = load_config(args.config, args.overrides)
    record = make_plan(config, target, args.layers)
    out.write(json.dumps(record) + "\n" if args.json else render(record))
    return 0 if record["fits"] else DOES_NOT_FIT


def shape_of(model: str) -> ModelConfig:
    """The shape of a config's `model`: a folder, `embedded`, or (for planning only) the name of a published size."""
    return published_size(model.lower()) if model.lower() in SIZES else ModelConfig.load(model_folder(model))


def make_plan(config: Config, target: Target, layers: int | None = None, compiling: bool = True) -> dict[str, Any]:
    """The plan as a JSON-able dict; bytes and flops are of one chip, times of one call.

    layers: plan for a model cut to so many. compiling: False takes arithmetic's word for every program.
    ConfigError: the mesh does not fit the target. UserError: no compiler, or it refuses a program.
    """
    model = shape_of(config.model)
    if layers is not None:
        if layers > model.num_layers:
            raise UserError(f"--layers {layers}: {config.model} has {model.num_layers}")
        model = replace(model, num_layers=layers, sliding_layers=model.sliding_layers[:layers])
    setup = Setup(config, model, target)
    programs = {name: _program(setup, name, compiling and target.chip.platform != "gpu") for name in PROGRAMS}
    fits = not setup.starved and all(each["peak_bytes"] <= target.chip.usable for each in programs.values())
    record: dict[str, Any] = {
        "fits": fits,
        "model": config.model,
        "parameters": model.num_params,
        "layers": model.num_layers,
        "reduced": layers is not None,
        "topology": target.name,
        "accelerator_type": accelerator_type(target),
        "chips": target.chips,
        "hosts": target.hosts,
        "hbm_bytes_per_chip": int(target.chip.hbm),
        "usable_bytes_per_chip": int(target.chip.usable),
        "learner_mesh": dict(setup.mesh.shape),
        "sampler_mesh": dict(setup.host_mesh.shape),
        "attention": setup.attention,
        "learner_resident_bytes": int(setup.resident),
        "sampler_weights_bytes": int(setup.copy),
        "kv_cache_bytes": int(setup.cache),
        "kv_tokens_per_host": setup.kv_tokens,
        "room_for_longest_sequence": not setup.starved,
        **programs,
        "expected": setup.expected(),
    }
    if not fits:
        record["nearest_change"] = _nearest_change(setup, programs)
    return record


def _program(setup: Setup, name: str, compiling: bool) -> dict[str, Any]:
    """What one program needs on a chip and could do at best."""
    estimate = setup.bytes_of(name)
    held = 0.0 if name == "update" else setup.resident
    found: dict[str, Any] = {
        f"{part}_bytes": int(getattr(estimate, part)) for part in ("argument", "temp", "output", "alias")
    } | {"collectives": None, "compile_seconds": 0.0}
    needed = estimate.total
    if compiling:
        from azr_jax.plan_compile import compiled, require_compiler

        require_compiler(setup)
        found |= compiled(setup, name)
        parts = found["argument_bytes"] + found["temp_bytes"] + found["output_bytes"] - found["alias_bytes"]
        needed = found.pop("needed_bytes", parts)
    flops, traffic = setup.work_of(name)
    return found | {
        "resident_bytes": int(held),
        "peak_bytes": int(needed + held),
        "estimated_peak_bytes": int(estimate.total + held),
        "compiled": compiling,
        "flops": flops,
        "bytes_accessed": traffic,
        "roofline_seconds": setup.roofline(name),
    }


def _nearest_change(setup: Setup, programs: dict[str, dict[str, Any]]) -> str | None:
    """The fewest changes that fit by arithmetic corrected by what was compiled, as one would type them; None if none.

    First within the slice, then on the next larger ones of the same chip.
    """
    off = {name: each["peak_bytes"] / each["estimated_peak_bytes"] for name, each in programs.items()}
    for said, config, target in _candidates(setup):
        try:
            other = Setup(config, setup.model, target)
        except ConfigError:  # the mesh is one for another number of chips
            continue
        peaks = {name: other.bytes_of(name).total + (0 if name == "update" else other.resident) for name in PROGRAMS}
        if not other.starved and all(off[name] * peak <= target.chip.usable for name, peak in peaks.items()):
            return said
    return None


def _candidates(setup: Setup) -> Iterator[tuple[str, Config, Target]]:
    """What to try: on the slice itself, then on each larger one, every set of changes.

    Small sets come first, so the first that fits has no change in it that could be left out.
    """
    differing = [
        [change for change in together if _value(setup.config, change) != change[2]]
        for together in (_spread(setup), *([change] for change in CHANGES))
    ]
    applying = [together for together in differing if together]
    larger = [target for target in known_targets(setup.target.chip.name) if target.chips > setup.target.chips]
    for target in (setup.target, *larger):
        where = [f"--topology {target.name}"] if target in larger else []
        for count in range(0 if where else 1, len(applying) + 1):
            for chosen in combinations(applying, count):
                changes = list(chain(*chosen))
                yield " ".join([*where, *map(_said, changes)]), _changed(setup.config, changes), target


def _spread(setup: Setup) -> list[Change]:
    """The mesh that holds the weights once: `tensor` as it is, `fsdp` all that it leaves (so `tensor` cannot be 0)."""
    return [("mesh", "data", 1), ("mesh", "fsdp", 0), ("mesh", "tensor", setup.mesh.shape["tensor"])]


def _value(config: Config, change: Change) -> Any:
    return getattr(getattr(config, change[0]), change[1])


def _changed(config: Config, changes: Sequence[Change]) -> Config:
    for section, key, value in changes:
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def _said(change: Change) -> str:
    section, key, value = change
    return f"{section}.{key}={str(value).lower()}"


def render(record: dict[str, Any]) -> str:
    """The plan as text for a terminal."""
    of = record["usable_bytes_per_chip"] / GIB
    depth = f", ONLY {record['layers']} LAYERS of it (--layers): not the real model" if record["reduced"] else ""
    lines = [
        f"{record['model']} ({record['parameters'] / 1e9:.2f} B weights{depth})",
        f"on {record['topology']} ({record['accelerator_type']}): {record['chips']} chips on {record['hosts']} "
        f"host(s), {record['hbm_bytes_per_chip'] / GIB:.1f} GiB each, {of:.1f} usable",
        f"learner {_mesh(record['learner_mesh'])}; sampler, on each host, {_mesh(record['sampler_mesh'])}; "
        f"attention {record['attention']}",
        "",
        f"{'GiB a chip':<10}{'learner':>9}{'arguments':>11}{'temporary':>11}{'output':>9}{'peak':>8}"
        f"{'of':>7}   {'TFLOP':>8}{'GB':>9}{'roofline s':>12}   from",
    ]
    for name in PROGRAMS:
        each = record[name]
        sizes = [each[f"{part}_bytes"] / GIB for part in ("resident", "argument", "temp", "output", "peak")]
        if each["compiled"]:
            origin = "compiled" + (", kept from before" if each["cached"] else f" in {each['compile_seconds']:.0f} s")
        else:
            origin = "shapes"
        lines.append(
            f"{name:<10}{sizes[0]:>9.2f}{sizes[1]:>11.2f}{sizes[2]:>11.2f}{sizes[3]:>9.2f}{sizes[4]:>8.2f}{of:>7.2f}"
            f"   {each['flops'] / 1e12:>8.2f}{each['bytes_accessed'] / 1e9:>9.1f}{each['roofline_seconds']:>12.4f}"
            f"   {origin}"
        )
    lines += ["", *_traffic(record), ""]
    lines.append(
        f"KV cache: {record['kv_cache_bytes'] / GIB:.2f} GiB a chip, {record['kv_tokens_per_host']:,} tokens a host"
        + ("" if record["room_for_longest_sequence"] else "; that is more than is free: one sequence does not fit")
    )
    expected = record["expected"]
    lines += [
        f"expected: {expected['decode_tokens_per_second']:,.0f} tokens/s decoded, "
        f"{expected['update_tokens_per_second']:,.0f} tokens/s in the update; a step {expected['step_seconds']:,.0f} s "
        f"(prefill {expected['prefill_seconds']:,.0f}, decode {expected['decode_seconds']:,.0f}, "
        f"update {expected['update_seconds']:,.0f}); a response of the greatest length alone "
        f"{expected['longest_response_seconds']:,.0f} s",
        "assuming: " + ", ".join(f"{key} {value:g}" for key, value in expected["assumptions"].items()),
        "",
    ]
    if record["fits"]:
        lines.append("verdict: fits")
    else:
        change = record["nearest_change"]
        advice = f"this would: {change}" if change else "no change known here would, not on more chips either"
        lines.append(f"verdict: does not fit; by arithmetic {advice}")
    return "\n".join(lines) + "\n"


def _mesh(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _traffic(record: dict[str, Any]) -> list[str]:
    """Lines about collectives."""
    lines = []
    for name, unit in (
        ("prefill", "a prefill"),
        ("decode", "a token of every slot"),
        ("update", "a micro-batch with one chunk of logits"),
    ):
        each = record[name]
        if not each["compiled"]:
            continue
        if each["collectives"] is None:
            lines.append(f"collectives of {name}: not known, as it did not compile")
        else:
            parts = [f"{kind} {size / 1e6:,.1f} MB" for kind, size in each["collectives"].items()]
            lines.append(f"collectives of {name}, to a chip, {unit}: {', '.join(parts) or 'none'}")
    return lines or ["collectives: not known without compiling"]
