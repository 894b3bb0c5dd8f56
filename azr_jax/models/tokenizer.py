"""Text to token ids and back, for a Hugging Face folder.

A folder whose only vocabulary is a `tokenizer.model` (the embedded model, old Llama and Gemma folders) is read by
SentencePiece directly, any other through `transformers`. Three rules hold for both:

- ids travel from sampler to learner untouched; text is only decoded to be graded,
- what stands between the marks of `tasks.literal` never becomes a control token: its text is cut behind its first
  character and the pieces are encoded one by one, which changes nothing anywhere else,
- a prompt starts with the tokens that the tokenizer itself puts in front of a text (BOS for Llama 3 and Gemma, nothing
  for Qwen), once, also where a chat template has written them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from azr_jax.errors import UserError
from azr_jax.models.chat import ChatTemplate
from azr_jax.tasks.literal import literal, parts, unmarked

#: Names of control tokens that vendors do not mark as special: Qwen's <|fim_prefix|>, Gemma's turns in SentencePiece.
_CONTROL_NAME = re.compile(r"<\|.+\|>|<(?:start|end)_of_\w+>")
#: A character that no vocabulary merges with others: behind it, SentencePiece puts no space in front of a text.
_ANCHOR = "\ufdd2"
_SENTENCEPIECE_BOS = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer")  # add a BOS unless told otherwise


class _Backend(Protocol):
    """What the two readers have in common. `ids`: token id of every piece of the vocabulary."""

    ids: dict[str, int]
    control: dict[str, int]  # the ones that are no text
    added: dict[str, int]  # the ones beside the base vocabulary
    prefix: tuple[int, ...]  # in front of every text
    eos_id: int | None
    pad_id: int | None
    chat: ChatTemplate | None

    def encode(self, text: str, first: bool = True) -> list[int]:
        """`first`: the beginning of a text, not a piece that continues one."""

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """Encode and decode. `eos_ids` end a response; `vocab_size` is the highest id plus one; `chat` may be None."""

    def __init__(self, backend: _Backend, eos_ids: frozenset[int]) -> None:
        self._backend = backend
        self.eos_ids = eos_ids
        self.pad_id = backend.pad_id if backend.pad_id is not None else min(eos_ids)
        self.vocab_size = max(backend.ids.values()) + 1
        self.prefix = backend.prefix
        self.chat = backend.chat
        self._cut_at: re.Pattern[str]
        self.control: dict[str, int] = {}
        self.reserve(backend.control)

    @property
    def ids(self) -> dict[str, int]:
        """Every token by name."""
        return self._backend.ids

    @property
    def added(self) -> dict[str, int]:
        """Tokens beside the base vocabulary, by name."""
        return self._backend.added

    def reserve(self, names: Iterable[str]) -> None:
        """Take these tokens for control tokens too: the tags of a prompt format. Names that are no token are left."""
        self.control |= {name: self._backend.ids[name] for name in names if name in self._backend.ids}
        longest_first = sorted(self.control, key=len, reverse=True)
        self._cut_at = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def turn_end(self) -> int | None:
        """The control token the chat template writes behind an assistant's message; None if it writes none."""
        after = self.encode(self.chat.after_answer()) if self.chat else []
        control = set(self.control.values())
        return next((i for i in after if i in control), None)

    def end_turns(self) -> None:
        """Let a response also end with the end of a turn, the tokenizer's EOS or its padding (Qwen's <|endoftext|>)."""
        own = (self.turn_end(), self._backend.eos_id, self._backend.pad_id)
        self.eos_ids |= {i for i in own if i is not None}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added before or after. Its literal parts hold no control token."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no UTF-8 form
        pieces = [""]
        for part, is_literal in parts(text):
            cuts = [match.start() + 1 for match in self._cut_at.finditer(part)] if is_literal else []
            first, *rest = (part[a:b] for a, b in zip([0, *cuts], [*cuts, len(part)], strict=True))
            pieces[-1] += first
            pieces += rest
        return [i for index, piece in enumerate(pieces) for i in self._backend.encode(piece, first=index == 0)]

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that a response follows: `encode` with the tokenizer's own prefix."""
        ids = tuple(self.encode(text))
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end-of-sequence, padding and ids without a token decode to nothing."""
        kept = [int(i) for i in ids if i not in self.eos_ids and i != self.pad_id and i < self.vocab_size]
        return self._backend.decode(kept)

    def represents(self, text: str) -> bool:
        """Whether a prompt's text can be told from its ids."""
        text = unmarked(text)
        return self.decode(self.encode(literal(text))) == text


class _SentencePiece:
    """A `tokenizer.model`: the leading space, byte fallback and normalization are the model's own."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self._model = model
        self._anchor_ids = len(model.encode(_ANCHOR))
        self.ids = {model.id_to_piece(i): i for i in range(model.vocab_size())}
        never_from_text = {piece: i for piece, i in self.ids.items() if model.is_control(i)}
        self.control = {name: i for name, i in self.ids.items() if _CONTROL_NAME.fullmatch(name)} | never_from_text
        self._split = re.compile("(" + "|".join(map(re.escape, never_from_text)) + ")") if never_from_text else None
        self.added: dict[str, int] = {}
        eos, bos = model.eos_id(), model.bos_id()
        self.eos_id: int | None = None if eos < 0 else eos
        self.pad_id: int | None = max(model.pad_id(), 0)
        adds_bos = settings.get("add_bos_token", settings.get("tokenizer_class") in _SENTENCEPIECE_BOS)
        self.prefix: tuple[int, ...] = (bos,) if adds_bos and bos >= 0 else ()
        self.chat: ChatTemplate | None = None
        if settings.get("chat_template") or (folder / "chat_template.jinja").exists():
            from transformers import AutoTokenizer

            self.chat = ChatTemplate(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))

    def encode(self, text: str, first: bool = True) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._split.split(text) if self._split else [text]):
            if index % 2:
                ids.append(self.ids[part])
            elif part and first and not ids:
                ids += self._model.encode(part)
            elif part:
                ids += self._model.encode(_ANCHOR + part)[self._anchor_ids :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class _Transformers:
    """A tokenizer that transformers reads."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.ids = self._tokenizer.get_vocab()
        known = self._tokenizer.added_tokens_decoder
        self.added = {token.content: i for i, token in known.items()}
        self.control = {t.content: i for i, t in known.items() if t.special or _CONTROL_NAME.fullmatch(t.content)}
        self.eos_id, self.pad_id = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        self._anchor = next((t.content for t in known.values() if t.special and not t.rstrip), "")
        self.prefix = self._own_prefix()
        self.chat = ChatTemplate(self._tokenizer) if self._tokenizer.chat_template else None

    def _own_prefix(self) -> tuple[int, ...]:
        """What the tokenizer's post-processor puts in front of a text."""
        body, whole = self.encode("a"), self._tokenizer.encode("a", add_special_tokens=True)
        start = next((i for i in range(len(whole)) if whole[i : i + len(body)] == body), 0)
        return tuple(whole[:start])

    def encode(self, text: str, first: bool = True) -> list[int]:
        if first or not self._anchor:
            return self._tokenizer.encode(text, add_special_tokens=False)
        # Behind a control token, which is taken away again, no space is put in front of the text.
        return self._tokenizer.encode(self._anchor + text, add_special_tokens=False)[1:]

    def decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises UserError if there is none or it cannot be read."""
    try:
        return _load(folder)
    except UserError:
        raise
    except Exception as error:  # third-party readers raise all kinds; the user needs the file and the reason
        raise UserError(f"{folder}: tokenizer cannot be loaded: {error}") from None


def _load(folder: Path) -> Tokenizer:
    eos_ids = _eos_ids(folder)
    settings = _read(folder / "tokenizer_config.json")
    has_model, has_json = (folder / "tokenizer.model").exists(), (folder / "tokenizer.json").exists()
    if not (has_model or has_json or settings):
        raise UserError(f"{folder}: no tokenizer.model or tokenizer.json; a model folder holds its tokenizer")
    backend: _Backend
    if has_model and not has_json:
        backend = _SentencePiece(folder, settings)
        added = [*_read(folder / "added_tokens.json").values(), *map(int, settings.get("added_tokens_decoder", ()))]
        if added and max(added) >= len(backend.ids):  # SentencePiece knows nothing of tokens that were added later
            backend = _Transformers(folder)
    else:
        backend = _Transformers(folder)
    if not eos_ids and backend.eos_id is None:
        raise UserError(f"{folder}: no end-of-sequence token; put eos_token_id into generation_config.json")
    return Tokenizer(backend, eos_ids or frozenset({backend.eos_id}))  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _eos_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json or config.json (either may hold one id or a list)."""
    for name in ("generation_config.json", "config.json"):
        value = _read(folder / name).get("eos_token_id")
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()
