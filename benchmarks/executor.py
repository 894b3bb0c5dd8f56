"""Measured figures of the executor, in one process tree and one run: throughput, floor, scaling, loops, sudden death.

    python benchmarks/executor.py                      # the figures of docs/executor.md, in two minutes
    python benchmarks/executor.py --soak 100000        # memory and descriptors over many runs, a tenth of them hostile
    python benchmarks/executor.py --seeds FOLDER       # re-validate recorded (program, input, output) JSON lines

Prints one JSON object. `--seeds` reads files with `snippet`, `imports` and `input`/`output` or `inputs`/`outputs`.
Rates mean little on a machine that does other work (see `load_average`); ratios are taken within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from azr_jax.config import ExecutorConfig
from azr_jax.executor import ExecutorPool, Request, Verdict
from azr_jax.executor.bench import measure
from azr_jax.executor.sizing import default_workers
from azr_jax.executor.values import equal, parse_value

RESULTS = Path(__file__).parent / "results" / "executor.json"
LOOPS = 20
SPIN = "def f(x):\n    while True: pass"
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


def plain(number: int) -> Request:
    return Request(str(number), "run", program=f"def f(x):\n    return [x, {number}]", input="1")


def cpu_of_a_run(runs: int = 3000) -> dict[str, Any]:
    """CPU milliseconds of a run by process, and so how many workers a broker can feed; zombies."""
    with ExecutorPool(ExecutorConfig(workers=default_workers(beside_jax=False))) as pool:
        pool.run_all([plain(number) for number in range(500)])
        broker = pool.broker_pids[0]
        before = _cpu_ms(broker), os.times()
        pool.run_all([plain(number) for number in range(1000, 1000 + runs)])
        after = _cpu_ms(broker), os.times()
        workers, children = (
            sum(_cpu_ms(pid, field) for pid in _children(broker)) / pool.stats()["children"] for field in (11, 13)
        )
        zombies = sum(_state(pid) == "Z" for pid in _descendants(os.getpid()))
    trainer = 1e3 * (after[1].user + after[1].system - before[1].user - before[1].system)
    milliseconds = {
        "trainer": trainer / runs,
        "broker": (after[0] - before[0]) / runs,
        "worker": workers,  # with its start, spread over all runs
        "child": children,
    }
    return {"cpu_ms_of_a_run": milliseconds, "zombies": zombies}


def loops_in_flight(seconds: float) -> dict[str, float]:
    """Benign runs a second beside LOOPS endless ones, as a share of the rate without them, taken before and after."""
    with ExecutorPool(ExecutorConfig(workers=default_workers(beside_jax=False), cpu_seconds=60)) as pool:
        first = 0

        def rate(for_seconds: float) -> float:
            nonlocal first
            done, start = 0, time.monotonic()
            while time.monotonic() - start < for_seconds:
                pool.run_all([plain(number) for number in range(first, first + 64)])
                first += 64
                done += 64
            return done / (time.monotonic() - start)

        rate(0.5)
        before = rate(seconds / 2)
        pool.submit([Request(f"loop {n}", "run", program=f"{SPIN}  # {n}", input="1") for n in range(LOOPS)])
        while pool.stats()["in_flight"] < LOOPS:
            time.sleep(0.1)
        time.sleep(0.5)  # until each is known to be slow
        during = rate(seconds)
        pool.give_up()
    with ExecutorPool(ExecutorConfig(workers=default_workers(beside_jax=False))) as pool:
        rate(0.5)
        after = rate(seconds / 2)
    return {
        "loops": LOOPS,
        "without": (before + after) / 2,
        "with": during,
        "share_kept": 2 * during / (before + after),
    }


def sudden_death() -> dict[str, Any]:
    """Seconds from SIGKILL of a trainer with busy children until no process of its pool is alive."""
    code = (
        "import sys, time\n"
        "from azr_jax.config import ExecutorConfig\n"
        "from azr_jax.executor import ExecutorPool, Request\n"
        "pool = ExecutorPool(ExecutorConfig(workers=2, cpu_seconds=60, wall_seconds=60))\n"
        f"pool.submit([Request(str(n), 'run', program={SPIN!r}, input=str(n)) for n in range(8)])\n"
        "pool.poll(1.0)\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    trainer.stdout.readline()
    family = _descendants(trainer.pid)
    start = time.monotonic()
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    while any(_state(pid) not in ("", "Z") for pid in family) and time.monotonic() - start < 30:
        time.sleep(0.005)
    return {"processes": len(family), "seconds": time.monotonic() - start}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def _children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _descendants(pid: int) -> list[int]:
    found = _children(pid)
    for child in found:  # grows meanwhile
        found += _children(child)
    return found


def _cpu_ms(pid: int, field: int = 11) -> float:
    """CPU time of a process (11), or of its children that have ended (13): proc(5), stat, utime and stime."""
    times = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[field : field + 2]
    return 1e3 * sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def soak(runs: int) -> dict[str, Any]:
    """`runs` runs in their own processes, a tenth hostile; memory and descriptors of the broker at ten points."""
    points = []
    with ExecutorPool(ExecutorConfig(workers=default_workers(beside_jax=False), cpu_seconds=0.2)) as pool:
        broker = pool.broker_pids[0]
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
    return plain(number)


def _zombies() -> int:
    return sum(_state(int(entry.name)) == "Z" for entry in Path("/proc").iterdir() if entry.name.isdecimal())


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
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the default figures are written")
    parser.add_argument("--soak", type=int, metavar="RUNS")
    parser.add_argument("--seeds", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/executor.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "cpu": _cpu_name(), "kernel": platform.release()},
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
    }
    if args.soak:
        figures |= soak(args.soak)
    elif args.seeds:
        figures |= seeds(args.seeds)
    else:
        figures |= throughput(args.seconds)
        figures |= cpu_of_a_run()
        figures["endless_loops"] = loops_in_flight(args.seconds)
        figures["sigkill_of_the_trainer"] = sudden_death()
    text = json.dumps(figures, indent=1)
    if not args.soak and not args.seeds:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
