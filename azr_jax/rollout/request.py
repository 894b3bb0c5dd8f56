"""What goes into the sampler and what comes out.

A request carries its own random key, made from what the request *is* (step, role, kind, index, sample), so a sample
does not depend on arrival order, batch or restart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np


def request_key(seed: int, *identity: int | str) -> tuple[int, int]:
    """64 bits of randomness for a request, two uint32: a hash of the run's seed and the request's identity."""
    text = repr((seed, *identity)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


@dataclass(frozen=True)
class Request:
    """One sequence to generate: prompt ids, random key, temperature (0 = greedy)."""

    prompt: tuple[int, ...]
    key: tuple[int, int]
    temperature: float = 1.0


@dataclass(frozen=True)
class Completion:
    """One generated sequence.

    tokens:   int32 [R], the ids as sampled, with the end-of-sequence token if one was sampled; nothing is appended.
    logprobs: float32 [R], natural log-probability of each under the sampling distribution (greedy: temperature 1).
    finish:   why it ended.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish: Literal["eos", "stop", "length"]
