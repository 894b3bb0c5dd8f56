"""The encoding of a result inside the child process: plain data to text, or a refusal.

It is kept apart from `values.py` because it is loaded into every worker and must stay small. Its output is only the
child's claim about its own result; the trusted side parses it as untrusted text and renders it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_DEPTH = 60  #: nesting of containers
MAX_INT_BITS = 14_000  #: below CPython's limit of 4,300 decimal digits, so that every int has a text
MAX_NODES = 20_000  #: values inside one value
_LEAVES = frozenset({type(None), bool, float, complex})


class Unsupported(Exception):
    """The value is, or contains, something else than plain data."""


class TooLarge(Exception):
    """The value is too deep, too wide or too long."""


def encoder() -> Callable[[Any, int], str]:
    """Build the function that encodes a value."""
    # Bound here, before a program runs: it may patch builtins, and must not thereby change what it returned.
    type_of, length, text_of = type, len, repr
    leaf_types, text_types, sequence_types = _LEAVES, frozenset({str, bytes}), frozenset({list, tuple, set, frozenset})
    int_type, dict_type, unsupported, too_large = int, dict, Unsupported, TooLarge
    max_depth, max_nodes, max_bits = MAX_DEPTH, MAX_NODES, MAX_INT_BITS

    def encode(value: Any, max_chars: int) -> str:
        """Text of `value` if it is plain data of exact types, at most `max_chars` long.

        Raises Unsupported or TooLarge. Sets keep the process's order and nan stays `nan`: rendering is the judge's job.
        """
        level = [value]  # breadth first: no recursion, so depth is counted and not risked
        depth = chars = 0
        nodes = 1
        while level:
            if depth > max_depth:
                raise too_large
            depth += 1
            below: list[Any] = []
            for item in level:
                kind = type_of(item)
                if kind is int_type:
                    if item.bit_length() > max_bits:
                        raise too_large
                elif kind in text_types:
                    chars += length(item)
                    if chars > max_chars:
                        raise too_large
                elif kind in sequence_types or kind is dict_type:
                    nodes += length(item) if kind is not dict_type else 2 * length(item)
                    if nodes > max_nodes:
                        raise too_large
                    below += item
                    if kind is dict_type:
                        below += item.values()
                elif kind not in leaf_types:
                    raise unsupported
            level = below
        text = text_of(value)
        if length(text) > max_chars:
            raise too_large
        return text

    return encode
