"""Values as canonical text, and the one rule by which two values are equal. Runs in trusted processes only.

A task's input, output and answer are plain data: None, bool, int, float, complex, str, bytes, list, tuple, set,
frozenset and dict, by exact type. Text is parsed to a syntax tree and read as literals; nothing is evaluated, so no
call, name or operator of a model means anything here. Limits on length, depth and size come before the work.

Rule of comparison (`equal`): the same types and the same contents at every level; order counts in list and tuple, not
in set and dict; nan equals nan; 0.0 and -0.0 differ. With numeric="python", bool, int, float and complex compare
as numbers (`1 == 1.0 == True`) and the rest stays strict.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from azr_jax.executor.plain import MAX_DEPTH, MAX_INT_BITS, MAX_NODES

MAX_TEXT = 32_768  #: characters of a value or an argument list; CPython's parser is safe far beyond it

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  #: positional and keyword arguments of a call


def parse_value(text: str) -> Any:
    """The value a literal denotes. Raises ValueError, and nothing else, on any other text.

    Beyond Python's literals: `set()`, `frozenset()`, `frozenset(<literal collection>)`, `inf`, `nan`,
    `float('inf')` and its kin, and complex numbers as `1+2j`.
    """
    return _Reader().value(_parse(text.strip()), 0)


def parse_arguments(text: str) -> Arguments:
    """Read `text` as what stands between the parentheses of a call: `1, [2], key='x'`; literals only, no stars.

    Raises ValueError, and nothing else, on any other text.
    """
    call = _parse(f"f({text}\n)")
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("not an argument list")
    reader = _Reader()
    args = tuple(reader.value(node, 0) for node in call.args)
    kwargs: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in kwargs:
            raise ValueError("keyword arguments must be named once each")
        kwargs[keyword.arg] = reader.value(keyword.value, 0)
    return args, kwargs


def canonical(value: Any) -> str:
    """Canonical text of a plain value: Python's repr, sets in sorted order, inf and nan as `float('...')`.

    `parse_value(canonical(x))` equals x. Raises ValueError if the value is not plain or exceeds a limit.
    """
    return _Writer(_literal_number).text(value, 0)


def canonical_arguments(arguments: Arguments) -> str:
    """Canonical text of an argument list; `parse_arguments` reads it back."""
    args, kwargs = arguments
    return ", ".join([canonical(value) for value in args] + [f"{name}={canonical(kwargs[name])}" for name in kwargs])


def equal(a: Any, b: Any, numeric: str = "strict") -> bool:
    """Whether two plain values are equal under the rule of the module's docstring; False if either is not plain."""
    try:
        return comparison_key(a, numeric) == comparison_key(b, numeric)
    except ValueError:
        return False


def comparison_key(value: Any, numeric: str = "strict") -> str:
    """Text that is the same for two plain values exactly when they are equal. Raises ValueError like `canonical`."""
    number = _python_number if numeric == "python" else _literal_number
    return _Writer(number, for_comparison=True).text(value, 0)


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_TEXT:
        raise ValueError("text too long")
    try:
        with warnings.catch_warnings():  # invalid escapes in a model's text are not worth a line on our stderr
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, OverflowError):
        raise ValueError("not a literal") from None


class _Reader:
    """Reads one syntax tree as literals, counting nodes."""

    def __init__(self) -> None:
        self._nodes = 0

    def value(self, node: ast.expr, depth: int) -> Any:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise ValueError("value too large")
        if isinstance(node, ast.Constant):
            return self._constant(node.value)
        if isinstance(node, ast.List):
            return [self.value(item, depth + 1) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item, depth + 1) for item in node.elts)
        if isinstance(node, ast.Set):
            return self._hashed(set, [self.value(item, depth + 1) for item in node.elts])
        if isinstance(node, ast.Dict):
            keys = [self._key(key, depth + 1) for key in node.keys]
            return self._hashed(dict, zip(keys, [self.value(item, depth + 1) for item in node.values], strict=True))
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        return self._number(node)

    def _constant(self, value: Any) -> Any:
        if value is Ellipsis or (type(value) is int and value.bit_length() > MAX_INT_BITS):
            raise ValueError("not a plain value")
        return value

    def _key(self, node: ast.expr | None, depth: int) -> Any:
        if node is None:
            raise ValueError("no unpacking")
        return self.value(node, depth)

    def _hashed(self, container: Any, items: Iterable[Any]) -> Any:
        try:
            return container(items)
        except TypeError:
            raise ValueError("unhashable element") from None

    def _call(self, node: ast.Call, depth: int) -> Any:
        """`set()`, `frozenset(...)` and `float('nan')`: the plain values that have no literal of their own."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if node.keywords or len(node.args) > 1:
            raise ValueError("no calls")
        if name in ("set", "frozenset") and not node.args:
            return set() if name == "set" else frozenset()
        if name == "frozenset" and isinstance(node.args[0], ast.List | ast.Tuple | ast.Set | ast.Call):
            items = self.value(node.args[0], depth)  # the collection inside is the frozenset, not one level more
            if type(items) in (list, tuple, set, frozenset):
                return self._hashed(frozenset, items)
        if name == "float" and node.args and isinstance(node.args[0], ast.Constant):
            spelt = node.args[0].value
            if type(spelt) is str and spelt.strip().lower().lstrip("+-") in ("inf", "infinity", "nan"):
                return float(spelt)
        raise ValueError("no calls")

    def _number(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            return self._complex(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
            value = self._unsigned(node.operand)
            if isinstance(node.op, ast.UAdd):
                return value
            # -0j is what repr writes for a zero real part with a plus sign.
            return complex(0.0, -value.imag) if type(value) is complex else -value
        return self._unsigned(node)

    def _unsigned(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, complex):
            return self._constant(node.value)
        if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
            return float(node.id)
        if isinstance(node, ast.Name) and node.id in ("infj", "nanj"):
            return complex(0.0, float(node.id[:-1]))
        if isinstance(node, ast.Call):
            value = self._call(node, 0)
            if type(value) is float:
                return value
        raise ValueError("not a literal")

    def _complex(self, node: ast.BinOp) -> complex:
        """`real+imagj`, built from its parts: adding them would lose the sign of zero and of nan."""
        negative = isinstance(node.left, ast.UnaryOp) and isinstance(node.left.op, ast.USub)
        real = self._number(node.left)
        imag = self._unsigned(node.right)
        if type(real) not in (int, float) or type(imag) is not complex:
            raise ValueError("not a literal")
        try:
            real = math.copysign(float(real), -1.0 if negative else 1.0)
        except OverflowError:
            raise ValueError("number too large") from None
        return complex(real, -imag.imag if isinstance(node.op, ast.Sub) else imag.imag)


class _Writer:
    """Writes one plain value, counting nodes; `number` renders bool, int, float and complex.

    For reading, dicts keep their order and sets are sorted by value; for comparison, both are sorted by text.
    """

    def __init__(self, number: Callable[[Any], str], for_comparison: bool = False) -> None:
        self._number = number
        self._for_comparison = for_comparison
        self._nodes = 0

    def text(self, value: Any, depth: int) -> str:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise ValueError("value too large")
        kind = type(value)
        if kind in (int, bool, float, complex):
            return self._number(value)
        if kind is str or kind is bytes or value is None:
            return repr(value)
        if kind is list:
            return f"[{self._join(value, depth)}]"
        if kind is tuple:
            return f"({self._join(value, depth)}{',' if len(value) == 1 else ''})"
        if kind is set or kind is frozenset:
            keyed = [(self._sort_key(item), self.text(item, depth + 1)) for item in value]
            body = ", ".join(text for _, text in sorted(keyed))
            if kind is set:
                return f"{{{body}}}" if body else "set()"
            return f"frozenset({{{body}}})" if body else "frozenset()"
        if kind is dict:
            items = [f"{self.text(k, depth + 1)}: {self.text(v, depth + 1)}" for k, v in value.items()]
            return f"{{{', '.join(sorted(items) if self._for_comparison else items)}}}"
        raise ValueError(f"not a plain value: {kind.__name__}")

    def _join(self, items: Iterable[Any], depth: int) -> str:
        return ", ".join([self.text(item, depth + 1) for item in items])

    def _sort_key(self, item: Any) -> tuple[str, Any]:
        """Order inside a set: numbers by value, texts and bytes by value, the rest (and all, to compare) by text."""
        kind = type(item)
        if self._for_comparison:
            return "", ""
        if kind in (int, bool) or (kind is float and not math.isnan(item)):
            return "", item
        return (kind.__name__, item) if kind in (str, bytes) else (kind.__name__, "")


def _literal_number(value: Any) -> str:
    """Text that reads back as the same type and value."""
    kind = type(value)
    if kind is int and value.bit_length() > MAX_INT_BITS:
        raise ValueError("number too large")
    if kind is float and not math.isfinite(value):
        return f"float('{value!r}')" if not math.isnan(value) else "float('nan')"
    return repr(value)


def _python_number(value: Any) -> str:
    """The same text for numbers that Python's `==` calls equal, and for any two nans."""
    if type(value) is complex and value.imag == 0:
        value = value.real
    if type(value) is complex:  # adding zero turns -0.0 into 0.0
        return repr(complex(value.real + 0.0, value.imag + 0.0))
    if type(value) is float and not value.is_integer():
        return _literal_number(value)
    return _literal_number(int(value))
