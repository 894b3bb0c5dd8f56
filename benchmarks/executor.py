"""Measured figures of the executor, in one process tree and one run: throughput, floor, scaling, soak, seed data.

    python benchmarks/executor.py                      # throughput on 1 and on all cores, ratios to a bare fork
    python benchmarks/executor.py --soak 100000        # memory and descriptors over many runs, a tenth of them hostile
    python benchmarks/executor.py --seeds FOLDER       # re-validate recorded (program, input, output) JSON lines

Prints one JSON object. `--seeds` reads files with `snippet`, `imports` and `input`/`output` or `inputs`/`outputs`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

from azr_jax.config import ExecutorConfig
from azr_jax.executor import ExecutorPool, Request, Verdict
from azr_jax.executor.bench import measure
from azr_jax.executor.sizing import default_workers
from azr_jax.executor.values import equal, parse_value

HOSTILE = (
    "def f(x):\n    raise SystemExit",
    "def f(x):\n    return 'x' * 10**10",
    "def f(x):\n    return ().__class__.__base__.__subclasses__()",
    "import os\ndef f(x):\n    return os.fork()",
    "def f(x):\n    return f(x)",
)


def throughput(seconds: float) -> dict[str, Any]:
    """Figures for one worker pinned to one core, and for a worker on every usable core."""
    cores = sorted(os.sched_getaffinity(0))
    figures = {}
    for count in sorted({1, len(cores)}):
        os.sched_setaffinity(0, cores[:count])
        figures[f"cores_{count}"] = measure(ExecutorConfig(workers=count), seconds)
    os.sched_setaffinity(0, cores)
    one, all_ = figures["cores_1"]["runs_per_second"], figures[f"cores_{len(cores)}"]["runs_per_second"]
    return {**figures, "scaling_per_core": all_ / one / len(cores)}


def soak(runs: int) -> dict[str, Any]:
    """`runs` runs in their own processes, a tenth hostile; memory and descriptors of the broker at ten points."""
    points = []
    with ExecutorPool(ExecutorConfig(workers=default_workers(beside_jax=False), cpu_seconds=0.2)) as pool:
        broker = pool.broker_pid
        done, start = 0, time.monotonic()
        for point in range(10):
            while done < runs * (point + 1) // 10:
                requests = [_soak_request(number) for number in range(done, done + 500)]
                for request, verdict in zip(requests, pool.run_all(requests), strict=True):
                    if (request.op == "run") != (verdict.status == "ok"):
                        raise RuntimeError(f"{request} got {verdict}")
                done += len(requests)
            stats = pool.stats()
            statm = Path(f"/proc/{broker}/statm").read_text().split()
            points.append(
                {
                    "runs": done,
                    "broker_rss_mb": round(int(statm[1]) * os.sysconf("SC_PAGESIZE") / 2**20, 1),
                    "worker_rss_mb": round(stats["worker_rss_mb"], 1),
                    "broker_descriptors": len(os.listdir(f"/proc/{broker}/fd")),
                    "zombies": _zombies(),
                }
            )
        return {"seconds": time.monotonic() - start, "points": points, "stats": stats}


def _soak_request(number: int) -> Request:
    if number % 10 == 9:  # through the gate or not, none of these may score: they are judged, and must be wrong
        program = f"{HOSTILE[number // 10 % len(HOSTILE)]}\n# {number}"
        return Request(str(number), "validate", program=program, input="1")
    return Request(str(number), "run", program=f"def f(x):\n    return [x, {number}]", input="1")


def _zombies() -> int:
    states = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                states.append((entry / "stat").read_text().rsplit(")", 1)[1].split()[0])
            except OSError:
                continue
    return states.count("Z")


def seeds(folder: Path) -> dict[str, Any]:
    """Re-validate recorded tasks; every one that does not come out as recorded is listed with the reason."""
    rows, requests = [], []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines()):
            row = json.loads(line)
            inputs, outputs = row.get("inputs") or [row["input"]], row.get("outputs") or [row["output"]]
            program = "\n".join([*row["imports"], row["snippet"]])
            rows.append((f"{path.name}:{number + 1}", outputs))
            requests.append(Request(str(len(requests)), "validate", program=program, inputs=tuple(inputs)))
    config = ExecutorConfig(workers=default_workers(beside_jax=False), output_chars=65_536)
    with ExecutorPool(config) as pool:
        start = time.monotonic()
        verdicts = pool.run_all(requests)
        seconds = time.monotonic() - start
    found = [_compare(verdict, outputs) for verdict, (_, outputs) in zip(verdicts, rows, strict=True)]
    unsound = {name: result for (name, _), result in zip(rows, found, strict=True) if result != "as recorded"}
    return {"rows": len(rows), "seconds": seconds, "results": Counter(found), "not_as_recorded": unsound}


def _compare(verdict: Verdict, outputs: list[str]) -> str:
    if verdict.status != "ok":
        return f"{verdict.status} {verdict.reason or verdict.error_type}".strip()
    for ours, recorded in zip(verdict.outputs, outputs, strict=True):
        if ours == recorded:
            continue
        if len(recorded) == 403 and recorded[200:203] == "...":
            kept = ours[:200] == recorded[:200] and ours[-200:] == recorded[-200:]
            return "recorded output was cut at 400 characters" if kept else "differs from the cut record"
        try:
            if not equal(parse_value(ours), parse_value(recorded)):
                return "differs"
        except ValueError:
            return "recorded output is no literal"
    return "as recorded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each part of the throughput figures")
    parser.add_argument("--soak", type=int, metavar="RUNS")
    parser.add_argument("--seeds", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.soak:
        figures = soak(args.soak)
    elif args.seeds:
        figures = seeds(args.seeds)
    else:
        figures = throughput(args.seconds)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release()}
    load = os.getloadavg()[0]
    figures |= {"python": platform.python_version(), "machine": machine, "load_average": load}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
