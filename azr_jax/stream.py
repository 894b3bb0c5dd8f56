"""One stream of responses and verdicts: the device decodes, the executor checks, and each answer starts what follows.

Nothing waits for a batch: a callback that hears a response may ask for a check, one that hears a verdict for further
responses, and both are under way while the device goes on with the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from uuid import uuid4

from azr_jax.attempts import Attempt
from azr_jax.executor import ExecutorPool, Verdict
from azr_jax.executor import Request as Check
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Request, request_key

Heard = Callable[[Attempt], None]
Judged = Callable[[Attempt, Verdict], None]

IDLE_SECONDS = 1.0  # how long to wait for a verdict at a time, when the device has nothing to do


class Stopped(Exception):
    """The run was asked to stop; what was under way is given up, and a resumed run says it again."""


class Stream:
    """Requests to engine and pool, which are used by nobody else meanwhile.

    `stopped` is asked between two blocks of decoding. Every response is drawn at `temperature` with the key of (seed,
    what the attempt is), so no order of events can change it.
    """

    def __init__(
        self,
        engine: Engine,
        pool: ExecutorPool,
        seed: int,
        temperature: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.engine, self.pool, self._stopped = engine, pool, stopped
        self._seed, self._temperature = seed, temperature
        self._responses: dict[object, tuple[Attempt, Heard]] = {}
        self._checks: dict[str, tuple[Attempt, Judged]] = {}
        # A check of a dropped attempt may be answered when another stream listens: names are this stream's own.
        self._names = (f"{uuid4().hex}-{number}" for number in itertools.count())
        self._requests: list[Request] = []
        self._questions: list[Check] = []

    def respond(self, attempt: Attempt, then: Heard, priority: float = 0.0) -> None:
        """Have the policy respond; `then(attempt)` is called when `completion` and `response` are there."""
        key = request_key(self._seed, *attempt.identity)
        self._requests.append(Request(attempt.prompt, key, self._temperature, id=attempt.identity, priority=priority))
        self._responses[attempt.identity] = attempt, then

    def check(self, attempt: Attempt, question: Callable[[str], Check], then: Judged) -> None:
        """Ask the executor `question(id)`; `then(attempt, verdict)` is called with its answer."""
        name = next(self._names)
        self._questions.append(question(name))
        self._checks[name] = attempt, then

    def drop(self, attempts: list[Attempt]) -> None:
        """These attempts are of no interest any more: no callback hears of them again."""
        gone = set(map(id, attempts))
        self._requests = [request for request in self._requests if id(self._responses[request.id][0]) not in gone]
        self.engine.cancel([attempt.identity for attempt in attempts])
        self._responses = {name: entry for name, entry in self._responses.items() if id(entry[0]) not in gone}
        self._checks = {name: entry for name, entry in self._checks.items() if id(entry[0]) not in gone}

    def run(self) -> None:
        """Until nothing is under way, what the callbacks ask for included.

        Stopped: `stopped` said so. After this and any other exception the engine has no requests and no weights.
        """
        try:
            self._run()
        except BaseException:
            self.engine.abandon()
            raise

    def _run(self) -> None:
        while self._responses or self._checks:
            if self._stopped():
                raise Stopped
            requests, self._requests = self._requests, []
            questions, self._questions = self._questions, []
            self.engine.submit(requests)
            self.pool.submit(questions)
            if self.engine.busy:
                self.engine.step()
            for name, completion in self.engine.poll().items():
                entry = self._responses.pop(name, None)  # None: dropped by what an earlier response led to
                if entry is not None:
                    attempt, heard = entry
                    attempt.completion = completion
                    attempt.response = self.engine.text(completion)
                    heard(attempt)
            idle = not (self.engine.busy or self._requests or self._questions)
            for verdict in self.pool.poll(IDLE_SECONDS if idle and self._checks else 0.0):
                asked = self._checks.pop(verdict.id, None)  # None: its attempt was dropped
                if asked is not None:
                    asked[1](asked[0], verdict)
