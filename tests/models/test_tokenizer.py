"""The tokenizer: lossless where it promises to be, tags and fragments as single tokens, end-of-sequence ids, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_jax.errors import UserError
from azr_jax.micro.corpus import FRAGMENTS, examples, train_tokenizer
from azr_jax.models.tokenizer import Tokenizer, load_tokenizer
from azr_jax.tasks.compact import TAGS

PRINTABLE = [chr(code) for code in range(32, 127)] + ["\n"]
PIECES = [*PRINTABLE, *TAGS, *FRAGMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed=0, sentences=300))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder)


@given(text=st.lists(st.sampled_from(PIECES)).map("".join))
def test_lossless_on_printable_ascii_and_newlines(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not {tokenizer.pad_id, 1, *tokenizer.eos_ids} & set(ids)


@given(text=st.text())
def test_any_text_can_be_encoded(tokenizer, text):
    assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode(text + "\ud800"))


def test_nothing_is_added(tokenizer):
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode("a")) == len(tokenizer.encode(" ")) == 1


def test_corpus_texts_survive(tokenizer):
    for _, example in zip(range(200), examples(1)):
        text = example.prompt + example.response
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("piece", [*TAGS, *FRAGMENTS])
def test_tags_and_fragments_are_one_token(tokenizer, piece):
    assert len(tokenizer.encode(piece)) == 1


def test_digits_are_one_token_each(tokenizer):
    assert len(tokenizer.encode("1234567890")) == 10


def test_the_same_seed_gives_the_same_tokenizer(folder):
    assert train_tokenizer(seed=0, sentences=300) == (folder / "tokenizer.model").read_bytes()


def test_end_of_sequence_and_padding_decode_to_nothing(tokenizer):
    (eos,) = tokenizer.eos_ids
    assert (eos, tokenizer.pad_id) == (2, 0)
    assert tokenizer.decode([eos, *tokenizer.encode("ab"), eos, tokenizer.pad_id]) == "ab"


def with_eos(folder: Path, target: Path, **files: object) -> Tokenizer:
    (target / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    for name, eos in files.items():
        (target / f"{name}.json").write_text(json.dumps({"eos_token_id": eos}))
    return load_tokenizer(target)


def test_eos_of_the_generation_config_counts_first(folder, tmp_path):
    tokenizer = with_eos(folder, tmp_path, generation_config=[5, 7], config=9)
    assert tokenizer.eos_ids == {5, 7}
    assert tokenizer.decode([5, *tokenizer.encode("x"), 7]) == "x"


def test_eos_of_the_config_counts_next(folder, tmp_path):
    assert with_eos(folder, tmp_path, generation_config=None, config=9).eos_ids == {9}


def hugging_face(folder: Path, **special: str) -> None:
    """A byte-level tokenizer without merges, as transformers saves one."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)


def test_hugging_face_tokenizer(tmp_path):
    hugging_face(tmp_path, eos_token="<|endoftext|>", pad_token="<pad>")
    tokenizer = load_tokenizer(tmp_path)
    (eos,) = tokenizer.eos_ids
    assert {eos, tokenizer.pad_id} == {256, 257} and tokenizer.vocab_size == 258
    for text in ("def f(x):\n    return  x ,  'é' .\n", " a", "", "it 's don 't"):
        assert tokenizer.decode([*tokenizer.encode(text), eos]) == text
    assert tokenizer.encode("\ud800") == tokenizer.encode("?")


def test_hugging_face_tokenizer_without_padding_pads_with_eos(tmp_path):
    hugging_face(tmp_path, eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(tmp_path)
    assert {tokenizer.pad_id} == tokenizer.eos_ids


def test_no_end_of_sequence_token_is_refused(tmp_path):
    hugging_face(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.model or tokenizer.json") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "generation_config.json"])
def test_torn_file(folder, tmp_path, name):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / name).write_bytes(b"{torn")
    with pytest.raises(UserError, match="tokenizer cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
