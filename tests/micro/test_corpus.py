"""The corpus says only true things about Python, never shows held-out programs, and hides the habit of thinking."""

from __future__ import annotations

from itertools import islice
from random import Random

import numpy as np
import pytest

from azr_jax.config import ExecutorConfig
from azr_jax.executor import ExecutorPool, Request
from azr_jax.micro.corpus import FORCED, THINKS, examples, pack_rows, train_tokenizer
from azr_jax.micro.language import NORMAL, fits, is_held_out, sample_input, sample_program, sample_runnable
from azr_jax.tasks.compact import CompactFormat, split_fields
from azr_jax.tasks.kinds import Kind


@pytest.fixture(scope="module")
def corpus() -> list:
    return list(islice(examples(seed=3), 1500))


GOLDEN_HELD_OUT = "1000000001010010000100001000000000000000001000000000000000000000"


def test_states_are_what_python_computes() -> None:
    """The generator's own evaluation against real Python, statement by statement, in the executor."""
    rng, requests, expected = Random(0), [], []
    while len(requests) < 150:
        program = sample_program(rng.randint(1, 4), rng)
        states = program.states(sample_input(program.argument, rng))
        if states is None:
            continue
        for n in range(1, len(program.steps) + 1):
            lines = [f"    x = {step.expr}" for step in program.steps[:n]]
            source = "\n".join(["def f(x):", *lines, "    return x"])
            requests.append(Request(str(len(requests)), "run", program=source, input=repr(states[0])))
            expected.append(repr(states[n]))
    with ExecutorPool(ExecutorConfig(workers=1)) as pool:
        verdicts = pool.run_all(requests)
    assert [verdict.output for verdict in verdicts] == expected


def test_preimages_lead_back_to_the_output() -> None:
    rng, found = Random(1), 0
    for _ in range(300):
        program, _, states = sample_runnable({1: 1, 3: 1}, rng, held_out=False)
        backwards = program.preimages(states[-1])
        if backwards is not None:
            found += 1
            assert program.states(backwards[-1]) == backwards[::-1]
    assert found > 200


def test_values_stay_within_limits() -> None:
    rng = Random(2)
    for _ in range(300):
        _, _, states = sample_runnable({2: 1, 4: 1}, rng, held_out=True)
        assert all(fits(state, NORMAL) for state in states)


def test_no_held_out_program_in_pretraining(corpus: list) -> None:
    seen = 0
    for example in corpus:
        for tag, content in (split_fields(example.prompt) or []) + (split_fields(example.response) or []):
            if "def f(x)" in content and tag in ("<code>", "<ans>"):
                seen += 1
                assert not is_held_out(content)
    assert seen > 1000


def test_held_out_ignores_names_and_layout() -> None:
    program = "def f(x):\n    x = x + 3\n    return x * 2"
    renamed = "def f(value):\n    value = value+3  # add\n    return value * 2"
    assert is_held_out(program) == is_held_out(renamed)


def test_held_out_class_is_fixed() -> None:
    """The shipped model was trained without these programs; a change of the rule would void its evaluation."""
    rng = Random(5)
    programs = [sample_program(2, rng).source for _ in range(64)]
    assert "".join("01"[is_held_out(program)] for program in programs) == GOLDEN_HELD_OUT


def test_thinking_is_taught_but_rarely_chosen(corpus: list) -> None:
    solving = [e for e in corpus if e.prompt.startswith("<S")]
    forced = [e for e in solving if e.forced]
    free = [e for e in solving if not e.forced]
    assert abs(len(forced) / len(solving) - FORCED) < 0.05
    assert all(e.prompt.endswith("<think>") for e in forced)
    assert abs(sum(e.response.startswith("<think>") for e in free) / len(free) - THINKS) < 0.06


def test_examples_parse_in_the_format_self_play_uses(corpus: list) -> None:
    prompts, names = CompactFormat(), {"D": Kind.DEDUCTION, "A": Kind.ABDUCTION, "I": Kind.INDUCTION}
    for example in corpus:
        kind = names[example.prompt[2]]
        if example.prompt[1] == "S":
            response = ("<think>" if example.forced else "") + example.response
            assert prompts.parse_answer(kind, response) is not None
        else:
            from azr_jax.tasks.kinds import Task

            assert prompts.parse_proposal(kind, [Task(kind, "def f(x):\n    return x")], example.response) is not None


def test_forced_think_tag_carries_no_loss() -> None:
    rows = pack_rows([([5, 6, 7], [8, 9, 2], True), ([5, 6, 7], [8, 2], False)], row_tokens=16)
    assert rows.tokens.shape == (1, 16)
    np.testing.assert_allclose(rows.weights[0, :6], [0, 0.1, 0.0, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(rows.weights[0, 6:11], [0, 0.1, 0.1, 1, 1], rtol=1e-6)
    assert rows.positions[0, :11].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert rows.weights[0, 11:].sum() == 0 and (rows.segments[0, 11:] == 0).all()


def test_tokenizer_is_lossless_and_seeded(corpus: list) -> None:
    import sentencepiece

    model = train_tokenizer(seed=0, sentences=300)
    assert model == train_tokenizer(seed=0, sentences=300)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    printable = "".join(chr(code) for code in range(32, 127)) + "\n  x\n"
    for text in [printable, *(e.prompt + e.response for e in corpus[:300])]:
        assert processor.decode(processor.encode(text)) == text
