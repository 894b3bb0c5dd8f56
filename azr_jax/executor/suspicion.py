"""Could a program's result depend on hash order or on addresses, so that two runs might agree by luck?

A program that is paid for passing, and whose output is a coin, passes two runs half the time; `validate` therefore
runs suspects more often. A suspect is whoever handles sets, hashes or ids, or holds an object whose default text shows
an address (functions, generators, iterators, bound methods, dict views, which also build sets) anywhere but where it
is used up at once: called, looped over, or handed to `sorted`, `list`, `sum`, `join` and the like.
The test looks at text only and errs towards suspicion, which costs time; it decides nothing about validity.
"""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Iterator
from typing import Any

SUSPECT_RUNS = 8  #: that must agree; a coin passes with 2**-(runs - 1)

#: Names and methods that make or order sets, show hashes, ids or the text of objects, or tell how much memory is free.
_NAMES = frozenset("BaseException MemoryError ascii frozenset hash id memoryview object repr set super".split())
_METHODS = frozenset({"difference", "format_map", "intersection", "symmetric_difference", "union"})
#: Modules whose functions give plain data, or text without addresses; what is not here is suspect.
_PLAIN_MODULES = frozenset(
    "__future__ bisect cmath collections decimal fractions functools heapq itertools json math operator re statistics "
    "string typing".split()
)
#: Calls whose result is an iterator, a view or a wrapper with an address in its text.
_MAKERS = frozenset({"enumerate", "filter", "iter", "map", "reversed", "zip"})
_MAKER_METHODS = frozenset({"elements", "finditer", "items", "keys", "values"})
_MAKER_FUNCTIONS = frozenset({"cmp_to_key", "merge", "partial", "partialmethod", "scanner", "singledispatch"})
#: Calls that use up what they are given, by how many of their first arguments; `max` and `min` of several return one.
_CONSUMERS = dict.fromkeys(
    "Counter OrderedDict all any bytearray bytes deque dict enumerate extend fsum islice iter join len list next "
    "pairwise prod reversed sorted sum tuple update".split(),
    1,
)
_CONSUMERS |= dict.fromkeys("accumulate dropwhile filter groupby reduce sub takewhile".split(), 2)
_CONSUMERS |= dict.fromkeys("chain map merge product starmap zip zip_longest".split(), 100)
_SUSPECT_NODES = (ast.AsyncFunctionDef, ast.ClassDef, ast.Set, ast.SetComp, ast.YieldFrom)
_ADDRESS = " at 0x"


@functools.lru_cache(maxsize=512)
def suspicious(program: str) -> bool:
    """Whether the program is a suspect. Never raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(program)
        return _Inspection(tree).suspects()
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
        return True


def mentions_address(text: str) -> bool:
    """Whether an output looks like the default text of an object."""
    return _ADDRESS in text


def holds_set(value: Any) -> bool:
    """Whether a plain value (an argument list, too) is or contains a set, whose order a program could show."""
    todo = [value]
    while todo:
        item = todo.pop()
        kind = type(item)
        if kind in (set, frozenset):
            return True
        if kind in (list, tuple, dict):
            todo += item
        if kind is dict:
            todo += item.values()
    return False


class _Inspection:
    """One program's tree, with the parent of every node and the names that stand for functions and modules."""

    def __init__(self, tree: ast.Module) -> None:
        self._nodes = list(ast.walk(tree))
        self._parent = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}
        self._functions: set[str] = set()
        self._generators: set[str] = set()
        self._modules: dict[str, str] = {}  # name here -> name of the module
        self._imported: dict[str, str] = {}  # name -> "module.name"
        for node in self._nodes:
            self._note_names(node)

    def suspects(self) -> bool:
        return any(self._suspect(node) for node in self._nodes)

    def _note_names(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            self._functions.add(node.name)
            if any(isinstance(inner, ast.Yield) for inner in ast.walk(node)):
                self._generators.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            self._functions.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Import):
            self._modules.update((alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            self._imported.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def _suspect(self, node: ast.AST) -> bool:
        if isinstance(node, _SUSPECT_NODES):
            return True
        if isinstance(node, ast.Import | ast.ImportFrom):
            return any(name.split(".")[0] not in _PLAIN_MODULES for name in _modules_of(node))
        if isinstance(node, ast.Name):
            if node.id in _NAMES or (node.id.startswith("__") and node.id != "__name__"):
                return True
            return isinstance(node.ctx, ast.Load) and node.id in self._functions and not self._used_up(node)
        if isinstance(node, ast.Attribute):
            return self._suspect_attribute(node)
        if isinstance(node, ast.Call):
            return self._makes_holder(node.func) and not self._used_up(node)
        if isinstance(node, ast.FormattedValue):
            return node.conversion in (ord("r"), ord("a"))
        if isinstance(node, ast.Lambda) and isinstance(self._parent.get(node), ast.Assign):
            return False  # its name is looked after
        return isinstance(node, ast.GeneratorExp | ast.Lambda) and not self._used_up(node)

    def _suspect_attribute(self, node: ast.Attribute) -> bool:
        if node.attr in _METHODS or node.attr.startswith("__"):
            return True
        of_module = isinstance(node.value, ast.Name) and node.value.id in self._modules
        return isinstance(node.ctx, ast.Load) and not of_module and not self._used_up(node)

    def _makes_holder(self, function: ast.expr) -> bool:
        """Whether calling it gives an object that holds an address or an order."""
        if isinstance(function, ast.Attribute):
            module = self._modules.get(function.value.id, "") if isinstance(function.value, ast.Name) else ""
            return module == "itertools" or function.attr in _MAKER_METHODS | (
                _MAKER_FUNCTIONS if module else frozenset()
            )
        if not isinstance(function, ast.Name):
            return not isinstance(function, ast.Lambda)  # whatever a call or a subscript gave
        origin = self._imported.get(function.id, "")
        return (
            function.id in _MAKERS
            or function.id in self._generators
            or origin.startswith("itertools.")
            or origin.partition(".")[2] in _MAKER_FUNCTIONS | _MAKER_METHODS
        )

    def _used_up(self, node: ast.AST) -> bool:
        """Whether the object goes no further than the expression or loop around it."""
        parent = self._parent.get(node)
        if isinstance(parent, ast.For | ast.comprehension):
            return parent.iter is node
        if isinstance(parent, ast.Call):
            return parent.func is node or _consumes(parent, node)
        if isinstance(parent, ast.keyword):
            return parent.arg == "key"
        if isinstance(parent, ast.Compare):
            return all(isinstance(operator, ast.In | ast.NotIn) for operator in parent.ops)
        if isinstance(parent, ast.Assign):  # a, b = ...
            return isinstance(parent.targets[0], ast.Tuple | ast.List)
        return isinstance(parent, ast.Starred) or node in getattr(parent, "decorator_list", ())


def _consumes(call: ast.Call, argument: ast.AST) -> bool:
    function = call.func
    name = (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )
    if name in ("max", "min"):
        return len(call.args) == 1
    return argument in call.args[: _CONSUMERS.get(name, 0)]


def _modules_of(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        yield node.module or ""
