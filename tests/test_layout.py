"""House rules that a machine can check: who imports what, sizes, prints, nothing evaluated."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "azr_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450

#: Parts that run where there is no JAX, and all that they may import of azr_jax.
PURE = ("azr_jax.tasks", "azr_jax.executor", "azr_jax.config", "azr_jax.errors")
ARRAYS = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax", "torch", "tensorflow", "transformers", "safetensors")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PURE_FILES = [path for path in FILES if is_below(module_name(path), PURE)]


def test_pure_parts_import_neither_arrays_nor_the_rest_of_the_package():
    assert len(PURE_FILES) > 4
    for path in PURE_FILES:
        for name in imports(path):
            assert not is_below(name, ARRAYS), f"{path.relative_to(ROOT)} imports {name}"
            inside = name.startswith("azr_jax.") and not is_below(name, PURE)
            assert not inside, f"{path.relative_to(ROOT)} imports {name}, which may import JAX"


def test_pure_parts_load_no_arrays():
    modules = [module_name(path) for path in PURE_FILES if path.stem != "__main__"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {ARRAYS!r} if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_LINES
    assert path.name != "utils.py"
    assert ast.get_docstring(tree), "a module says what it is"
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    if path != PACKAGE / "cli.py":
        assert "print" not in calls, "print belongs to cli.py"
    unpickling = {name.partition(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "shelve"}
    assert not unpickling, "data is JSON, arrays are safetensors or Orbax"
    if not is_below(module_name(path), ("azr_jax.executor",)):
        assert not calls & {"eval", "exec"}, "programs run in the executor's children only"


def test_requirements_mirror_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert [line for line in lines if line and not line.startswith("#")] == project["dependencies"]
    assert set(project["optional-dependencies"]) == {"test", "tpu", "cuda", "wandb"}


def test_ci_entry_is_executable():
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
