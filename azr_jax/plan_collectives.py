"""Traffic between chips, read from the text of a compiled program: bytes by kind of collective.

A loop counts as often as the program's text says that it runs, else once: micro-batches of an update, steps of a block
of decoding, and in what the TPU compiler prints also the layers of an update. So on TPU the figures are for one token a
slot, one prefill, and one layer of one micro-batch (with its embedding and logits). A collective's bytes are
those of its result on one chip, for a reduce-scatter those of its operands.
"""

from __future__ import annotations

import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
BITS |= {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)')
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")


def collectives(text: str) -> dict[str, int]:
    """Bytes by kind that a chip gets from the others in one call; kinds that do not occur are left out."""
    own: dict[str, Counter[str]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = current = ""
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            current = begins[2]
            entry = current if begins[1] else entry
            own[current], calls[current] = Counter(), []
            continue
        parts = _INSTRUCTION.match(line)
        if not parts or not current:
            continue
        result, name, rest = parts.groups()
        kind = next((kind for kind in KINDS if name in (kind, f"{kind}-start")), None)
        if kind:
            own[current][kind] += _bytes_of(result, rest, kind, name.endswith("-start"))
            continue  # what a reduction applies is no computation of its own
        trips = _TRIPS.search(rest)
        for names in _CALLED.findall(rest):
            times = int(trips[1]) if trips and name == "while" else 1
            calls[current] += [(called.strip(" %"), times) for called in names.split(",")]
    return dict(sorted(_total(entry, own, calls, {}).items()))


def _total(
    name: str, own: dict[str, Counter[str]], calls: dict[str, list[tuple[str, int]]], known: dict[str, Counter[str]]
) -> Counter[str]:
    """Of a computation and all it calls."""
    if name not in known:
        total = Counter(own.get(name, {}))
        for called, times in calls.get(name, []):
            for kind, size in _total(called, own, calls, known).items():
                total[kind] += times * size
        known[name] = total
    return known[name]


def _bytes_of(result: str, rest: str, kind: str, started: bool) -> int:
    """Of a collective's result; one that was only started returns its operands, too."""
    sizes = _sizes(result)
    if kind == "reduce-scatter":
        operands = _sizes(rest.split("), ")[0])
        return sum(operands or sizes)
    if started and kind in ("all-gather", "collective-permute"):
        return max(sizes, default=0)
    return sum(sizes)


def _sizes(text: str) -> list[int]:
    """Bytes of each array type in a piece of text."""
    arrays = [(kind, shape) for kind, shape in _ARRAY.findall(text) if kind in BITS]
    return [math.prod(int(n) for n in shape.split(",") if n) * BITS[kind] // 8 for kind, shape in arrays]
