"""Prompts as tokens, for tokenizers as Qwen, Llama and Gemma have them: BOS once, control tokens only where meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_jax.models.tokenizer import Tokenizer, load_tokenizer
from azr_jax.tasks.literal import literal
from tests.models import tokenizer_folders as made

MAKERS = {
    "qwen_base": lambda folder: made.qwen(folder, chats=False),
    "qwen_chat": lambda folder: made.qwen(folder, chats=True),
    "llama3_base": lambda folder: made.llama3(folder, chats=False),
    "llama3_chat": lambda folder: made.llama3(folder, chats=True),
    "llama2": made.llama2,
    "gemma": made.gemma,
}
FAST = ["qwen_base", "qwen_chat", "llama3_base", "llama3_chat"]
every = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in MAKERS.items():
        (root / name).mkdir()
        make(root / name)
    return {name: root / name for name in MAKERS}


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


CONTROL = ["<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<|begin_of_text|>", "<|eot_id|>", "</s>", "<s>"]
CONTROL += ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
ORDINARY = ["def f(x):\n", "    return x", "\n\n", " ", "<", "|", ">", "é漢", "<table>", "<think>", "a"]
ANY = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=5)
TEXT = st.lists(st.sampled_from(ORDINARY) | ANY, max_size=8)
SOUP = st.lists(st.sampled_from(CONTROL + ORDINARY), max_size=10).map("".join)


@every
def test_end_of_sequence(tokenizers, name) -> None:
    ends = {tokenizers[name].ids.get(piece) for piece in made_ends(name)}
    assert tokenizers[name].eos_ids == ends


def made_ends(name: str) -> list[str]:
    return {
        "qwen_base": ["<|endoftext|>"],
        "qwen_chat": ["<|im_end|>", "<|endoftext|>"],
        "llama3_base": ["<|end_of_text|>"],
        "llama3_chat": ["<|end_of_text|>", "<|eot_id|>"],
        "llama2": ["</s>"],  # nothing but the tokenizer says so
        "gemma": ["<eos>", "<end_of_turn>"],
    }[name]


@every
def test_prompts_start_as_the_tokenizer_starts_a_text(tokenizers, name) -> None:
    tokenizer = tokenizers[name]
    bos = {"llama3": "<|begin_of_text|>", "llama2": "<s>", "gemma": "<bos>"}.get(name.split("_")[0])
    expected = (tokenizer.ids[bos],) if bos else ()
    ids = tokenizer.prompt("def f(x): ...")
    assert tokenizer.prefix == expected and ids == (*expected, *tokenizer.encode("def f(x): ..."))
    if bos:
        assert tokenizer.prompt(f"{bos}def").count(expected[0]) == 1


def test_the_setting_of_the_folder_decides_on_bos(tmp_path) -> None:
    made.llama2(tmp_path, add_bos_token=False)
    assert load_tokenizer(tmp_path).prefix == ()


def test_nothing_is_put_behind_a_prompt(tmp_path) -> None:
    """Some tokenizers add an end-of-sequence token to every text."""
    from transformers import AutoTokenizer

    made.llama3(tmp_path, chats=False)
    config = json.loads((tmp_path / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}}
    config["post_processor"]["single"].append(end)
    known = {"id": "<|end_of_text|>", "ids": [331], "tokens": ["<|end_of_text|>"]}
    config["post_processor"]["special_tokens"]["<|end_of_text|>"] = known
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path).encode("a")) == 3
    assert tokenizer.prompt("a") == (tokenizer.ids["<|begin_of_text|>"], *tokenizer.encode("a"))


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=50)
@given(text=SOUP)
def test_text_of_ours_is_encoded_as_transformers_does(tokenizers, folders, name, text) -> None:
    theirs = tokenizers[name]._backend._tokenizer
    assert tokenizers[name].encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["llama2", "gemma"])
@settings(max_examples=50)
@given(text=TEXT.map("".join))
def test_text_without_control_tokens_is_encoded_as_sentencepiece_does(tokenizers, folders, name, text) -> None:
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folders[name] / "tokenizer.model"))
    assert tokenizers[name].encode(text) == theirs.encode(text)
    assert tokenizers[name].decode(theirs.encode(text)) == text


@every
@settings(max_examples=50)
@given(before=TEXT.map("".join), theirs=TEXT.map("".join), after=TEXT.map("".join))
def test_marks_change_nothing_about_ordinary_text(tokenizers, name, before, theirs, after) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer.encode(before + literal(theirs) + after) == tokenizer.encode(before + theirs + after)


@every
@settings(max_examples=50)
@given(before=TEXT.map("".join), theirs=SOUP, after=TEXT.map("".join))
def test_literal_text_stays_text(tokenizers, name, before, theirs, after) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(before + literal(theirs) + after)
    assert not set(tokenizer.control.values()) & set(ids)
    assert tokenizer.decode(ids) == before + theirs + after
    assert tokenizer.represents(theirs)


@every
def test_control_tokens_around_literal_text_stay_control_tokens(tokenizers, name) -> None:
    tokenizer = tokenizers[name]
    for piece, i in tokenizer.control.items():
        ids = tokenizer.encode(f"{piece}a{literal(f'x = {piece!r}')}b{piece}")
        assert ids[0] == ids[-1] == i and ids.count(i) == 2


def test_tags_of_a_format_are_reserved(folders) -> None:
    tokenizer = load_tokenizer(folders["qwen_base"])
    think = tokenizer.ids["<think>"]
    assert think in tokenizer.encode(literal("<think>"))  # to this tokenizer it is ordinary text
    tokenizer.reserve(["<think>", "<answer>"])  # of which <answer> is no token
    assert think not in tokenizer.encode(literal("a <think> b"))
    assert tokenizer.encode("Assistant: <think>")[-1] == think


@every
def test_ids_without_a_token_decode_to_nothing(tokenizers, name) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size, tokenizer.vocab_size + 7]) == "ab"


def test_tokens_added_to_a_sentencepiece_model_are_known(tmp_path) -> None:
    made.llama2(tmp_path)
    n = load_tokenizer(tmp_path).vocab_size
    special = {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    made.llama2(tmp_path, added_tokens_decoder={str(n): special | {"single_word": False}}, add_bos_token=True)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<|im_end|>")[-1] == n and tokenizer.control["<|im_end|>"] == n
    assert tokenizer.prefix == (1,)
