"""Parsing model-written programs safely, and finding out which scope every identifier belongs to.

Both the static rules (`validation.py`) and the canonical form (`canonical.py`) need to know whether a name is the
program's own or Python's, so the scoping rules live here once. Text is only ever parsed, never compiled or run: length
is capped first, and whatever the parser throws (NUL bytes, lone surrogates, deep nesting) becomes a `ProgramError`.
Not modelled: name mangling of `__private` class attributes, and names bound by `from m import *`.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

#: Longest program in characters; about the 8096-token response limit of the paper (Table 3) spent on code alone.
MAX_PROGRAM_CHARS = 16384
#: Deepest syntax tree, so that our recursive walks never meet Python's recursion limit (ordinary programs: below 40).
MAX_DEPTH = 120

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
#: Modules that only serve type hints: their imports neither bind names nor count as structure.
HINT_MODULES = frozenset({"typing", "__future__"})


class ProgramError(ValueError):
    """The text cannot be read as a program; `reason` is `syntax_error`, `too_long` or `too_deep`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_program(program: str) -> ast.Module:
    """Parse `program`. Raises ProgramError, and nothing else, on any text."""
    if len(program) > MAX_PROGRAM_CHARS:
        raise ProgramError("too_long")
    try:
        with warnings.catch_warnings():  # "invalid escape sequence" is the model's business, not our stderr's
            warnings.simplefilter("ignore")
            tree = ast.parse(program)
    except (RecursionError, MemoryError):  # how CPython's parser reports deep nesting
        raise ProgramError("too_deep") from None
    except (SyntaxError, ValueError, OverflowError):  # ValueError covers NUL and UnicodeError
        raise ProgramError("syntax_error") from None
    if _depth(tree) > MAX_DEPTH:
        raise ProgramError("too_deep")
    return tree


def _depth(tree: ast.AST) -> int:
    """Levels below the root; iterative, because the tree may be deeper than Python's stack."""
    deepest, stack = 0, [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        deepest = max(deepest, depth)
        stack.extend((child, depth + 1) for child in ast.iter_child_nodes(node))
    return deepest


class Scope:
    """One namespace of a program. `bound` maps a name to the order in which the scope first binds it."""

    def __init__(self, node: ast.AST, parent: Scope | None, number: int) -> None:
        self.node = node
        self.parent = parent
        self.number = number  # order in which the program opens it
        self.bound: dict[str, int] = {}
        self.counts: dict[str, int] = {}  # how many times each name is bound
        self.globals: set[str] = set()
        self.nonlocals: set[str] = set()
        self.parameters: dict[str, list[str]] = {}  # of the functions defined here

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_module(self) -> bool:
        return self.parent is None

    def module(self) -> Scope:
        """The outermost scope."""
        scope = self
        while scope.parent is not None:
            scope = scope.parent
        return scope

    def bind(self, name: str) -> None:
        """Record that a statement of this scope binds `name`."""
        if name in self.nonlocals:
            return
        scope = self.module() if name in self.globals else self
        scope.bound.setdefault(name, len(scope.bound))
        scope.counts[name] = scope.counts.get(name, 0) + 1

    def resolve(self, name: str) -> Scope | None:
        """The scope whose binding `name` refers to when read here; None: a builtin (or an undefined name)."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.globals:
                module = scope.module()
                return module if name in module.bound else None
            # Functions nested in a class do not see the names of the class.
            if name in scope.bound and (scope is self or not scope.is_class):
                return scope
            scope = scope.parent
        return None


class Scopes:
    """The scopes of a parsed program; `of(node)` is where the identifiers that `node` itself carries live."""

    def __init__(self, tree: ast.Module) -> None:
        self._where: dict[ast.AST, Scope] = {}
        self._opened = 0
        self.module = self._open(tree, None)
        for child in tree.body:
            self._visit(child, self.module)

    def of(self, node: ast.AST) -> Scope:
        """The scope of a node of the tree."""
        return self._where[node]

    def _open(self, node: ast.AST, parent: Scope | None) -> Scope:
        scope = Scope(node, parent, self._opened)
        self._opened += 1
        return scope

    def _visit_all(self, nodes: list[ast.AST], scope: Scope) -> None:
        for node in nodes:
            self._visit(node, scope)

    def _visit(self, node: ast.AST, scope: Scope) -> None:
        self._where[node] = scope
        if isinstance(node, Function | ast.Lambda):
            self._function(node, scope)
        elif isinstance(node, ast.ClassDef):
            scope.bind(node.name)
            self._visit_all([*node.decorator_list, *node.bases, *node.keywords, *_type_parameters(node)], scope)
            self._visit_all([*node.body], self._open(node, scope))
        elif isinstance(node, Comprehension):
            self._comprehension(node, scope)
        elif isinstance(node, ast.NamedExpr):
            self._visit(node.value, scope)
            while isinstance(scope.node, Comprehension) and scope.parent is not None:
                scope = scope.parent  # PEP 572: the target belongs to the function around the comprehension
            self._visit(node.target, scope)
        elif isinstance(node, ast.AnnAssign) and node.value is None and isinstance(node.target, ast.Name):
            self._where[node.target] = scope  # a bare annotation gives no value
            self._visit(node.annotation, scope)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            self._import(node, scope)
        else:
            self._bind_own(node, scope)
            self._visit_all(list(ast.iter_child_nodes(node)), scope)

    def _function(self, node: Function | ast.Lambda, scope: Scope) -> None:
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every = [*named, *(extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None)]
        outside: list[ast.AST] = [*arguments.defaults, *(d for d in arguments.kw_defaults if d is not None)]
        outside += [argument.annotation for argument in every if argument.annotation is not None]
        if not isinstance(node, ast.Lambda):
            scope.bind(node.name)
            scope.parameters[node.name] = [argument.arg for argument in named]
            outside += [*node.decorator_list, *([node.returns] if node.returns is not None else [])]
            outside += _type_parameters(node)
        self._visit_all(outside, scope)
        inner = self._open(node, scope)
        self._where[arguments] = inner
        for argument in every:
            self._where[argument] = inner
            inner.bind(argument.arg)
        self._visit_all([node.body] if isinstance(node, ast.Lambda) else [*node.body], inner)

    def _comprehension(self, node: Comprehension, scope: Scope) -> None:
        inner = self._open(node, scope)
        for index, generator in enumerate(node.generators):
            self._where[generator] = inner
            self._visit(generator.target, inner)
            self._visit(generator.iter, inner if index else scope)  # the first iterable is evaluated outside
            self._visit_all([*generator.ifs], inner)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self._visit_all([*results], inner)

    def _import(self, node: ast.Import | ast.ImportFrom, scope: Scope) -> None:
        for alias in node.names:
            self._where[alias] = scope
            if not is_hint_import(node, alias) and alias.name != "*":
                scope.bind(bound_name(alias))

    def _bind_own(self, node: ast.AST, scope: Scope) -> None:
        """Binding and scope statements whose identifiers are plain strings of the node."""
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            scope.bind(node.id)
        elif isinstance(node, ast.Global):
            scope.globals.update(node.names)
            for name in node.names:
                scope.module().bind(name)
        elif isinstance(node, ast.Nonlocal):
            scope.nonlocals.update(node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name is not None:
            scope.bind(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest is not None:
            scope.bind(node.rest)


def _type_parameters(node: ast.AST) -> list[ast.AST]:
    """`T` of `def f[T](x: T)`, which Python 3.11 does not know."""
    return getattr(node, "type_params", [])


def bound_name(alias: ast.alias) -> str:
    """The local name an import gives."""
    return alias.asname or alias.name.split(".")[0]


def is_hint_import(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> bool:
    """Whether an import only serves type hints."""
    module = node.module if isinstance(node, ast.ImportFrom) else alias.name
    return (module or "").split(".")[0] in HINT_MODULES


def imported_modules(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The dotted modules an import statement names; "." for a relative import."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        yield "." if node.level else node.module or "."
