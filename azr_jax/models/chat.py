"""The chat template a Hugging Face folder comes with: a conversation as one string, up to where the model writes.

Rendering is transformers' `apply_chat_template`; tokens are made from the string by `tokenizer.py`. A conversation is
one instruction and one task. Tools, images and further turns are not here.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from azr_jax.errors import UserError

_ANSWER = "42"  # stands for what a model says where the template is asked how a turn ends


class ChatTemplate:
    """The template of a transformers tokenizer. UserError where it cannot be rendered."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template shows a system message; some refuse one, some leave it out."""
        try:
            return "instruction" in self._apply([_message("system", "instruction"), _message("user", "task")], True)
        except UserError:
            return False

    def render(self, system: str, user: str) -> str:
        """The prompt for a task: system message, user message, and the opening of the assistant's turn.

        A template without a system role gets the instruction in front of the task. Models that can do without
        reasoning are told to reason (`enable_thinking` of Qwen3's template; others ignore it).
        """
        if self.has_system_role:
            return self._apply([_message("system", system), _message("user", user)], True)
        return self._apply([_message("user", f"{system}\n\n{user}")], True)

    def after_answer(self) -> str:
        """What the template writes behind an assistant's message."""
        text = self._apply([_message("user", "task"), _message("assistant", _ANSWER)], False)
        return text.rpartition(_ANSWER)[2]

    def _apply(self, messages: list[dict[str, str]], generation: bool) -> str:
        try:
            return self._backend.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, enable_thinking=True
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(
                f"{self._backend.name_or_path}: the chat template cannot be rendered: {error}; "
                "use tasks.prompt_format=base"
            ) from None


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
