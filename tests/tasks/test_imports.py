"""`azr_jax.tasks` is pure Python: importing all of it loads neither JAX nor NumPy."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import azr_jax.tasks


def test_no_jax_and_no_numpy() -> None:
    modules = [f"azr_jax.tasks.{module.name}" for module in pkgutil.iter_modules(azr_jax.tasks.__path__)]
    assert "azr_jax.tasks.full" in modules
    code = f"import sys, {', '.join(modules)}; sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'flax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
