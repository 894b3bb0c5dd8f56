"""How long two hosts need to talk, over the key-value store and over the devices, and to notice that one is dead.

    python benchmarks/hosts.py [--out benchmarks/results/hosts.json]

Two processes on loopback, one CPU device each. `store` moves the bytes as values of the coordination service's store,
`devices` as `Hosts.gather` does; both ways each host ends with what both said, in the same run, best of `--repeats`.
`meeting` is a `Hosts.agree`. Then host 1 is killed, and host 0 waits for it: seconds until host 0 has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from result import about, write

MEGABYTES = (1, 20)
MEETINGS = 200


def best(repeats: int, action: Callable[[int], object]) -> float:
    """Seconds of the fastest."""
    times = []
    for number in range(repeats):
        started = time.monotonic()
        action(number)
        times.append(time.monotonic() - started)
    return min(times)


def host(address: str, index: int, repeats: int) -> None:
    """One of the two processes. The first prints the figures as JSON."""
    from jax._src.distributed import global_state

    from azr_jax.dist.join import join

    with join(address, 2, index) as hosts:
        store: Any = global_state.client
        figures: dict[str, Any] = {"megabytes": list(MEGABYTES), "store_seconds": [], "devices_seconds": []}
        for size in MEGABYTES:
            data = os.urandom(size * 1_000_000)

            def by_store(number: int, size: int = size, data: bytes = data) -> None:
                store.key_value_set_bytes(f"bench/{size}/{number}/{index}", data)
                for other in range(2):
                    store.blocking_key_value_get_bytes(f"bench/{size}/{number}/{other}", 60_000)

            hosts.gather("warm-up", data)
            figures["store_seconds"].append(best(repeats, by_store))
            figures["devices_seconds"].append(best(repeats, lambda number, data=data: hosts.gather("bytes", data)))
        figures["meeting_ms"] = 1e3 * best(1, lambda _: [hosts.agree("all", False) for _ in range(MEETINGS)]) / MEETINGS
        if hosts.leads:
            print(json.dumps(figures), flush=True)
        hosts.agree("the death of host 1", False)
        if not hosts.leads:
            print("ready", flush=True)
            time.sleep(600)
        hosts.agree("what never comes", False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--host", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.host:
        host(args.host[0], int(args.host[1]), args.repeats)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, "--repeats", str(args.repeats), "--host", address]
    quiet = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": quiet}
    first, second = (subprocess.Popen([*command, str(index)], **pipes) for index in range(2))  # type: ignore[call-overload]
    while "ready" not in (line := second.stdout.readline()):
        assert line, second.stderr.read()
    second.kill()
    died = time.monotonic()
    out, errors = first.communicate()
    seconds = time.monotonic() - died
    figures = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    figures["death_seconds"], figures["death_exit_code"] = seconds, first.returncode
    figures["death_says"] = errors.strip().splitlines()[-1]
    columns = (figures["megabytes"], figures["store_seconds"], figures["devices_seconds"])
    for size, store, devices in zip(*columns, strict=True):
        print(
            f"{size} MB of each host: store {store:.3f} s, devices {devices:.3f} s, {store / devices:.0f} times faster"
        )
    print(f"a meeting: {figures['meeting_ms']:.1f} ms")
    print(f"a death was noticed after {seconds:.0f} s: {figures['death_says']}")
    if args.out:
        write(args.out, about() | figures)


if __name__ == "__main__":
    main()
