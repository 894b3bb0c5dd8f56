# ruff: noqa: E501 - one program a line
"""`azr-jax check` and the protocol: JSON lines in and out, answered as they are known, never a traceback."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_jax.errors import UserError
from azr_jax.executor import commands, protocol
from azr_jax.executor.commands import bench_command, check_command
from azr_jax.executor.pool import ExecutorPool
from azr_jax.executor.protocol import BadRequest, Request, Verdict, request_from_json
from tests.executor.conftest import CONFIG

ROOT = Path(__file__).parents[2]
CODE = (
    "import sys\n"
    "from azr_jax.config import ExecutorConfig\n"
    "from azr_jax.executor.commands import check_command\n"
    "sys.exit(check_command('-', ExecutorConfig(workers=2), sys.stdout))\n"
)
LINES = [
    {"id": "a", "op": "run", "program": "def f(x):\n    return x", "input": "{2, 1}"},
    {"id": 2, "op": "validate", "program": "import os\ndef f(x):\n    return x", "input": "1"},
    {"id": "c", "op": "judge", "kind": "deduction", "program": "p", "input": "1", "output": "[1]", "answer": "[1]"},
    {"id": "d", "op": "judge", "kind": "abduction", "program": "def f(x):\n    return x", "output": "3", "answer": "3"},
    {"id": "e", "op": "judge", "kind": "induction", "pairs": [["1", "2"], ["2", "9"]], "answer": "def f(x):\n    return x + 1"},
    {"id": "f", "op": "run", "program": "def f(x):\n    raise KeyError(x)", "input": "1"},
    {"id": "g", "op": "validate", "program": "def f(x):\n    return -x", "inputs": ["1", "2"]},
    {"id": "c", "op": "judge", "kind": "deduction", "output": "1", "answer": "2"},
]  # fmt: skip


def test_file(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        "\n".join(["", *map(json.dumps, LINES), "nonsense", "[]", '{"id": "z"}', '{"id": [], "op": "run"}'])
    )
    out = io.StringIO()
    assert check_command(str(path), CONFIG, out) == 0
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(answers) == len(LINES) + 4
    by_id = {str(answer["id"]): answer for answer in answers if answer["id"] != "c"}
    assert by_id["a"] == {"id": "a", "status": "ok", "output": "{1, 2}"}
    assert by_id["2"] == {"id": 2, "status": "rejected", "reason": "banned_module:os"}
    assert by_id["d"] == {"id": "d", "status": "ok", "correct": True}
    assert by_id["e"] == {
        "id": "e", "status": "ok", "correct": False, "passed": 1, "total": 2, "reason": "different_value",
    }  # fmt: skip
    assert by_id["f"] == {"id": "f", "status": "error", "error_type": "KeyError"}
    assert by_id["g"] == {"id": "g", "status": "ok", "outputs": ["-1", "-2"]}
    assert sorted(answer["correct"] for answer in answers if answer["id"] == "c") == [False, True]
    assert by_id["z"]["status"] == "rejected" and by_id["z"]["reason"].startswith("bad_request")


def test_stdin_is_answered_as_it_comes():
    process = subprocess.Popen([sys.executable, "-c", CODE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    for number in range(3):  # each answer arrives while the input is still open
        line = json.dumps({"id": number, "op": "run", "program": "def f(x):\n    return x", "input": str(number)})
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"id": number, "status": "ok", "output": str(number)}
    process.stdin.write(line.encode())  # no newline before the end
    process.stdin.close()
    assert json.loads(process.stdout.readline())["id"] == 2
    assert process.wait(20) == 0
    process.stdout.close()


def test_a_reader_that_leaves_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(json.dumps(LINES[0]).encode() + b"\n", 30)
    assert b"Traceback" not in errors and process.returncode == 0


def test_what_a_dead_broker_had_in_work_is_sent_to_the_next_without_further_input(monkeypatch, tmp_path):
    class Doomed(ExecutorPool):
        def submit(self, requests):
            if requests:
                os.kill(self.broker_pids[0], signal.SIGKILL)
            super().submit(requests)

    monkeypatch.setattr(commands, "ExecutorPool", Doomed)
    path, out = tmp_path / "one.jsonl", io.StringIO()
    padding = "#" * 2_000_000  # more than a socket takes at once
    program = f"def f(x):\n    return x\n{padding}"
    path.write_text(json.dumps({"id": 1, "op": "run", "program": program, "input": "1"}) + "\n")
    assert check_command(str(path), CONFIG, out) == 0
    assert json.loads(out.getvalue())["id"] == 1


def test_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="cannot read.*No such file"):
        check_command(str(tmp_path / "none.jsonl"), CONFIG, io.StringIO())


def test_a_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        check_command(str(tmp_path), CONFIG, io.StringIO())


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
)


@given(
    JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "op", "kind", "program", "pairs", "input"), JSON))
)
def test_no_request_raises_anything_else(data):
    data = data | {"op": "judge", "kind": "induction"} if isinstance(data, dict) and len(data) > 2 else data
    try:
        request_from_json(json.dumps(data))
    except BadRequest:
        pass


@given(st.text())
def test_no_line_raises_anything_else(line):
    for text in (line, line * 3, "[" * 100_000, '{"id": ' + "1" * 5000 + "}"):
        try:
            request_from_json(text)
        except BadRequest:
            pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"op": "run"}, "program: missing"), ({"op": "run", "program": 1, "input": ""}, "program: must be text"),
        ({"op": "run", "program": ""}, "input: give either"), ({"op": "x"}, "op: must"),
        ({"op": "judge"}, "kind: must"),
        ({"op": "judge", "kind": "deduction", "output": "1"}, "answer: missing"),
        ({"op": "judge", "kind": "induction", "answer": "", "pairs": [["1"]]}, "pairs: must be"),
        ({"op": "judge", "kind": "induction", "answer": "", "pairs": []}, "pairs: must not be empty"),
        ({"op": "validate", "program": "", "inputs": []}, "inputs: must not"),
        ({"op": "validate", "program": "", "inputs": [1]}, "inputs: must be"),
    ],
)  # fmt: skip
def test_bad_requests_name_the_field(fields, message):
    with pytest.raises(BadRequest, match=message):
        request_from_json(json.dumps({"id": "x", **fields}))


def test_wire_round_trip():
    request = Request("", "judge", "induction", pairs=(("1", "2"), ("\ud800", "")), answer="def f(x): return 'é'")
    data = json.loads(json.dumps(protocol.request_to_wire(request)))
    assert protocol.request_from_wire({"id": "", **data}) == request
    verdict = Verdict("", "ok", outputs=("1", ""), correct=True, passed=1, total=2)
    data = json.loads(json.dumps(protocol.verdict_to_wire(verdict)))
    assert protocol.verdict_from_wire({"id": "", **data}) == verdict


def test_bench_prints_the_contracts_fields(monkeypatch):
    monkeypatch.setattr("azr_jax.executor.commands.measure", lambda config, seconds: {"runs_per_second": 1.0})
    out = io.StringIO()
    assert bench_command(CONFIG, True, out) == 0
    figures = json.loads(out.getvalue())
    assert {"runs_per_second", "recompiles", "workers", "device", "versions", "config"} <= set(figures)
    out = io.StringIO()
    assert bench_command(CONFIG, False, out) == 0
    assert "runs_per_second" in out.getvalue() and os.linesep in out.getvalue()
