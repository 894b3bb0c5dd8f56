"""How tests compile: as users do where bits count, and in half of the time where mathematics is compared.

What makes programs faster at running costs more than it gives back where a program runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import pytest

#: XLA ends a process over a flag that it does not know, so these are for the version that has them: kernels by the
#: older generator, which is quicker at making them, and each by a single thread, as other tests have the other cores.
OLDER_KERNELS = "xla_cpu_use_fusion_emitters"
ONE_THREAD = "xla_cpu_parallel_codegen_split_count"
KNOWN = version("jaxlib").startswith("0.10.")


def xla_flags(devices: int, quick: bool = False) -> str:
    """XLA_FLAGS of a process with so many fake devices."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    if quick:
        flags.append("--xla_backend_optimization_level=0")
    if KNOWN:
        flags.append(f"--{ONE_THREAD}=1")
    if KNOWN and quick:
        flags.append(f"--{OLDER_KERNELS}=false")
    return " ".join(flags)


@contextmanager
def quickly() -> Iterator[None]:
    """What this process compiles meanwhile."""
    import jax
    from jax._src import compiler

    usual = compiler.get_compile_options

    def get_compile_options(*args: Any, **keys: Any) -> Any:
        options = usual(*args, **keys)
        if getattr(keys.get("backend"), "platform", None) == "cpu":  # the TPU compiler does not know it
            options.env_option_overrides = [*options.env_option_overrides, (OLDER_KERNELS, False)]
        return options

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        if KNOWN:  # XLA reads its flags once a process; JAX has a way to set them for a function alone
            patch.setattr(compiler, "get_compile_options", get_compile_options)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # nothing compiled so is left to others
