"""The vocabulary of self-play: kinds of task, roles, tasks and proposals (paper sections 2.3 and 3.2).

A task is a deterministic program p with an input i and its output o = p(i). Which of the three is hidden from
the solver makes the kind. Programs define one function `f`; inputs are argument lists as text (`3, [1, 2]`);
outputs are canonical text (see `azr_jax.executor.values`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Kind(str, Enum):
    """What the solver must find: the output, an input, or the program."""

    DEDUCTION = "deduction"
    ABDUCTION = "abduction"
    INDUCTION = "induction"


class Role(str, Enum):
    """What the policy is doing."""

    PROPOSE = "propose"
    SOLVE = "solve"


KINDS: tuple[Kind, ...] = (Kind.DEDUCTION, Kind.ABDUCTION, Kind.INDUCTION)
ROLES: tuple[Role, ...] = (Role.PROPOSE, Role.SOLVE)
#: The six (role, kind) groups, each with a baseline of its own (paper section 3.3.5).
GROUPS: tuple[tuple[Role, Kind], ...] = tuple((role, kind) for role in ROLES for kind in KINDS)


def group_index(role: Role, kind: Kind) -> int:
    """Index into GROUPS, 0..5."""
    return ROLES.index(role) * len(KINDS) + KINDS.index(kind)


@dataclass(frozen=True)
class Task:
    """A validated task, as stored in a buffer.

    program: source text defining `f`.
    input:   argument list as text (deduction, abduction); "" for induction.
    output:  canonical text of f(input); "" for induction.
    pairs:   induction only: ((input, output), ...), N of them; the first N // 2 are shown to the solver.
    message: induction only: the proposer's hint.
    step:    the training step that proposed it (0 = seeding).
    key:     canonical form of the task's content, used to refuse duplicates.
    """

    kind: Kind
    program: str
    input: str = ""
    output: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    message: str = ""
    step: int = 0
    key: str = ""

    @property
    def shown(self) -> tuple[tuple[str, str], ...]:
        """Pairs the solver sees (first half, paper section 3.2)."""
        return self.pairs[: len(self.pairs) // 2]

    @property
    def hidden(self) -> tuple[tuple[str, str], ...]:
        """Pairs the answer is judged on."""
        return self.pairs[len(self.pairs) // 2 :]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` is its inverse."""
        record = asdict(self)
        record["kind"] = self.kind.value
        record["pairs"] = [list(pair) for pair in self.pairs]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Task:
        """Inverse of `to_json`."""
        fields = dict(record)
        fields["kind"] = Kind(fields["kind"])
        fields["pairs"] = tuple((i, o) for i, o in fields["pairs"])
        return cls(**fields)


@dataclass(frozen=True)
class Proposal:
    """What the proposer's text parsed into, before validation.

    For induction, `program` is the given program, `inputs` the proposed argument lists.
    """

    kind: Kind
    program: str
    input: str = ""
    inputs: tuple[str, ...] = ()
    message: str = ""
