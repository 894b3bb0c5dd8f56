"""Set before anything imports JAX: CPU only, eight fake devices, nothing fetched; Hypothesis without deadlines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
from hypothesis import settings

from tests.compiling import quickly, xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), xla_flags(8)]).strip()

# A shared machine is slow at times: no deadlines. The same examples on every run: a failure can be run again.
settings.register_profile("azr_jax", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("azr_jax")

#: Folders and files whose tests compare mathematics within a tolerance, or no numbers. Whether the engine gives the
#: same bits whatever else it does, and a run after a kill, is a matter of what the compiler makes of them. Those
#: compile as users do.
LITTLE_OPTIMIZED = {"learn", "models", "test_sample.py", "test_score.py"}


@pytest.fixture(scope="module")
def two_devices() -> Iterator[None]:
    """Runs and samples on two of the eight devices: eight that share two cores mostly wait for each other."""
    import jax

    from azr_jax import sample, train
    from azr_jax.dist.mesh import make_mesh

    with pytest.MonkeyPatch.context() as patch:
        for module in (sample, train):
            patch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:2]))
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splash attention, the TPU's, on CPU, in blocks of 128."""
    from azr_jax.models import attention_kernels

    library = attention_kernels.splash_lib
    make = partial(library.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(library, "make_splash_mha_single_device", make)
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCK", 128)


@pytest.fixture(autouse=True, scope="module")
def little_optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    with quickly() if LITTLE_OPTIMIZED & {request.path.parent.name, request.path.name} else nullcontext():
        yield
