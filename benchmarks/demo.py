"""The demo measured: several seeds of the full algorithm, controls, and a run four times as long.

    python benchmarks/demo.py --out benchmarks/results/demo.json --seeds 0 1 2
    python benchmarks/demo.py --out benchmarks/results/controls.json --controls no_updates random_rewards
    python benchmarks/demo.py --out benchmarks/results/long.json --seeds 0 --override steps=400 eval.every=50

Each run is `azr-jax train configs/demo.yaml` in a process of its own, one after the other. The result holds the
before/after table on fresh held-out tasks, the curve on the fixed set, health of the proposer by quarter of the run,
minutes of training (evaluations in between included), machine, versions and command. A run folder that is already
complete is only evaluated again. Rows of an existing result file with other (seed, control) are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEALTH = ("valid", "accepted", "duplicate", "rate_between", "statements", "solve_rate")
KINDS = ("deduction", "abduction", "induction")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
    }


def mean(rows: list[dict[str, float]], name: str) -> float | None:
    """Mean of a metric over the rows that have it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return round(sum(values) / len(values), 4) if values else None


def health(rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The proposer by quarter of the run: shares, statements, distinct programs, thinking, length."""
    rows = [row for row in rows if row["step"] > 0]
    quarters = [rows[len(rows) * q // 4 : len(rows) * (q + 1) // 4] for q in range(4)]
    table = []
    for part in quarters:
        entry: dict[str, Any] = {"steps": [part[0]["step"], part[-1]["step"]]} if part else {}
        for name in HEALTH:
            values = [mean(part, f"propose/{name}/{kind}") for kind in KINDS]
            known = [value for value in values if value is not None]
            entry[name] = round(sum(known) / len(known), 4) if known else None
        entry["unique_programs"] = mean(part, "propose/unique_programs")
        entry["new_programs"] = mean(part, "propose/new_programs")
        entry["think_share"] = [mean(part, f"solve/think_share/{kind}") for kind in KINDS]
        entry["length"] = [mean(part, f"solve/length/{kind}") for kind in KINDS]
        entry["reward_propose"] = [mean(part, f"reward/propose/{kind}") for kind in KINDS]
        entry["seconds_a_step"] = mean(part, "time/step")
        table.append(entry)
    return table


def run(seed: int, control: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One run and its figures."""
    name = f"{control}_seed{seed}"
    command = [sys.executable, "-m", "azr_jax", "train", str(ROOT / "configs/demo.yaml")]
    command += [f"run_dir={folder / name}", f"seed={seed}", f"control={control}", *overrides]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment, cwd=ROOT)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {"step": row["step"]}
        | {
            mode: {kind: round(row[f"eval/{mode}/{kind}"], 4) for kind in (*KINDS, "pooled")}
            for mode in ("sampled", "greedy")
        }
        | {"gain": {mode: round(row[f"eval/gain/{mode}/pooled"], 4) for mode in ("sampled", "greedy")}}
        | {"think_share": round(row["eval/think_share/sampled"], 4), "length": round(row["eval/length/sampled"], 2)}
        for row in rows
        if "eval/sampled/pooled" in row
    ]
    return {
        "seed": seed,
        "control": control,
        "overrides": overrides,
        "command": " ".join(["azr-jax train configs/demo.yaml", f"seed={seed}", f"control={control}", *overrides]),
        "steps": rows[-1]["step"],
        "minutes": round(sum(row.get("time/step", 0) for row in rows) / 60, 2),
        "fresh": json.loads((folder / name / "outcome.json").read_text()),
        "curve": curve,
        "health": health(rows),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: pooled gains on fresh tasks, by run."""
    lines = ["| control | seed | steps | minutes | sampled | greedy | best to last (sampled) |", "|---" * 7 + "|"]
    for entry in runs:
        cells = []
        for mode in ("sampled", "greedy"):
            line = next(row for row in entry["fresh"] if row["mode"] == mode and row["set"] == "pooled")
            low, high = 100 * line["low"], 100 * line["high"]
            cells.append(f"{100 * line['difference']:+.1f} [{low:+.1f}, {high:+.1f}]")
        pooled = [point["sampled"]["pooled"] for point in entry["curve"]]
        slip = f"{100 * (pooled[-1] - max(pooled)):+.1f}"
        head = f"| {entry['control']} | {entry['seed']} | {entry['steps']} | {entry['minutes']} "
        lines.append(head + f"| {cells[0]} | {cells[1]} | {slip} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--controls", nargs="+", default=["none"])
    parser.add_argument("--override", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/benchmark", help="where the run folders go")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    done = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for control in args.controls:
        for seed in args.seeds:
            entry = run(seed, control, args.override, args.runs)
            done = [old for old in done if (old["seed"], old["control"]) != (seed, control)] + [entry]
            result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "runs": done}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(done))


if __name__ == "__main__":
    main()
