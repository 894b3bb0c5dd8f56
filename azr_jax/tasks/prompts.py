"""The interface between self-play and text: prompts out, proposals and answers in. Two implementations:

`full` (full.py) for pretrained models, with instructions and fenced blocks; `compact` (compact.py) for tiny models,
one tag a field. Parsing never raises: a response that does not follow its format is None, and costs -1 (rewards.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from azr_jax.tasks.compact import TAGS, CompactFormat
from azr_jax.tasks.full import FullFormat
from azr_jax.tasks.kinds import Kind, Proposal, Task


class PromptFormat(Protocol):
    """How tasks are put to a model and read back from it."""

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


def select_format(
    name: Literal["auto", "full", "compact"], encode: Callable[[str], Sequence[int]]
) -> PromptFormat:
    """The format of `tasks.prompt_format`; `auto` is compact for a model whose tokenizer has every tag as one token.

    So a trained copy of the embedded model keeps its format wherever it lies. `encode`: text to token ids.
    """
    if name == "compact" or (name == "auto" and all(len(encode(tag)) == 1 for tag in TAGS)):
        return CompactFormat()
    return FullFormat()
