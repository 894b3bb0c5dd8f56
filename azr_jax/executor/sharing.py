"""A question about a program's text that decides how it is run, never whether it is safe or valid.

`shareable`: may several inputs be run one after another in one child? Each gets a fresh namespace, so only what lives
outside it could leak: imported modules and builtins. The test is conservative; refusing costs time, not correctness.
"""

from __future__ import annotations

import ast
import functools
import warnings

#: Imports without state that a program could change by plain calls.
_STATELESS_MODULES = frozenset({"__future__", "bisect", "cmath", "collections", "heapq", "itertools", "math", "string"})
#: Names through which shared objects could be reached or changed.
_POWERFUL_NAMES = frozenset(
    "__import__ classmethod compile delattr dir eval exec getattr globals locals object property setattr staticmethod "
    "super type vars".split()
)
_FRAME_ATTRIBUTES = ("gi_", "cr_", "ag_", "tb_", "f_", "co_")


@functools.lru_cache(maxsize=512)
def shareable(program: str) -> bool:
    """Whether inputs of the program may share a child. Never raises."""
    tree = _parse(program)
    if tree is None:
        return False
    imports = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports = True
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(name.split(".")[0] not in _STATELESS_MODULES for name in names):
                return False
        elif isinstance(node, ast.Name) and (node.id in _POWERFUL_NAMES or node.id.startswith("__")):
            return False
        elif isinstance(node, ast.Attribute) and node.attr.startswith(("_", *_FRAME_ATTRIBUTES)):
            return False
    return not (imports and _changes_attributes(tree))


def _changes_attributes(tree: ast.AST) -> bool:
    """Whether an attribute of anything is assigned or deleted: with imports around, it might be a module's."""
    return any(isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) for node in ast.walk(tree))


def _parse(program: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(program)
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
        return None
