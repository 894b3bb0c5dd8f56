"""What goes into the sampler and what comes out.

A request carries its own random key, made from what the request *is* (step, role, kind, index, sample), so a sample
does not depend on arrival order, batch or restart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from azr_jax.errors import UserError


def request_key(seed: int, *identity: int | str) -> tuple[int, int]:
    """64 bits of randomness for a request, two uint32: a hash of the run's seed and the request's identity."""
    text = repr((seed, *identity)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


@dataclass(frozen=True)
class Filters:
    """Changes to the sampling distribution, for inference only: a policy gradient needs the policy's own distribution.

    The defaults change nothing. Filters come after penalties, and temperature before both top_p and min_p.
    UserError: a value outside its range.
    """

    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    min_p: float = 0.0  # only tokens at least this likely, as a share of the likeliest one's probability
    repetition: float = 1.0  # logits of tokens seen in prompt or response: positive ones divided, others multiplied
    presence: float = 0.0  # subtracted from logits of tokens in the response
    frequency: float = 0.0  # subtracted as often as they are in it

    def __post_init__(self) -> None:
        ranges = {
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repetition": (self.repetition > 0, "above 0"),
        }
        for name, (holds, said) in ranges.items():
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)} must be {said}")


@dataclass(frozen=True)
class Request:
    """One sequence to generate."""

    prompt: tuple[int, ...]  # ids, at least one
    key: tuple[int, int]  # from `request_key`
    temperature: float = 1.0  # 0: greedy
    id: object = None  # hashable, its own among those under way; `Engine.generate` numbers requests by itself
    max_tokens: int | None = None  # of the response; None: the engine's max_response
    priority: float = 0.0  # expected cost of what hangs on it; the highest is admitted first
    filters: Filters | None = None  # None: the policy's own distribution


@dataclass(frozen=True)
class Completion:
    """One generated sequence.

    tokens:   int32 [R], the ids as sampled, with the end-of-sequence token if one was sampled; nothing is appended.
    logprobs: float32 [R], natural log-probability of each under the sampling distribution (greedy: temperature 1).
    finish:   why it ended.
    version:  of the weights it was sampled from, as given to `Engine.load`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish: Literal["eos", "stop", "length"]
    version: int = 0
