"""Running model-written Python: sandboxed processes, strict values, verdicts. Pure Python, never imports jax or numpy.

The names below load on first use, so that a worker process, which needs two small modules of this package, does not
carry the rest in the memory that every run copies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from azr_jax.executor.pool import ExecutorPool as ExecutorPool
    from azr_jax.executor.probe import sandbox_layers as sandbox_layers
    from azr_jax.executor.protocol import Request as Request
    from azr_jax.executor.protocol import Verdict as Verdict

_HOMES = {"ExecutorPool": "pool", "Request": "protocol", "Verdict": "protocol", "sandbox_layers": "probe"}
__all__ = ["ExecutorPool", "Request", "Verdict", "sandbox_layers"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
