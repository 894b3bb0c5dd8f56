"""The interface between self-play and text: prompts out, proposals and answers in. Two implementations:

FullFormat (full.py) for pretrained models, with instructions and fenced blocks, in a base or a chat frame, and
CompactFormat (compact.py) for tiny models, one tag a field. Which one a model gets is decided in azr_jax/templates.py.
Parsing never raises: a response that does not follow its format is None, and costs -1 (rewards.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from azr_jax.tasks.kinds import Kind, Proposal, Task


class PromptFormat(Protocol):
    """How tasks are put to a model and read back from it."""

    tags: tuple[str, ...]  #: what structures a response; in the text of tasks they are no tokens
    stop: tuple[str, ...]  #: strings that end a response and belong to it; () if the end-of-sequence token does

    def propose(self, kind: Kind, references: Sequence[Task], n_inputs: int) -> str:
        """Prompt of the proposer. Induction: references[0] is the given program, `n_inputs` the inputs asked for."""

    def solve(self, task: Task) -> str:
        """Prompt of the solver; shows of an induction task only `task.shown`."""

    def parse_proposal(self, kind: Kind, references: Sequence[Task], response: str) -> Proposal | None:
        """The proposal in a response, or None for a bad format. The number of inputs is left to validation.py."""

    def parse_answer(self, kind: Kind, response: str) -> str | None:
        """The answer in a response (output, argument list or program text), or None for a bad format."""

    def thinks(self, response: str) -> bool:
        """Whether the response reasons before it answers."""
