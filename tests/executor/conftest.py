"""A small pool with short limits, shared by the tests that only ask questions of it."""

from __future__ import annotations

import pytest

from azr_jax.config import ExecutorConfig
from azr_jax.executor import ExecutorPool

CONFIG = ExecutorConfig(workers=2, cpu_seconds=0.3, wall_seconds=1.5, memory_mb=256)


@pytest.fixture(scope="session")
def pool():
    with ExecutorPool(CONFIG) as shared:
        yield shared
