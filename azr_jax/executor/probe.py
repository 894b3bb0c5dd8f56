"""Which sandbox layers hold on this machine, found out by putting them up in a worker and trying to break out."""

from __future__ import annotations

import select
import time

from azr_jax.executor.worker import Worker

_SECONDS = 30.0


def sandbox_layers() -> dict[str, bool]:
    """Layer -> whether it holds here; empty if a worker does not even start. `lockdown.MANDATORY` names the musts."""
    worker = Worker(1, memory_mb=512)
    end = time.monotonic() + _SECONDS
    try:
        while not worker.ready and time.monotonic() < end:
            readable, _, _ = select.select([worker.control], [], [], max(0.0, end - time.monotonic()))
            if readable and worker.receive() is None:
                break
        return worker.layers
    finally:
        worker.stop()
