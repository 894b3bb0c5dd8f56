"""`azr-jax sample`: completions of a text, tasks typed by a user, mistakes that cost one line."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest

from azr_jax import sample, templates
from azr_jax.cli import main
from azr_jax.config import ExecutorConfig
from azr_jax.executor import ExecutorPool
from azr_jax.micro.corpus import train_tokenizer
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import load_tokenizer
from azr_jax.models.transformer import init_params
from azr_jax.models.weights import save_weights

pytestmark = pytest.mark.usefixtures("two_devices")

PROGRAM = "def f(x):\n    return x + 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """An untrained model with the embedded model's tokenizer."""
    folder: Path = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed=0, sentences=300))
    config = ModelConfig(load_tokenizer(folder).vocab_size, 32, 64, 2, 4, 2, 8)
    save_weights(folder, config, init_params(config, 0))
    return str(folder)


@pytest.fixture(scope="module")
def pool():
    with ExecutorPool(ExecutorConfig(workers=1)) as pool:
        yield pool


@pytest.fixture
def run(folder, pool, monkeypatch, capsys, caplog):
    """Run the command with lines typed into a pipe; the model's responses can be dictated. Returns what it printed."""

    class Borrowed:
        """The shared pool; leaving the command must not close it."""

        def __init__(self, config) -> None:
            pass

        def __enter__(self):
            return pool

        def __exit__(self, *exc) -> None:
            pass

    monkeypatch.setattr(sample, "ExecutorPool", Borrowed)

    def run(*arguments: str, typed: str = "", responses: tuple[str, ...] | None = None) -> str:
        answers = iter(responses or ())

        def complete(self, text, stop=()):
            return [{"prompt": text, "response": next(answers), "tokens": 5, "finish": "eos"}]

        if responses is not None:
            monkeypatch.setattr(sample.Model, "complete", complete)
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        caplog.set_level(logging.INFO)
        assert main(["sample", "--model", folder, *arguments]) == 0
        return capsys.readouterr().out

    return run


def objects(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_completes_a_text(run):
    (record,) = objects(run("--prompt", "def f(x):", "--json", "--seed", "3"))
    assert record["prompt"] == "def f(x):" and record["finish"] in ("eos", "length")
    assert 1 <= record["tokens"] <= sample.MAX_RESPONSE_COMPACT
    assert run("--prompt", "def f(x):", "--seed", "3") == record["response"] + "\n"
    assert run("--prompt", "def f(x):", "--seed", "4") != record["response"] + "\n"


def test_zero_temperature_needs_no_seed(run):
    greedy = ("--prompt", "<SD>", "--temperature", "0", "--seed")
    assert run(*greedy, "1") == run(*greedy, "2")


@pytest.mark.parametrize(("text", "said"), [("", "empty"), ("x" * (sample.MAX_PROMPT + 1), "6145 tokens")])
def test_prompts_that_cannot_be(folder, capsys, text, said):
    assert main(["sample", "--model", folder, "--prompt", text]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_model_that_is_not_there(capsys):
    assert main(["sample", "--model", "nowhere", "--prompt", "x"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "warned"), [("naïve", True), ("a\tb", True), ("it's plain ~\n", False)])
def test_characters_the_model_does_not_know(run, caplog, text, warned):
    run("--prompt", text)
    assert ("cannot represent" in caplog.text) == warned


def test_deduction(run):
    typed = f"\n{PROGRAM}\n\n3\n{PROGRAM}\n\n3\n{PROGRAM}\n\n3"
    records = objects(run("--json", typed=typed, responses=("<ans>4", "<think>3<ans>5", "four")))
    assert [r["verdict"]["correct"] for r in records] == [True, False, False]
    assert [r["answer"] for r in records] == ["4", "5", None]
    assert records[0]["prompt"] == f"<SD><code>{PROGRAM}<in>3"
    assert records[0]["role"] == "solve" and records[0]["kind"] == "deduction"
    assert records[2]["verdict"] == {"status": "rejected", "reason": "format", "correct": False}


def test_abduction_takes_any_input_that_works(run):
    typed = "def f(x):\n    return x * x\n\n 9 \n" * 2
    records = objects(run("--json", "--kind", "abduction", typed=typed, responses=("<ans>-3", "<ans>4")))
    assert [r["verdict"]["correct"] for r in records] == [True, False]
    assert records[0]["prompt"].endswith("<out>9")


def test_induction_shows_half_and_judges_on_the_rest(run):
    typed = "1\n2\n5\n6\n7\n8\n9\n10\n\n1 steps\n" * 2
    answers = (f"<ans>{PROGRAM}", "<ans>def f(x):\n    return 8")
    records = objects(run("--json", "--kind", "induction", typed=typed, responses=answers))
    assert records[0]["prompt"] == "<SI><msg>1 steps<in>1<out>2<in>5<out>6"
    verdicts = [(r["verdict"]["correct"], r["verdict"]["passed"], r["verdict"]["total"]) for r in records]
    assert verdicts == [(True, 2, 2), (False, 1, 2)]


def test_propose_from_the_seed_task_and_from_a_program(run):
    typed = f"\n{PROGRAM}\n\n3\n\n\n"
    responses = (f"<code>{PROGRAM}<in>8", "<code>import os\ndef f(x):\n    return 1<in>8", "<code>x", "<code>x<in>1")
    records = objects(run("--json", "--role", "propose", typed=typed, responses=responses))
    assert "def f(a):\n    return a" in records[0]["prompt"]
    assert records[1]["prompt"] == f"<PD><code>{PROGRAM}<in>3<out>4"
    assert records[0]["proposal"] == {"program": PROGRAM, "input": "8"}
    assert records[0]["verdict"] == {"status": "ok", "output": "9"}
    assert records[1]["verdict"] == {"status": "rejected", "reason": "banned_module:os"}
    assert records[2]["proposal"] is None and records[2]["verdict"]["reason"] == "format"
    assert records[3]["verdict"]["reason"] == "no_f"


def test_propose_inputs(run):
    inputs = "".join(f"<in>{i}" for i in range(6))
    typed = f"{PROGRAM}\n\n{PROGRAM}\n\n"
    responses = (f"{inputs}<msg>adds one", "<in>1<in>1<msg>")
    records = objects(run("--json", "--role", "propose", "--kind", "induction", typed=typed, responses=responses))
    assert records[0]["prompt"] == f"<PI><code>{PROGRAM}"
    assert records[0]["verdict"] == {"status": "ok", "outputs": ["1", "2", "3", "4", "5", "6"]}
    assert records[1]["verdict"]["reason"] == "too_few_inputs"


@pytest.mark.parametrize(
    ("kind", "typed", "said"),
    [
        ("deduction", f"{PROGRAM}\n\n3 +\n", "an input is a list of arguments"),
        ("deduction", f"{PROGRAM}\n\n'a'\n", "make no task: error, TypeError"),
        ("deduction", "import os\ndef f(x):\n    return x\n\n1\n", "banned_module:os"),
        ("deduction", "while True\n\n1\n", "syntax_error"),
        ("abduction", f"{PROGRAM}\n\nos.getcwd()\n", "an output is a Python literal"),
        ("induction", "1\n2\n\nhint\n", "two pairs or more"),
        ("induction", "1\n2\n3\n\nhint\n", "two pairs or more"),
        ("induction", "1\n2\n3\nx\n\nhint\n", "an output is a Python literal"),
    ],
)
def test_a_mistake_costs_one_line_and_the_session_goes_on(run, caplog, kind, typed, said):
    good = {
        "deduction": f"{PROGRAM}\n\n3\n",
        "abduction": f"{PROGRAM}\n\n4\n",
        "induction": "1\n2\n3\n4\n\n\n",
    }[kind]
    answer = f"<ans>{PROGRAM}" if kind == "induction" else "<ans>3" if kind == "abduction" else "<ans>4"
    records = objects(run("--json", "--kind", kind, typed=typed + good, responses=(answer,)))
    assert len(records) == 1 and records[0]["verdict"]["correct"]
    complaints = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(complaints) == 1 and said in complaints[0] and "\n" not in complaints[0]


@pytest.mark.parametrize(("typed", "lost"), [("", 0), (PROGRAM, 1), (f"{PROGRAM}\n\n", 1), ("\n\n", 0)])
def test_input_without_a_whole_task(folder, capsys, caplog, monkeypatch, typed, lost):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["sample", "--model", folder]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "held no whole task" in captured.err
    assert caplog.text.count("the input ended after a program") == lost


def test_output_for_people(run):
    typed = f"{PROGRAM}\n\n3\n"
    output = run(typed=typed, responses=("<think>\x1b[2J3<ans>4",))
    assert output == "response: <think>\\x1b[2J3<ans>4\nanswer:   4\nverdict:  correct\n\n"
    output = run("--role", "propose", typed="\n", responses=(f"<code>{PROGRAM}<in>8",))
    assert output.endswith(
        "program:  def f(x):\n              return x + 1\ninput:    8\nverdict:  valid, returns 9\n\n"
    )


def test_only_a_model_that_knows_the_tags_gets_compact_prompts(folder, monkeypatch):
    assert sample.Model(folder, 1.0, 0).compact

    monkeypatch.setattr(templates, "choose_template", lambda name, tokenizer: ("base", "so it is"))
    model = sample.Model(folder, 1.0, 0)
    assert not model.compact and model.prompts.stop == ("</answer>",)


def test_a_real_response_is_judged_without_a_script(run):
    """Everything but the words is real: the untrained model babbles, which is a bad format."""
    (record,) = objects(run("--json", "--temperature", "0.5", typed=f"{PROGRAM}\n\n3\n"))
    assert record["answer"] is None and record["verdict"]["reason"] == "format"


def test_samples_of_a_prompt_differ_and_filters_narrow_them(run):
    texts = [record["response"] for record in objects(run("--json", "--prompt", "f", "--samples", "4"))]
    assert len(texts) == 4 and len(set(texts)) > 1
    narrowed = objects(run("--json", "--prompt", "f", "--samples", "3", "--top-k", "1"))
    greedy = objects(run("--json", "--prompt", "f", "--temperature", "0"))
    assert [record["response"] for record in narrowed] == 3 * [greedy[0]["response"]]


@pytest.mark.parametrize(("arguments", "said"), [(["--top-p", "2"], "top_p = 2.0 must be"), ([], "--samples belongs")])
def test_filters_out_of_range_are_the_users_mistake(folder, capsys, arguments, said):
    more = ["--prompt", "f", *arguments] if arguments else ["--samples", "2"]
    assert main(["sample", "--model", folder, *more]) != 0
    assert said in capsys.readouterr().err
