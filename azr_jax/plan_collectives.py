"""Traffic between chips, read from the text of a compiled program: bytes by kind of collective.

A loop counts as often as the program's text says that it runs, by a trip count or by the constant that its condition
compares with (loops of this project count up from 0). Else it counts once: micro-batches of an update, its chunks of
logits, steps of a block of decoding. So the figures are for one prefill, one token a slot, and one micro-batch with the
least of logits. A collective's bytes are those of its result on one chip, for a reduce-scatter those of its operands.
The TPU compiler writes a collective that runs beside products once for each of them, as pieces of one chain, which
count once here, and some reduce-scatters as all-reduces in a computation named for what it is.
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
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CHAIN = re.compile(r'chain_id="(\w+)"')
_REDUCE_SCATTER = "all-reduce-scatter"
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")


def collectives(text: str) -> dict[str, int]:
    """Bytes by kind that a chip gets from the others in one call; kinds that do not occur are left out."""
    own: dict[str, Counter[str]] = {}
    calls: dict[str, list[tuple[str, int | str]]] = {}  # and how often: a number, or the name of a loop's condition
    constants: dict[str, list[int]] = {}
    bounds: dict[str, int] = {}  # of conditions
    chains: set[str] = set()
    entry = current = ""
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            current = begins[2]
            entry = current if begins[1] else entry
            own[current], calls[current], constants[current] = Counter(), [], []
            continue
        parts = _INSTRUCTION.match(line)
        if not parts or not current:
            continue
        result, name, rest = parts.groups()
        kind = next((kind for kind in KINDS if name in (kind, f"{kind}-start")), None)
        if kind:
            size = _bytes_of(result, rest, kind, name.endswith("-start"))
            chain = _CHAIN.search(rest)
            if chain is None or chain[1] not in chains:
                own[current]["reduce-scatter" if current.startswith(_REDUCE_SCATTER) else kind] += size
            if chain:
                chains.add(chain[1])
            continue  # what a reduction applies is no computation of its own
        if name == "constant" and result.startswith("s32[]"):
            constants[current].append(int(rest.partition(")")[0]))
        elif name == "compare" and "ROOT" in line and "direction=LT" in rest and len(constants[current]) == 1:
            bounds[current] = constants[current][0]
        times: int | str = 1
        if name == "while":
            trips, condition = _TRIPS.search(rest), _CONDITION.search(rest)
            times = int(trips[1]) if trips else condition[1] if condition else 1
        for names in _CALLED.findall(rest):
            calls[current] += [(called.strip(" %"), times) for called in names.split(",")]
    counted = {
        name: [(called, bounds.get(times, 1) if isinstance(times, str) else times) for called, times in each]
        for name, each in calls.items()
    }
    return dict(sorted(_total(entry, own, counted, {}).items()))


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
