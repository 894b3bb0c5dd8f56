"""Compact prompts for tiny models: one tag a field, nothing else.

    solve    <SD><code>PROGRAM<in>INPUT          -> [<think>STATES]<ans>OUTPUT
             <SA><code>PROGRAM<out>OUTPUT        -> [<think>STATES]<ans>INPUT
             <SI><msg>MESSAGE<in>I<out>O ...     -> [<think>STATES]<ans>PROGRAM
    propose  <PD><code>REF<in>I<out>O ...        -> <code>PROGRAM<in>INPUT
             <PA><code>REF<in>I<out>O ...        -> <code>PROGRAM<in>INPUT
             <PI><code>PROGRAM                   -> <in>I<in>I ...<msg>MESSAGE

The response ends with the end-of-sequence token, so there are no stop strings. Thinking is the model's choice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from azr_jax.tasks.kinds import Kind, Proposal, Role, Task
from azr_jax.tasks.literal import literal

TAGS = (
    "<SD>", "<SA>", "<SI>", "<PD>", "<PA>", "<PI>",
    "<code>", "<in>", "<out>", "<msg>", "<think>", "<ans>",
)  # fmt: skip
_HEAD = {
    (Role.SOLVE, Kind.DEDUCTION): "<SD>",
    (Role.SOLVE, Kind.ABDUCTION): "<SA>",
    (Role.SOLVE, Kind.INDUCTION): "<SI>",
    (Role.PROPOSE, Kind.DEDUCTION): "<PD>",
    (Role.PROPOSE, Kind.ABDUCTION): "<PA>",
    (Role.PROPOSE, Kind.INDUCTION): "<PI>",
}
_MARKUP = re.compile(r"<[^\s<>]*>")  # what a tag or another control token may look like
_ANY_TAG = re.compile("(" + "|".join(re.escape(tag) for tag in TAGS) + ")")


def split_fields(text: str) -> list[tuple[str, str]] | None:
    """[(tag, content), ...] of a response, or None if text stands before the first tag."""
    parts = _ANY_TAG.split(text)
    if parts[0]:
        return None
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _field(tag: str, content: str) -> str:
    return tag + (literal(content) if _MARKUP.search(content) else content)


class CompactFormat:
    """Implements `prompts.PromptFormat` for models trained on the tags above."""

    stop: tuple[str, ...] = ()
    tags: tuple[str, ...] = TAGS

    def propose(self, kind: Kind, references: Sequence[Task], n_inputs: int) -> str:
        """Prompt of the proposer; for induction, references[0] holds the given program."""
        head = _HEAD[Role.PROPOSE, kind]
        if kind is Kind.INDUCTION:
            return head + _field("<code>", references[0].program)
        return head + "".join(
            _field("<code>", ref.program) + _field("<in>", ref.input) + _field("<out>", ref.output)
            for ref in references
        )

    def solve(self, task: Task) -> str:
        """Prompt of the solver."""
        head = _HEAD[Role.SOLVE, task.kind]
        if task.kind is Kind.DEDUCTION:
            return head + _field("<code>", task.program) + _field("<in>", task.input)
        if task.kind is Kind.ABDUCTION:
            return head + _field("<code>", task.program) + _field("<out>", task.output)
        pairs = "".join(_field("<in>", i) + _field("<out>", o) for i, o in task.shown)
        return head + _field("<msg>", task.message) + pairs

    def parse_proposal(self, kind: Kind, references: Sequence[Task], response: str) -> Proposal | None:
        """The proposed task, or None if the tags are not exactly those asked for. Never raises."""
        fields = split_fields(response)
        if fields is None:
            return None
        tags = [tag for tag, _ in fields]
        if kind is Kind.INDUCTION:
            if len(tags) < 2 or tags[-1] != "<msg>" or set(tags[:-1]) != {"<in>"}:
                return None
            inputs = tuple(content for _, content in fields[:-1])
            return Proposal(kind, references[0].program, inputs=inputs, message=fields[-1][1])
        if tags != ["<code>", "<in>"]:
            return None
        return Proposal(kind, fields[0][1], input=fields[1][1])

    def parse_answer(self, kind: Kind, response: str) -> str | None:
        """The answer's text, or None if the response is not `[<think>...]<ans>...`. Never raises."""
        fields = split_fields(response)
        if fields is None or [tag for tag, _ in fields] not in (["<ans>"], ["<think>", "<ans>"]):
            return None
        return fields[-1][1] or None

    def thinks(self, response: str) -> bool:
        """Whether the response writes down intermediate states before answering."""
        return response.startswith("<think>")
