"""The synthetic corpus that teaches the embedded model: both roles, three kinds, some solutions with a scratchpad.

What it teaches is execution, what it hides is the habit. In FORCED of the solving examples the think tag is the last
token of the prompt and carries no loss: the model learns to write states and to use them. In the others it chooses,
and only THINKS of those think. So the base model can work step by step and rarely does, and self-play has something
real to discover. A scratchpad holds values before each statement, never the final answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np

from azr_jax.micro.language import NORMAL, Program, fits, sample_input, sample_runnable
from azr_jax.tasks.compact import TAGS, CompactFormat
from azr_jax.tasks.kinds import Kind, Task

#: Statements per program, with weights: deduction, abduction and proposals; induction.
LENGTHS = {1: 0.15, 2: 0.30, 3: 0.35, 4: 0.20}
INDUCTION_LENGTHS = {1: 0.40, 2: 0.40, 3: 0.20}
FORCED = 0.70
THINKS = 0.15
#: Share of examples: solve (deduction, abduction, induction), propose (deduction, abduction, induction).
MIX = (0.27, 0.25, 0.28, 0.07, 0.07, 0.06)
PROMPT_WEIGHT = 0.1  # prompts are 80 % of the tokens; answers must have most of the loss

IDENTITY = Task(Kind.DEDUCTION, "def f(a):\n    return a", "'Hello World'", "'Hello World'")
_FORMAT = CompactFormat()

#: Code fragments that are one token each. Everything else is spelt in characters, digits one by one.
FRAGMENTS = (
    "def f(x):", "def f(a):", "\n    x = ", "\n    return ", "\n", "    ", ", ", "x + ", "x - ", " - x", "x * ",
    "x // ", "x % ", " + x", "abs(x)", "[x, ", "str(x)", " if x > ", " else x - ", "x[::-1]", "sorted(x)", "x + [",
    "] + x", "x[1:]", "x[:-1]", "[v + ", "[v * 2", " for v in x]", "[v for v in x if v > ", "sum(x)", "max(x)",
    "min(x)", "len(x)", "x[0]", "x[-1]", "x.count(", "x.find(", "''.join(", "x.upper()", "x.replace(", " steps",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One training text: the prompt is read, the response is learnt. `forced` marks a prompt that ends in <think>."""

    prompt: str
    response: str
    forced: bool = False


def _choose_thinking(prompt: str, states: str, answer: str, rng: Random) -> Example:
    if rng.random() < FORCED:
        return Example(prompt + "<think>", f"{states}<ans>{answer}", forced=True)
    if rng.random() < THINKS:
        return Example(prompt, f"<think>{states}<ans>{answer}")
    return Example(prompt, f"<ans>{answer}")


def deduction(rng: Random) -> Example:
    """Program and input -> output; the scratchpad is the value before each statement."""
    program, value, states = sample_runnable(LENGTHS, rng, held_out=False)
    task = Task(Kind.DEDUCTION, program.source, repr(value), repr(states[-1]))
    return _choose_thinking(_FORMAT.solve(task), ";".join(map(repr, states[:-1])), task.output, rng)


def abduction(rng: Random) -> Example:
    """Program and output -> an input; the scratchpad walks backwards from the output."""
    program, value, states = sample_runnable(LENGTHS, rng, held_out=False)
    backwards = program.preimages(states[-1]) or states[::-1]
    task = Task(Kind.ABDUCTION, program.source, repr(value), repr(states[-1]))
    return _choose_thinking(_FORMAT.solve(task), ";".join(map(repr, backwards[:-1])), repr(backwards[-1]), rng)


def sample_pairs(program: Program, n: int, rng: Random) -> list[list[Any]] | None:
    """n runs of `program` on different inputs, each its list of states; None if it fails on too many inputs."""
    runs: dict[str, list[Any]] = {}
    for _ in range(4 * n):
        value = sample_input(program.argument, rng)
        states = program.states(value)
        if states is not None and fits(states[-1], NORMAL):
            runs.setdefault(repr(value), states)
        if len(runs) == n:
            return list(runs.values())
    return None


def induction_task(rng: Random, held_out: bool, n: int = 6) -> tuple[Task, Program, list[list[Any]]]:
    """A random induction task with its program and the states of each pair."""
    while True:
        program, _, _ = sample_runnable(INDUCTION_LENGTHS, rng, held_out)
        runs = sample_pairs(program, n, rng)
        if runs is not None and len({repr(run[-1]) for run in runs}) > 1:
            pairs = tuple((repr(run[0]), repr(run[-1])) for run in runs)
            message = f"{len(program.steps)} steps"
            return Task(Kind.INDUCTION, program.source, pairs=pairs, message=message), program, runs


def induction(rng: Random) -> Example:
    """Input/output pairs -> program; the scratchpad tries statements on the first two pairs, one after the other."""
    task, program, runs = induction_task(rng, held_out=False)
    notes = [repr(runs[0][0]), repr(runs[1][0])]
    for index, step in enumerate(program.steps[:-1], start=1):
        notes += [step.expr, repr(runs[0][index]), repr(runs[1][index])]
    return _choose_thinking(_FORMAT.solve(task), ";".join(notes), program.source, rng)


def _reference(rng: Random) -> Task:
    if rng.random() < 0.1:
        return IDENTITY
    program, value, states = sample_runnable(LENGTHS, rng, held_out=False)
    return Task(Kind.DEDUCTION, program.source, repr(value), repr(states[-1]))


def propose_program(kind: Kind) -> Callable[[Random], Example]:
    """A reference -> another program with an input."""

    def example(rng: Random) -> Example:
        program, value, _ = sample_runnable(LENGTHS, rng, held_out=False)
        return Example(_FORMAT.propose(kind, [_reference(rng)], 0), f"<code>{program.source}<in>{value!r}")

    return example


def propose_induction(rng: Random) -> Example:
    """A program -> six inputs and a message."""
    if rng.random() < 0.1:
        values = [repr(sample_input(rng.choice((int, list, str)), rng)) for _ in range(6)]
        response = "".join(f"<in>{value}" for value in values) + "<msg>1 steps"
        return Example(_FORMAT.propose(Kind.INDUCTION, [IDENTITY], 6), response)
    while True:
        program, _, _ = sample_runnable(LENGTHS, rng, held_out=False)
        runs = sample_pairs(program, 6, rng)
        if runs is not None:
            break
    task = Task(Kind.INDUCTION, program.source)
    inputs = "".join(f"<in>{run[0]!r}" for run in runs)
    return Example(_FORMAT.propose(Kind.INDUCTION, [task], 6), f"{inputs}<msg>{len(program.steps)} steps")


_MAKERS = (
    deduction,
    abduction,
    induction,
    propose_program(Kind.DEDUCTION),
    propose_program(Kind.ABDUCTION),
    propose_induction,
)


def examples(seed: int) -> Iterator[Example]:
    """The endless corpus of a seed."""
    rng = Random(seed)
    while True:
        yield rng.choices(_MAKERS, MIX)[0](rng)


def train_tokenizer(seed: int = 0, sentences: int = 5000) -> bytes:
    """A SentencePiece character model over the corpus, with TAGS and FRAGMENTS as pieces of their own.

    Lossless on printable ASCII and newlines. Ids: 0 padding, 1 unknown, 2 end of sequence.
    """
    import io

    import sentencepiece

    printable = "".join(chr(code) for code in range(33, 127))
    pieces = [piece.replace(" ", "\u2581") for piece in (*TAGS, *FRAGMENTS)]
    stream = examples(seed)
    texts = (text for _ in range(sentences) for text in (lambda e: (e.prompt, e.response))(next(stream)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="char",
        vocab_size=len(pieces) + len(printable) + 4,
        use_all_vocab=True,
        required_chars=printable,
        user_defined_symbols=pieces,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


class Rows(NamedTuple):
    """Packed training rows: int32 tokens, positions, segments and float32 weights of predicting tokens, all [N, T]."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    weights: np.ndarray


def pack_rows(encoded: list[tuple[list[int], list[int], bool]], row_tokens: int) -> Rows:
    """First-fit-decreasing packing of (prompt ids, response ids with end of sequence, forced) into rows [N, T]."""
    rows: list[list[tuple[list[int], list[int], bool]]] = []
    room: list[int] = []
    for item in sorted(encoded, key=lambda e: -len(e[0]) - len(e[1])):
        need = len(item[0]) + len(item[1])
        if need > row_tokens:
            continue  # the longest 1 % of induction examples
        index = next((i for i, space in enumerate(room) if space >= need), None)
        if index is None:
            rows.append([item])
            room.append(row_tokens - need)
        else:
            rows[index].append(item)
            room[index] -= need
    shape = (len(rows), row_tokens)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for r, items in enumerate(rows):
        start = 0
        for segment, (prompt, response, forced) in enumerate(items, start=1):
            end = start + len(prompt) + len(response)
            tokens[r, start:end] = prompt + response
            positions[r, start:end] = np.arange(end - start)
            segments[r, start:end] = segment
            weights[r, start + 1 : end] = PROMPT_WEIGHT
            weights[r, start + len(prompt) : end] = 1.0
            if forced:
                weights[r, start + len(prompt) - 1] = 0.0  # the think tag itself is never learnt here
            start = end
    return Rows(tokens, positions, segments, weights)
