"""A small pool shared by the tests that only ask questions of it.

The CPU limit is the default one: page faults cost several times more on some machines than on others, and a run that
should end in `memory` or `ok` must not be stopped for its time there.
"""

from __future__ import annotations

import pytest

from azr_jax.config import ExecutorConfig
from azr_jax.executor import ExecutorPool

CONFIG = ExecutorConfig(workers=2, cpu_seconds=1.0, wall_seconds=3.0, memory_mb=256)


@pytest.fixture(scope="session")
def pool():
    with ExecutorPool(CONFIG) as shared:
        yield shared
