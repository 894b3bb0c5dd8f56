"""Rewards of both roles as pure functions: learnability for the proposer, correctness for the solver, format for both.

Paper section 3.1: Eq. 4 (proposer), Eq. 5 (solver), Eq. 6 (composite: the role's reward if the response is passable,
-0.5 if it is well formed but wrong, -1 if it is badly formed). For a proposer, well formed includes that a valid task
came out: a proposal that parses but does not run, is banned or is nondeterministic earns -1 like one that does not
parse, in the paper's reading and in the released code (rewards/reward_managers.py:393-437) alike, so in every preset.

Whether a sample is scored at all is not decided here: an executor verdict of `infra` never reaches these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from azr_jax.config import PresetRules

#: Eq. 6: badly formed, and for a proposer anything that is not a valid task.
FORMAT_REWARD = -1.0
#: Eq. 6: well formed but wrong.
WRONG_REWARD = -0.5
#: Eq. 5.
CORRECT_REWARD = 1.0


class Outcome(str, Enum):
    """What became of a proposal."""

    BAD_FORMAT = "bad_format"  # the response did not parse
    INVALID = "invalid"  # parsed, but refused by the static rules or by the executor
    DUPLICATE = "duplicate"  # valid, but its canonical form was seen before, and the preset rejects duplicates
    VALID = "valid"


def learnability(solve_rate: float, rules: PresetRules) -> float:
    """Reward of a valid task from its mean solve rate over n samples: 1 - rate, or the preset's value at 0 and 1.

    Eq. 4 pays 0 at the extremes; the released code -0.5 (rewards/reward_managers.py:819-822, its issue #37).
    """
    if not 0.0 <= solve_rate <= 1.0:
        raise ValueError(f"solve rate {solve_rate} is outside [0, 1]")
    return 1.0 - solve_rate if 0.0 < solve_rate < 1.0 else rules.extreme_reward


def proposer_reward(outcome: Outcome, solve_rate: float | None, rules: PresetRules) -> float:
    """Reward of one proposal. `solve_rate` is needed for a valid one and ignored otherwise.

    A duplicate is worth as much as a task nobody can learn from: the preset's reward at the extremes (0 in `fixed`).
    """
    if outcome is Outcome.VALID:
        if solve_rate is None:
            raise ValueError("a valid proposal needs its solve rate")
        return learnability(solve_rate, rules)
    return rules.extreme_reward if outcome is Outcome.DUPLICATE else FORMAT_REWARD


def solver_reward(answer: str | None, correct: bool) -> float:
    """Reward of one answer: -1 if none could be parsed (None), 1 if correct, else -0.5."""
    if answer is None:
        return FORMAT_REWARD
    return CORRECT_REWARD if correct else WRONG_REWARD


def expected_proposer_reward(p: float, n: int, extreme_reward: float = 0.0) -> float:
    """Expected learnability of a task of true solve probability `p` under `n` samples, in closed form.

    E[r] = (1 - p) - (1 - p)^n + extreme_reward * ((1 - p)^n + p^n). Its maximum moves towards harder tasks as n grows:
    p = 0.37, 0.26, 0.17, 0.11 for n = 4, 8, 16, 32 at extreme_reward 0, and 0.30 for n = 8 at -0.5.
    """
    none, all_of_them = (1.0 - p) ** n, p**n
    return (1.0 - p) - none + extreme_reward * (none + all_of_them)


def share_inside(solve_rates: Sequence[float]) -> float:
    """Share of solve rates strictly between 0 and 1, the tasks a proposer is paid for; 0.0 without any task."""
    return sum(0.0 < rate < 1.0 for rate in solve_rates) / max(1, len(solve_rates))
