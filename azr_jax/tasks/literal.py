"""Marks around text in a prompt that a model or a program wrote, so that it stays text.

A program may hold "<|im_end|>" in a string, and many tokenizers would turn that into the token that ends a turn. Prompt
formats put such text between two marks; the tokenizer (azr_jax.models.tokenizer) takes the marks away and lets nothing
between them become a control token. The marks are Unicode noncharacters, which no text should contain.
"""

from __future__ import annotations

from collections.abc import Iterator

OPEN, CLOSE = "\ufdd0", "\ufdd1"
_NO_MARKS = {ord(OPEN): "\ufffd", ord(CLOSE): "\ufffd"}


def literal(text: str) -> str:
    """`text` between marks; marks inside it become U+FFFD."""
    return f"{OPEN}{text.translate(_NO_MARKS)}{CLOSE}"


def unmarked(text: str) -> str:
    """A prompt as it is read: without marks."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def parts(text: str) -> Iterator[tuple[str, bool]]:
    """(part, whether it is literal) of a prompt, in order."""
    ours, *marked = text.split(OPEN)
    yield ours.replace(CLOSE, ""), False
    for piece in marked:
        theirs, _, ours = piece.partition(CLOSE)
        yield theirs, True
        yield ours.replace(CLOSE, ""), False
