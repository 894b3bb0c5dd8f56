"""Which prompt template a model gets: `tasks.prompt_format`, and what `auto` makes of a model's folder.

`auto` asks two questions of the folder. Are the tags of the compact format single tokens? Then the model was taught
that format (a trained copy of the embedded model keeps it wherever it lies). Does the chat template end an assistant's
turn with a token that ends generation (generation_config.json)? Then the model was taught to chat. A chat template
alone says nothing: Qwen's base models come with one, but end with <|endoftext|>, not with its <|im_end|>. All others
are `base`.
"""

from __future__ import annotations

import logging
from typing import Literal

from azr_jax.errors import ConfigError
from azr_jax.models.tokenizer import Tokenizer, load_tokenizer
from azr_jax.models.weights import model_folder
from azr_jax.tasks.compact import TAGS, CompactFormat
from azr_jax.tasks.full import FullFormat
from azr_jax.tasks.prompts import PromptFormat

log = logging.getLogger(__name__)

Template = Literal["base", "chat", "compact"]
Choice = Literal["auto", "base", "chat", "compact"]


def load_prompts(model: str, name: Choice) -> tuple[Template, Tokenizer, PromptFormat]:
    """What a model is spoken to with: the template, which is logged with the reason, its tokenizer and its prompts.

    UserError: there is no such model, or its tokenizer cannot be read. ConfigError: as `choose_template`.
    """
    tokenizer = load_tokenizer(model_folder(model))
    template, why = choose_template(name, tokenizer)
    log.info("prompt template: %s (%s)", template, why)
    return template, tokenizer, make_prompts(template, tokenizer)


def choose_template(name: Choice, tokenizer: Tokenizer) -> tuple[Template, str]:
    """The template and, in a few words, why. ConfigError: `chat` for a tokenizer without a chat template."""
    if name == "chat" and tokenizer.chat is None:
        raise ConfigError("tasks.prompt_format=chat, but the model's folder has no chat template; use base")
    if name != "auto":
        return name, "as configured"
    if all(len(tokenizer.encode(tag)) == 1 for tag in TAGS):
        return "compact", "the tokenizer has every tag of it as one token"
    if tokenizer.chat is None:
        return "base", "the model has no chat template"
    if tokenizer.turn_end() in tokenizer.eos_ids:
        return "chat", "the model ends its responses as its chat template does"
    return "base", "the model has a chat template, but does not end its responses as the template does"


def make_prompts(template: Template, tokenizer: Tokenizer) -> PromptFormat:
    """The prompt format; the tokenizer learns the format's control tokens and, for `chat`, the end of a turn."""
    prompts: PromptFormat
    if template == "compact":
        prompts = CompactFormat()
    elif template == "chat" and tokenizer.chat is not None:
        prompts = FullFormat(tokenizer.chat.render)
        tokenizer.end_turns()
    else:
        prompts = FullFormat()
    tokenizer.reserve(prompts.tags)
    return prompts
