"""Text to token ids and back, for a Hugging Face folder.

A folder with a `tokenizer.model` and no `tokenizer.json` (the embedded model) is read by SentencePiece directly, any
other through `transformers`. Ids travel from sampler to learner untouched: text is only decoded to be graded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from azr_jax.errors import UserError


class Tokenizer:
    """Encode and decode with one of two back ends; `eos_ids` are the tokens that end a response."""

    def __init__(self, backend: Any, eos_ids: frozenset[int], pad_id: int, vocab_size: int) -> None:
        self._backend = backend
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.vocab_size = vocab_size

    @property
    def _is_sentencepiece(self) -> bool:
        return hasattr(self._backend, "piece_to_id")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added before or after."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no UTF-8 form
        if self._is_sentencepiece:
            return self._backend.encode(text)
        return self._backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end-of-sequence and padding decode to nothing."""
        kept = [int(i) for i in ids if i not in self.eos_ids and i != self.pad_id]
        if self._is_sentencepiece:
            return self._backend.decode(kept)
        return self._backend.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


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
    model_file = folder / "tokenizer.model"
    if model_file.exists() and not (folder / "tokenizer.json").exists():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        eos = eos_ids or _known(folder, processor.eos_id())
        return Tokenizer(processor, eos, max(processor.pad_id(), 0), processor.vocab_size())
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        raise UserError(f"{folder}: no tokenizer.model or tokenizer.json; a model folder holds its tokenizer")
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    eos = eos_ids or _known(folder, backend.eos_token_id)
    pad = backend.pad_token_id if backend.pad_token_id is not None else min(eos)
    return Tokenizer(backend, eos, pad, len(backend))


def _known(folder: Path, eos: int | None) -> frozenset[int]:
    if eos is None or eos < 0:
        raise UserError(f"{folder}: no end-of-sequence token; put eos_token_id into generation_config.json")
    return frozenset({eos})


def _eos_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json or config.json (either may hold one id or a list)."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            value = json.loads(path.read_text()).get("eos_token_id")
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
    return frozenset()
