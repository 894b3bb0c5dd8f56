"""95 % intervals for shares and for paired differences of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, over n items."""

    value: float
    low: float
    high: float
    n: int


def share(correct: Sequence[bool]) -> Estimate:
    """Share of True with the Wilson score interval (honest near 0 and 1, where the normal one is not)."""
    n = len(correct)
    if n == 0:
        return Estimate(0.0, 0.0, 1.0, 0)
    p = sum(correct) / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Estimate:
    """Mean of after - before over the same items, with the normal interval of the paired differences."""
    if len(before) != len(after):
        raise ValueError(f"paired difference of {len(before)} and {len(after)} items")
    n = len(before)
    if n < 2:
        return Estimate(0.0, -1.0, 1.0, n)
    differences = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)
