"""Plans every config for the hardware in its name, at full depth, and writes the tables of docs/hardware.md.

    pip install -e ".[tpu]"
    python benchmarks/plan_all.py             # 20 to 60 minutes on two cores; what is done is kept
    python benchmarks/plan_all.py --only v5e  # configs whose name contains this
    python benchmarks/plan_all.py --tables    # only write the tables again, with expected times by today's arithmetic

Each plan is recorded in benchmarks/results/plan.json as soon as it is there. Configs for GPUs are planned from shapes,
and so is, in the table alone, what has not been compiled yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from azr_jax.chips import GIB
from azr_jax.config_loader import load_config
from azr_jax.plan import make_plan, shape_of
from azr_jax.plan_compile import versions
from azr_jax.plan_estimate import PROGRAMS, Setup
from azr_jax.plan_hardware import Target, parse_target

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "benchmarks/results/plan.json"
CHECKS = ROOT / "benchmarks/results/plan_check.json"
PAGE = ROOT / "docs/hardware.md"
FIRST = (
    "qwen2.5-coder-3b_v5e-8",
    "qwen2.5-7b_v5e-16",
    "qwen2.5-7b_v6e-8",
    "qwen2.5-7b_h200",
    "qwen2.5-coder-3b_h100",
)
PENDING = "from shapes; not compiled yet"


def planned_configs() -> Iterator[tuple[str, Target]]:
    """(name, target) of every config for named hardware; those in FIRST come first."""
    names = sorted(path.stem for path in CONFIGS.glob("*_*.yaml") if path.stem != "debug_cpu")
    for name in sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        hardware = name.rpartition("_")[2]
        yield name, parse_target(f"{hardware}:1" if hardware.startswith("h") else hardware)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only configs whose name contains this text")
    parser.add_argument("--tables", action="store_true", help="plan nothing")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, target in planned_configs():
        if args.only in name and not args.tables:
            logging.info("planning %s for %s", name, target.name)
            plan = make_plan(load_config(CONFIGS / f"{name}.yaml"), target)
            record(name, plan)
    renew_times()
    PAGE.write_text(with_tables(PAGE.read_text()))


def renew_times() -> None:
    """Seconds and tokens a second follow from shapes: nothing that was compiled has to be compiled again for them."""
    results = json.loads(RESULTS.read_text())
    for name, target in planned_configs():
        if name in results["plans"]:
            config = load_config(CONFIGS / f"{name}.yaml")
            results["plans"][name]["expected"] = Setup(config, shape_of(config.model), target).expected()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def record(name: str, plan: dict[str, Any]) -> None:
    """Put one plan into the results."""
    known = json.loads(RESULTS.read_text())["plans"] if RESULTS.exists() else {}
    plan |= {"date": datetime.date.today().isoformat(), "versions": versions(), "commit": commit()}
    results = {
        "command": "make plan-all",
        "machine": f"{os.cpu_count()} cores {platform.machine()}, no TPU, no GPU",
        "plans": dict(sorted((known | {name: plan}).items())),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def commit() -> str | None:
    """What was planned with, -dirty if code or configs were changed since; None outside a clone."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "azr_jax", "configs"], capture_output=True, text=True)
    return found + "-dirty" * bool(changed.stdout) if found else None


def with_tables(page: str) -> str:
    """The page with what stands between its markers made anew from the results."""
    plans, checks = json.loads(RESULTS.read_text())["plans"], json.loads(CHECKS.read_text())["cases"]
    tables = {"plans": plans_table(plans), "accuracy": accuracy_table(plans), "checks": checks_table(checks)}
    for marker, table in tables.items():
        begin, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}{table}{end}{rest.partition(end)[2]}"
    return page


def plans_table(plans: dict[str, Any]) -> str:
    """One line a config."""
    lines = [
        "| config | chips | prefill | decode | update | of | KV tokens a host | a step, s | longest, s | verdict "
        "| bytes by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, target in planned_configs():
        plan = plans.get(name) or make_plan(load_config(CONFIGS / f"{name}.yaml"), target, compiling=False)
        peaks = " | ".join(f"{plan[program]['peak_bytes'] / GIB:.1f}" for program in PROGRAMS)
        verdict = "fits" if plan["fits"] else "does not fit"
        compiler = f"libtpu {plan['versions']['libtpu']}" if plan["update"]["compiled"] else ""
        origin = compiler or ("from shapes" if name in plans else PENDING)
        lines.append(
            f"| `{name}` | {plan['chips']} | {peaks} | {plan['usable_bytes_per_chip'] / GIB:.1f} | "
            f"{plan['kv_tokens_per_host']:,} | {plan['expected']['step_seconds']:.0f} | "
            f"{plan['expected']['longest_response_seconds']:.0f} | {verdict} | {origin} |"
        )
    return "\n".join(lines) + "\n"


def accuracy_table(plans: dict[str, Any]) -> str:
    """Arithmetic against the compiler, for what was compiled."""
    lines = ["| config | program | compiler, GiB | shapes, GiB | error |", "|---|---|---|---|---|"]
    for name, plan in plans.items():
        for program in PROGRAMS:
            each = plan[program]
            if each["compiled"]:
                error = each["estimated_peak_bytes"] / each["peak_bytes"] - 1
                sizes = [each[f"{kind}peak_bytes"] / GIB for kind in ("", "estimated_")]
                lines.append(f"| `{name}` | {program} | {sizes[0]:.2f} | {sizes[1]:.2f} | {100 * error:+.0f} % |")
    return "\n".join(lines) + "\n"


def checks_table(cases: list[dict[str, Any]]) -> str:
    """What benchmarks/plan_check.py found."""
    lines = ["| update on this CPU | process grew, MiB | compiler, MiB | error | shapes, MiB | error |"]
    lines.append("|---|---|---|---|---|---|")
    for case in cases:
        kinds = ("compiler", "shapes")
        cells = [f"{case[f'{kind}_mib']:,.0f} | {100 * case[f'{kind}_error']:+.1f} %" for kind in kinds]
        lines.append(f"| {case['case']} | {case['grown_mib']:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
