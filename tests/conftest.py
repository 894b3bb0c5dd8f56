"""Set before anything imports JAX: CPU only, eight fake devices, nothing fetched; Hypothesis without deadlines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

import pytest
from hypothesis import settings

FAKE_DEVICES = "--xla_force_host_platform_device_count=8"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if FAKE_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), FAKE_DEVICES]
    if version("jaxlib").startswith("0.10."):  # XLA ends the process over a flag that it does not know
        flags.append("--xla_cpu_parallel_codegen_split_count=1")  # less work in all, where other tests have the cores
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

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
    """Half of the time of these tests would be the compiler's, for programs that run once."""
    if not LITTLE_OPTIMIZED & {request.path.parent.name, request.path.name}:
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for processes that they start
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # nothing compiled so is left to others
