"""What must not grow in the trainer process: programs XLA compiled, and resident memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
LOWER_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"


class CompileCounter:
    """Counts from its creation; JAX announces every compilation and keeps no tally of its own."""

    def __init__(self) -> None:
        self.programs = 0
        self.seconds = 0.0  # spent on them, lowering included
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.programs += event == COMPILE_EVENT
        self.seconds += duration_secs if event in (COMPILE_EVENT, LOWER_EVENT) else 0.0


def resident_mb() -> float:
    """Resident memory in MiB; its peak where /proc does not exist (macOS, which counts in bytes)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
