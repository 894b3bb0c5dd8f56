"""The canonical form of a program, by which duplicates are refused however they are renamed or decorated.

Released AZR keeps duplicates; replications that do so see the proposer fall back on near-identical programs, and fixes
that compare *text* are gamed by new identifiers. So identity is structural: the syntax tree, with the program's own
identifiers replaced by where and when they are bound, without docstrings, comments, type hints and whitespace.
Constants, operators, builtins, attribute and module names stay. What counts as a duplicate, per kind (`task_key`):

- deduction, abduction: the same canonical program. A second *input* for a known program is a duplicate as well: the
  novelty of programs is what keeps self-play from collapsing.
- induction: the same canonical program with the same set of inputs (programs are given there, inputs are proposed).

Not attempted: equivalence beyond renaming (dead code, reordered statements, `a + b` against `b + a`).
The form is our own text, not `ast.dump`, whose layout changes between Python versions: keys are kept in checkpoints.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable

from azr_jax.tasks.kinds import Kind, Proposal, Task
from azr_jax.tasks.syntax import (
    ProgramError,
    Scope,
    Scopes,
    bound_name,
    is_hint_import,
    parse_program,
)

#: Fields without meaning for identity: hints, and what the position in the tree already says.
_SKIPPED = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx", "simple"})
#: Nodes that carry an identifier of the program as a plain string, and the field it is in.
_IDENTIFIERS: dict[type[ast.AST], str] = {
    ast.FunctionDef: "name",
    ast.AsyncFunctionDef: "name",
    ast.ClassDef: "name",
    ast.arg: "arg",
    ast.ExceptHandler: "name",
    ast.MatchAs: "name",
    ast.MatchStar: "name",
    ast.MatchMapping: "rest",
}


def canonical_program(program: str) -> str:
    """The canonical form: equal for programs that differ only in names they chose, hints, docstrings or layout.

    Raises ProgramError (a ValueError) for text that does not parse, and never for a program that passed
    `validation.static_rejection`.
    """
    tree = parse_program(program)
    try:
        return _Writer(Scopes(tree)).write(tree)
    except RecursionError:  # called from deep inside somebody else's stack
        raise ProgramError("too_deep") from None


def program_key(program: str) -> str:
    """Short hash of the canonical form (80 bits: a collision among a million programs has probability 4e-13)."""
    return _digest(canonical_program(program))


def task_key(item: Task | Proposal) -> str:
    """The key under which a task or proposal counts as a duplicate; see the module docstring.

    Raises ProgramError if the program does not parse.
    """
    form = canonical_program(item.program)
    if item.kind is Kind.INDUCTION:
        inputs = [pair[0] for pair in item.pairs] if isinstance(item, Task) else item.inputs
        form = "\n".join([form, *sorted({canonical_input(text) for text in inputs})])
    return f"{item.kind.value}:{_digest(form)}"


def canonical_input(text: str) -> str:
    """An argument list without its layout (`1,2` equals `1, 2`); text that does not parse stays as it is."""
    try:
        return canonical_program(f"f({text})")
    except ProgramError:
        return text.strip()


def distinct_inputs(inputs: Iterable[str]) -> tuple[str, ...]:
    """The inputs without repetitions, in order."""
    return tuple({canonical_input(text): text for text in reversed(list(inputs))}.values())[::-1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


class _Writer:
    """Writes a syntax tree as text, identifiers replaced by `scope.order` of their binding."""

    def __init__(self, scopes: Scopes) -> None:
        self._scopes = scopes

    def write(self, value: object) -> str:
        if isinstance(value, ast.Name):
            return self._identifier(value.id, self._scopes.of(value))
        if isinstance(value, ast.Constant):
            return _constant(value.value)
        if isinstance(value, ast.AnnAssign) and value.value is not None:
            return f"(Assign [{self.write(value.target)}] {self.write(value.value)})"
        if isinstance(value, ast.Global | ast.Nonlocal):
            scope = self._scopes.of(value)
            return f"({type(value).__name__} {sorted(self._identifier(name, scope) for name in value.names)})"
        if isinstance(value, ast.Import | ast.ImportFrom):
            return self._import(value)
        if isinstance(value, ast.Call):
            return self._call(value)
        if isinstance(value, ast.AST):
            return self._node(value)
        if isinstance(value, list):
            return "[" + " ".join(self.write(item) for item in value if not self._is_idle(item)) + "]"
        return repr(value)  # None, attribute names, conversion codes of f-strings

    def _node(self, node: ast.AST) -> str:
        parts = [type(node).__name__]
        named = _IDENTIFIERS.get(type(node))
        for field in node._fields:
            value = getattr(node, field, None)
            if field in _SKIPPED:
                continue
            if field == named and isinstance(value, str):
                parts.append(self._identifier(value, self._scopes.of(node)))
            else:
                parts.append(self.write(value))
        return "(" + " ".join(parts) + ")"

    def _identifier(self, name: str, scope: Scope) -> str:
        owner = scope.resolve(name)
        # Builtins keep their name, class attributes are reached by it, and `f` is what the executor calls.
        if owner is None or owner.is_class or (owner.is_module and name == "f"):
            return name
        return f"%{owner.number}.{owner.bound[name]}"

    def _import(self, node: ast.Import | ast.ImportFrom) -> str:
        parts = [f"{node.level}{node.module}"] if isinstance(node, ast.ImportFrom) else []
        for alias in node.names:
            if not is_hint_import(node, alias):
                # `import a.b` binds a, `import a.b as x` binds a.b: only there does `as` change the meaning.
                renamed = "as " if alias.asname and "." in alias.name else ""
                parts.append(f"{alias.name} {renamed}{self._identifier(bound_name(alias), self._scopes.of(alias))}")
        return f"({type(node).__name__} {' '.join(parts)})"

    def _call(self, node: ast.Call) -> str:
        """Keywords of the program's own functions become positions, since parameters may be renamed."""
        parameters: list[str] = []
        if isinstance(node.func, ast.Name):
            owner = self._scopes.of(node.func).resolve(node.func.id)
            parameters = owner.parameters.get(node.func.id, []) if owner is not None else []
        keywords = []
        for keyword in node.keywords:
            name = f"#{parameters.index(keyword.arg)}" if keyword.arg in parameters else str(keyword.arg)
            keywords.append(f"{name}={self.write(keyword.value)}")
        return f"(Call {self.write(node.func)} {self.write(node.args)} [{' '.join(keywords)}])"

    def _is_idle(self, item: object) -> bool:
        """Statements that do nothing: docstrings and other bare constants, `pass`, bare annotations, hint imports."""
        if isinstance(item, ast.Expr):
            return isinstance(item.value, ast.Constant)
        if isinstance(item, ast.AnnAssign):
            return item.value is None and not self._scopes.of(item).is_class  # in a class it declares a field
        if isinstance(item, ast.Import | ast.ImportFrom):
            return all(is_hint_import(item, alias) for alias in item.names)
        return isinstance(item, ast.Pass)


def _constant(value: object) -> str:
    # Hexadecimal, because the decimal text of a huge integer is refused by CPython (4300 digits).
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) else repr(value)
