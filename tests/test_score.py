"""`azr-jax score`: the log-probabilities of `transformers`, in the order of the lines, whoever shares a batch."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from azr_jax import score
from azr_jax.cli import main
from azr_jax.learn.logprobs import chunk_tokens
from azr_jax.models import attention_choice
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import load_tokenizer
from azr_jax.models.transformer import init_params
from azr_jax.models.weights import EMBEDDED, save_weights
from azr_jax.score import SHORTEST_ROW, TOKENS_AT_ONCE, Scorer, _batches

GOLDEN = Path(__file__).parent / "golden"
ROWS = ("tokens", "positions", "segments")
NAMES = sorted(folder.parent.name for folder in GOLDEN.glob("*/config.json"))


def scores(capsys, tmp_path: Path, lines: list[dict], model: Path | str = "embedded", *options: str) -> list[dict]:
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["score", str(file), "--model", str(model), *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def expected_of(name: str) -> list[tuple[list[int], np.ndarray]]:
    """Golden token sequences and the log-probability of every token but the first, from the logits of transformers."""
    arrays = load_file(GOLDEN / name / "expected.safetensors")
    pairs = []
    for i in range(sum(key.startswith("logits_") for key in arrays)):
        tokens, logits = arrays[f"tokens_{i}"], arrays[f"logits_{i}"].astype(np.float64)
        logp = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        pairs.append((tokens.tolist(), logp[np.arange(len(tokens) - 1), tokens[1:]]))
    return pairs


@pytest.mark.parametrize("name", NAMES)
def test_transformers_agrees(name, tmp_path, capsys):
    pairs = expected_of(name)
    rows = scores(capsys, tmp_path, [{"id": i, "tokens": t} for i, (t, _) in enumerate(pairs)], GOLDEN / name)
    assert [row["id"] for row in rows] == list(range(len(pairs)))
    for row, (tokens, expected) in zip(rows, pairs, strict=True):
        assert len(row["logprobs"]) == len(tokens) and row["logprobs"][0] is None
        np.testing.assert_allclose(row["logprobs"][1:], expected, atol=1e-4)


def test_texts_are_their_tokens(tmp_path, capsys):
    text = "def f(x):\n    return x + 1"
    tokens = load_tokenizer(EMBEDDED).encode(text)
    by_text, by_tokens = scores(capsys, tmp_path, [{"id": "a", "text": text}, {"id": {"b": [1]}, "tokens": tokens}])
    assert by_text["id"] == "a" and by_tokens["id"] == {"b": [1]}
    assert by_text["logprobs"] == by_tokens["logprobs"] and len(tokens) == len(by_text["logprobs"]) > 3
    assert all(value <= 0 for value in by_text["logprobs"][1:])


def test_texts_begin_with_what_their_tokenizer_puts_in_front(monkeypatch, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "ab"}')
    tokenizer = load_tokenizer(EMBEDDED)
    monkeypatch.setattr(tokenizer, "prefix", (1,))
    monkeypatch.setattr(score, "load_tokenizer", lambda folder: tokenizer)
    (item,) = score.read_items(str(tmp_path / "a.jsonl"), ModelConfig.load(EMBEDDED), EMBEDDED)
    assert item.tokens.tolist() == [1, *tokenizer.encode("ab")]


def test_standard_input_and_empty_lines(monkeypatch, capsys):
    typed = b'\n{"id": 1, "tokens": [5, 6]}\r\n  \n{"id": 2, "tokens": [7]}'
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(typed)))
    assert main(["score", "-", "--model", str(GOLDEN / "qwen2_tied"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == [1, 2] and rows[1]["logprobs"] == [None]


def test_no_lines_no_output(tmp_path, capsys):
    assert scores(capsys, tmp_path, []) == []


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(GOLDEN / "qwen2_tied", ModelConfig.load(GOLDEN / "qwen2_tied"), "float32")


def sequences(count: int, longest: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 64, rng.integers(1, longest + 1)).astype(np.int32) for _ in range(count)]


def test_company_changes_nothing_and_shapes_are_few(scorer):
    lines = sequences(70, 120)
    together = scorer.logprobs(lines)
    assert scorer._compiled._cache_size() == 2, "lengths of 64 and 128"
    for i in (0, 33, 69):
        (alone,) = scorer.logprobs([lines[i]])
        np.testing.assert_allclose(alone[1:], together[i][1:], atol=1e-5)


def test_windows_keep_the_order(tmp_path, capsys, monkeypatch):
    lines = [{"id": i, "tokens": tokens.tolist()} for i, tokens in enumerate(sequences(9, 60))]
    whole = scores(capsys, tmp_path, lines, GOLDEN / "qwen2_tied")
    monkeypatch.setattr(score, "WINDOW", 4)
    parts = scores(capsys, tmp_path, lines, GOLDEN / "qwen2_tied")
    assert [row["id"] for row in whole] == [row["id"] for row in parts] == list(range(9))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one["logprobs"][1:], other["logprobs"][1:], atol=1e-5)


@given(lengths=st.lists(st.integers(1, 3 * TOKENS_AT_ONCE), max_size=60), shards=st.sampled_from([1, 2, 8]))
def test_batches(lengths, shards):
    seen = []
    for width, members in _batches(lengths, shards):
        assert 0 < len(members) <= width.rows and width.rows % shards == 0
        assert SHORTEST_ROW <= width.tokens and max(lengths[i] for i in members) <= width.tokens
        assert width.rows == shards or width.rows * width.tokens <= TOKENS_AT_ONCE * shards
        assert width.tokens & (width.tokens - 1) == 0, "a power of two"
        seen += members
    assert sorted(seen) == list(range(len(lengths)))


def test_bfloat16_is_near(tmp_path, capsys):
    tokens, expected = max(expected_of("qwen2_tied"), key=lambda pair: len(pair[0]))
    lines = [{"id": 0, "tokens": tokens}]
    (near,) = scores(capsys, tmp_path, lines, GOLDEN / "qwen2_tied", "--dtype", "bfloat16")
    error = np.abs(np.array(near["logprobs"][1:]) - expected).max()
    assert 1e-4 < error < 0.2


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_takes_the_kernel_of_the_device(monkeypatch, caplog):
    """And float32 none, as a kernel would compute in less."""
    reference = Scorer(GOLDEN / "qwen2_tied", ModelConfig.load(GOLDEN / "qwen2_tied"), "bfloat16")
    monkeypatch.setattr(attention_choice, "KERNELS", {"cpu": "splash"})
    caplog.set_level("INFO")
    lines = sequences(3, 60)
    for dtype, said in (("bfloat16", ["attention: splash on cpu"]), ("float32", [])):
        caplog.clear()
        scorer = Scorer(GOLDEN / "qwen2_tied", reference.config, dtype)
        assert [message for message in caplog.messages if message.startswith("attention")] == said
        program = str(jax.make_jaxpr(scorer._rows)(scorer.params, dict.fromkeys(ROWS, np.ones((8, 64), np.int32))))
        assert ("splash" in program) == (dtype == "bfloat16")
        for one, other in zip(scorer.logprobs(lines), reference.logprobs(lines), strict=True):
            assert 0 < np.abs(one[1:] - other[1:]).mean() < 0.05 * np.abs(other[1:]).mean(), "of bfloat16's rounding"


def test_no_full_logits(tmp_path):
    """Two rows of 4096 tokens over 8192 words would be twice the logits that may exist at once."""
    config = ModelConfig(8192, 8, 8, 1, 1, 1, 8)
    save_weights(tmp_path, config, init_params(config, 0))
    scorer = Scorer(tmp_path, config, "bfloat16")
    rows = jax.ShapeDtypeStruct((16, 4096), jnp.int32)
    lowered = scorer._compiled.lower(scorer.params, dict.fromkeys(ROWS, rows))
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", lowered.compile().as_text())]
    assert 0 < max(np.prod(shape) for shape in shapes if 8192 in shape) <= 8192 * chunk_tokens(config)


def refusal(capsys, tmp_path: Path, line: bytes) -> str:
    (tmp_path / "bad.jsonl").write_bytes(b'{"id": 1, "tokens": [1, 2]}\n\n' + line + b"\n")
    assert main(["score", str(tmp_path / "bad.jsonl"), "--model", "embedded"]) == 2
    output = capsys.readouterr()
    assert not output.out, "lines are checked before anything is computed"
    assert f"{tmp_path / 'bad.jsonl'}, line 3: " in output.err
    return output.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{torn", "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not of the form"),
        (b'{"id": 1}', "not of the form"),
        (b'{"tokens": [1]}', "not of the form"),
        (b'{"id": 1, "tokens": [1], "text": "a"}', "not of the form"),
        (b'{"id": 1, "text": 5}', "text is no string"),
        (b'{"id": 1, "text": ""}', "no tokens"),
        (b'{"id": 1, "tokens": []}', "no tokens"),
        (b'{"id": 1, "tokens": "12"}', "tokens is no list of integers"),
        (b'{"id": 1, "tokens": [1.0]}', "tokens is no list of integers"),
        (b'{"id": 1, "tokens": [true]}', "tokens is no list of integers"),
        (b'{"id": 1, "tokens": [1, 151]}', "token 151 is out of range: the model has ids 0 to 150"),
        (b'{"id": 1, "tokens": [-1]}', "token -1 is out of range"),
        (b'{"id": 1, "tokens": [99999999999999999999]}', "token 99999999999999999999 is out of range"),
    ],
)
def test_bad_lines_are_named(line, said, tmp_path, capsys):
    assert said in refusal(capsys, tmp_path, line)


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    assert main(["score", str(tmp_path / "none"), "--model", "embedded"]) == 2
    assert main(["score", str(tmp_path), "--model", "embedded"]) == 2
    assert capsys.readouterr().err.count("give a file of JSON lines") == 2


def test_a_line_longer_than_the_model_was_made_for_is_scored_with_a_warning(tmp_path, capsys, caplog):
    (row,) = scores(capsys, tmp_path, [{"id": 0, "tokens": [3] * 200}], GOLDEN / "qwen2_tied")
    assert len(row["logprobs"]) == 200
    assert "200 tokens, the model was made for 128" in caplog.text


def test_damaged_weights_are_no_numbers(tmp_path, capsys):
    config = ModelConfig(64, 8, 8, 1, 1, 1, 8)
    params = init_params(config, 0)
    save_weights(tmp_path, config, params | {"final_norm": params["final_norm"] * np.nan})
    (tmp_path / "a.jsonl").write_text('{"id": 1, "tokens": [1, 2]}')
    assert main(["score", str(tmp_path / "a.jsonl"), "--model", str(tmp_path)]) == 1
    assert "line 1: log-probabilities are not finite" in capsys.readouterr().err
