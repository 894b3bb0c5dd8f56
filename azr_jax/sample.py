"""`azr-jax sample`: watch a model propose and solve, one task at a time.

With `--prompt` the text is completed as it is, and that is all. Without, the pieces of a task are read from a terminal
or a pipe, put to the model in its own prompt format, and the response is parsed and judged exactly as in self-play:
programs, the user's too, run in the executor only. Computes in float32.

Not here: batches, benchmarks, a run's checkpoints (a model is a Hugging Face folder).
"""

from __future__ import annotations

import json
import logging
import re
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from azr_jax.config import ExecutorConfig, MeshConfig, RolloutConfig, TasksConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.errors import UserError
from azr_jax.executor import ExecutorPool
from azr_jax.executor import Request as Check
from azr_jax.executor.protocol import verdict_fields
from azr_jax.executor.values import canonical, parse_arguments, parse_value
from azr_jax.learn.state import param_shardings
from azr_jax.models.config import ModelConfig
from azr_jax.models.vocabulary import audit
from azr_jax.models.weights import load_weights, model_folder
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Filters, Request, request_key
from azr_jax.round import answer_check
from azr_jax.tasks.buffers import seed_task
from azr_jax.tasks.compact import CompactFormat
from azr_jax.tasks.kinds import Kind, Role, Task
from azr_jax.tasks.literal import unmarked
from azr_jax.tasks.validation import distinct_inputs, proposal_rejection
from azr_jax.templates import load_prompts

log = logging.getLogger(__name__)

MAX_PROMPT = RolloutConfig().max_prompt
NO_FILTERS = Filters()
MAX_RESPONSE, MAX_RESPONSE_COMPACT = 2048, 128
INDUCTION_INPUTS_COMPACT = 6  # as the embedded model was taught; other models are asked for tasks.induction_inputs
BAD_FORMAT = {"status": "rejected", "reason": "format"}
_CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")  # what a model writes must not steer the terminal


class Refused(Exception):
    """What the user typed is no task; the message is one line for them."""


class Model:
    """Weights, tokenizer and prompt format of a folder; `complete` continues a text, `samples` of them at once."""

    def __init__(
        self, name: str, temperature: float, seed: int, filters: Filters = NO_FILTERS, samples: int = 1
    ) -> None:
        folder = model_folder(name)
        self.config = ModelConfig.load(folder)
        _, self.tokenizer, self.prompts = load_prompts(name, "auto")
        self.compact = isinstance(self.prompts, CompactFormat)
        self.mesh = make_mesh(MeshConfig())
        self.params = load_weights(folder, self.config, param_shardings(self.config, self.mesh))
        audit(self.params, self.config, self.tokenizer, self.mesh)
        self.temperature, self.seed, self.filters = temperature, seed, filters
        most = MAX_RESPONSE_COMPACT if self.compact else MAX_RESPONSE
        rollout = RolloutConfig(max_prompt=MAX_PROMPT, max_response=most, slots=samples)
        self.engine = Engine(self.config, rollout, self.tokenizer, self.mesh)
        self._count = 0

    def complete(self, text: str, stop: tuple[str, ...] = (), samples: int = 1) -> list[dict[str, Any]]:
        """Records of prompt, response, number of tokens and finish, one a sample; every call draws afresh.

        UserError: no text, or more than MAX_PROMPT tokens.
        """
        ids = self.tokenizer.prompt(text)
        if not text or not ids:
            raise UserError("the prompt is empty; give at least one character")
        if len(ids) > MAX_PROMPT:
            raise UserError(f"the prompt has {len(ids)} tokens, more than {MAX_PROMPT}; shorten it")
        if not self.tokenizer.represents(text):
            known = "; this model knows printable ASCII and newlines" if self.compact else ""
            log.warning("warning: the tokenizer cannot represent all characters of the prompt%s", known)
        self.engine.stop = stop
        requests = []
        for _ in range(samples):
            key = request_key(self.seed, "sample", self._count)
            requests.append(Request(ids, key, self.temperature, filters=self.filters))
            self._count += 1
        records = []
        for completion in self.engine.generate(self.params, requests):
            record = {"prompt": unmarked(text), "response": self.engine.text(completion)}
            records.append(record | {"tokens": len(completion.tokens), "finish": completion.finish})
        return records


class Console:
    """Asks on a terminal, with line editing, or reads lines from a pipe. EOFError at the end of the input."""

    def __init__(self) -> None:
        self.terminal = sys.stdin.isatty()
        self._editing = self.terminal and sys.stdout.isatty()
        if self._editing:
            with suppress(ImportError):
                import readline  # noqa: F401 (from here on `input` edits and remembers lines)
        elif hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def line(self, prompt: str) -> str:
        """One line."""
        if self._editing:
            return input(prompt)
        self.note(prompt)
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        return text.rstrip("\r\n")

    def lines(self, prompt: str, *more: str) -> list[str]:
        """Lines up to an empty one or the end of the input, asked for by the prompts in turn."""
        prompts = (prompt, *more)
        found: list[str] = []
        try:
            while text := self.line(prompts[len(found) % len(prompts)]):
                found.append(text)
        except EOFError:
            if not found:
                raise
        return found

    def note(self, text: str) -> None:
        """Something for a user at a terminal that is no result."""
        if self.terminal:
            sys.stderr.write(text)
            sys.stderr.flush()


@dataclass(frozen=True)
class Session:
    """Asks for the pieces of a task and shows what the model makes of it. Methods raise EOFError and Refused."""

    model: Model
    pool: ExecutorPool
    console: Console
    kind: Kind
    n_inputs: int

    def solve(self) -> dict[str, Any]:
        """A task of the user's, the model's answer and the verdict."""
        task = self.task()
        prompts = self.model.prompts
        (record,) = self.model.complete(prompts.solve(task), prompts.stop)
        answer = prompts.parse_answer(self.kind, record["response"])
        verdict = BAD_FORMAT if answer is None else self.check(answer_check("0", task, answer))
        return record | {"answer": answer, "verdict": {"correct": False} | verdict}

    def propose(self) -> dict[str, Any]:
        """The model's proposal, made from one reference, and whether it is a valid task."""
        reference = self.reference()
        prompts = self.model.prompts
        (record,) = self.model.complete(prompts.propose(self.kind, [reference], self.n_inputs), prompts.stop)
        proposal = prompts.parse_proposal(self.kind, [reference], record["response"])
        if proposal is None:
            return record | {"proposal": None, "verdict": BAD_FORMAT}
        reason = proposal_rejection(proposal, self.n_inputs)
        if reason is not None:
            verdict: dict[str, Any] = {"status": "rejected", "reason": reason}
        else:
            inputs = distinct_inputs(proposal.inputs)[: self.n_inputs]
            verdict = self.check(Check("0", "validate", program=proposal.program, input=proposal.input, inputs=inputs))
        shown = {name: value for name, value in asdict(proposal).items() if value and name != "kind"}
        return record | {"proposal": shown, "verdict": verdict}

    def task(self) -> Task:
        """The task to solve. Blank lines before it are skipped."""
        while True:
            if self.kind is Kind.INDUCTION:
                self.console.note("pairs; the first half is shown to the model, the rest judge its program\n")
                lines = self.console.lines("  input: ", "  output: ")
            else:
                self.console.note("program; an empty line ends it\n")
                lines = self.console.lines("  | ")
            if lines:
                break
        if self.kind is Kind.INDUCTION:
            return self.induction(lines)
        program = "\n".join(lines)
        if self.kind is Kind.DEDUCTION:
            return self.deduction(program)
        return Task(self.kind, program, output=read_output(self.rest("output: ")))

    def deduction(self, program: str) -> Task:
        """A program with an input; the gold output is what it returns."""
        given = read_arguments(self.rest("input: "))
        verdict = self.check(Check("0", "validate", program=program, input=given))
        if verdict["status"] != "ok":
            raise Refused(f"program and input make no task: {describe(verdict)}")
        return Task(self.kind, program, input=given, output=verdict["output"])

    def rest(self, prompt: str) -> str:
        """The line that makes a program a task."""
        try:
            return self.console.line(prompt)
        except EOFError:
            log.error("the input ended after a program; an empty line and the program's %s follow it", prompt[:-2])
            raise

    def induction(self, lines: list[str]) -> Task:
        """Pairs from lines of input and output in turn, and a hint."""
        hint = ""
        with suppress(EOFError):
            hint = self.console.line("hint (may be empty): ")
        if len(lines) < 4 or len(lines) % 2:
            raise Refused("induction needs two pairs or more: a line with an input, a line with its output, ...")
        pairs = zip(map(read_arguments, lines[::2]), map(read_output, lines[1::2]), strict=True)
        return Task(self.kind, "", pairs=tuple(pairs), message=hint)

    def reference(self) -> Task:
        """What the proposer is shown: the seed task, or a program of the user's (with an input unless induction)."""
        self.console.note("reference program; an empty line ends it, and alone stands for the identity program\n")
        program = "\n".join(self.console.lines("  | "))
        seed = seed_task(self.kind)
        if not program:
            return seed
        return replace(seed, program=program) if self.kind is Kind.INDUCTION else self.deduction(program)

    def check(self, request: Check) -> dict[str, Any]:
        """The executor's verdict, the fields that mean something."""
        (verdict,) = self.pool.run_all([request])
        return verdict_fields(request, verdict)


def sample_command(args: Namespace) -> int:
    """`azr-jax sample`; returns the exit code. `args` are those of the command line (cli.py)."""
    filters = Filters(args.top_k, args.top_p, args.min_p, args.repetition, args.presence, args.frequency)
    if args.prompt is None and args.samples != 1:
        raise UserError("--samples belongs to --prompt; a session answers one task at a time", exit_code=2)
    model = Model(args.model, args.temperature, args.seed, filters, args.samples)
    if args.prompt is not None:
        for record in model.complete(args.prompt, samples=args.samples):
            if record["finish"] == "length":
                log.info("cut after %d tokens", record["tokens"])
            write(json.dumps(record) if args.json else record["response"])
        return 0
    role, console = Role(args.role), Console()
    n_inputs = INDUCTION_INPUTS_COMPACT if model.compact else TasksConfig().induction_inputs
    with ExecutorPool(ExecutorConfig(workers=1)) as pool:
        session = Session(model, pool, console, Kind(args.kind), n_inputs)
        console.note(f"{role.value}, {args.kind}. Ctrl-D ends.\n")
        heard = False  # of any task
        while True:
            try:
                record = session.solve() if role is Role.SOLVE else session.propose()
            except EOFError:
                console.note("\n")
                if not heard and not console.terminal:
                    ask = "run the command in a terminal to see what it asks for"
                    raise UserError(f"standard input held no whole task; {ask}", exit_code=2) from None
                return 0
            except (Refused, UserError) as error:
                heard = True
                log.error("%s", error)
                continue
            heard = True
            record = {"role": role.value, "kind": args.kind} | record
            write(json.dumps(record) if args.json else readable(record))


def readable(record: dict[str, Any]) -> str:
    """A record of `Session` for human eyes."""
    fields = {"response": record["response"]} | (record.get("proposal") or {})
    if record["finish"] == "length":
        fields["response"] += f" [cut after {record['tokens']} tokens]"
    if record.get("answer") is not None:
        fields["answer"] = record["answer"]
    fields["verdict"] = describe(record["verdict"])
    lines = []
    for name, value in fields.items():
        text = value if isinstance(value, str) else "\n".join(value)
        text = _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)
        lines.append(f"{name + ':':<10}" + text.replace("\n", "\n" + " " * 10))
    return "\n".join(lines) + "\n"


def describe(verdict: dict[str, Any]) -> str:
    """A verdict in words."""
    if verdict["status"] != "ok":
        details = [verdict[name] for name in ("error_type", "reason") if verdict.get(name)]
        return ", ".join([verdict["status"], *details])
    if "correct" not in verdict:
        outputs = verdict.get("outputs") or [verdict["output"]]
        return "valid, returns " + " | ".join(outputs)
    share = f", {verdict['passed']} of {verdict['total']} hidden pairs" if "total" in verdict else ""
    return ("correct" if verdict["correct"] else "wrong") + share


def read_arguments(text: str) -> str:
    """An argument list as typed. Refused if it is not one."""
    try:
        parse_arguments(text)
    except ValueError as error:
        raise Refused(f"an input is a list of arguments such as 3, 'ab' or [1, 2]: {error}") from None
    return text.strip()


def read_output(text: str) -> str:
    """Canonical text of a value. Refused if it is none."""
    try:
        return canonical(parse_value(text))
    except ValueError as error:
        raise Refused(f"an output is a Python literal such as 7, 'ab' or [1, 2]: {error}") from None


def write(text: str) -> None:
    """A result, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
