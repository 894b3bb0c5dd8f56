"""The three task buffers: what is stored, what is refused, what the proposer is shown, what the solver trains on.

Paper sections 3.3.1-3.3.3. Every choice that depends on chance takes a `random.Random`, so that a run is a function of
its seed; state goes to and from JSON (never pickle) exactly, so that a resumed run continues bit for bit.

Presets differ in two rules (docs/differences.md): duplicates (`keep`, `reject`) and a full buffer (`drop_oldest`,
`drop_newest`). `drop_newest` reproduces the released code to the end: once its buffer is full, the tasks it takes for
new are always the same tail (azr_ray_trainer.py:460-500, 742-749).
Keys of dropped tasks are kept, so a program cannot come back as new: some 30 bytes for each, without bound.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

from azr_jax.config import PresetRules
from azr_jax.tasks.canonical import task_key
from azr_jax.tasks.kinds import KINDS, Kind, Task


def seed_task(kind: Kind) -> Task:
    """The one task everything starts from (paper Fig. 5): the identity program and `'Hello World'`."""
    program, text = "def f(a):\n    return a", "'Hello World'"
    if kind is Kind.INDUCTION:
        task = Task(kind, program, pairs=((text, text),))
    else:
        task = Task(kind, program, input=text, output=text)
    return replace(task, key=task_key(task))


class TaskBuffers:
    """Tasks of every kind, oldest first. The seed task is shown while a buffer is empty but is never stored."""

    def __init__(self, cap: int, rules: PresetRules) -> None:
        """`cap`: most tasks of each kind. `rules`: the preset's `duplicates` and `overflow`."""
        self.cap = cap
        self._reject = rules.duplicates == "reject"
        self._drop_newest = rules.overflow == "drop_newest"
        self._tasks: dict[Kind, list[Task]] = {kind: [] for kind in KINDS}
        # Insertion order is kept (a dict, not a set) so that the JSON of equal histories is equal.
        self._seen: dict[Kind, dict[str, None]] = {kind: {seed_task(kind).key: None} for kind in KINDS}
        self._dropped: dict[Kind, Counter[int]] = {kind: Counter() for kind in KINDS}  # at the cap, by step

    def size(self, kind: Kind) -> int:
        """Tasks stored."""
        return len(self._tasks[kind])

    def tasks(self, kind: Kind) -> tuple[Task, ...]:
        """Every stored task, oldest first."""
        return tuple(self._tasks[kind])

    def is_duplicate(self, task: Task) -> bool:
        """Whether the preset refuses this task because its key was seen before (never under `keep`)."""
        return self._reject and _key(task) in self._seen[task.kind]

    def add(self, task: Task) -> bool:
        """Offer a valid task; returns whether it was stored. Fills in an empty `key`. O(1), or O(cap) when full."""
        task = replace(task, key=_key(task))
        if self.is_duplicate(task):
            return False
        self._seen[task.kind][task.key] = None
        stored = self._tasks[task.kind]
        if len(stored) >= self.cap:
            self._dropped[task.kind][task.step] += 1
            if self._drop_newest:
                return False
            del stored[: len(stored) + 1 - self.cap]
        stored.append(task)
        return True

    def references(self, kind: Kind, k: int, rng: Random) -> list[Task]:
        """What a proposer is shown: `k` uniform past tasks of its kind (all of them if fewer), the seed task if none.

        For induction one task, whose program is given, from the union of the deduction and abduction buffers
        (paper section 3.2), whatever `k` is.
        """
        if kind is Kind.INDUCTION:
            union = [*self._tasks[Kind.DEDUCTION], *self._tasks[Kind.ABDUCTION]]
            return [rng.choice(union) if union else seed_task(Kind.DEDUCTION)]
        stored = self._tasks[kind]
        if not stored:
            return [seed_task(kind)][:k]
        return rng.sample(stored, min(k, len(stored)))

    def solver_batch(self, kind: Kind, size: int, step: int | None, rng: Random) -> list[Task]:
        """`size` tasks for the solver: those proposed at `step` first (None: none), topped up uniformly from history.

        Top-up is without repetition while history
        lasts, then with. An empty buffer gives an empty batch.
        """
        stored = self._tasks[kind]
        if not stored:
            return []
        fresh = [index for index, task in enumerate(stored) if task.step == step]
        if step is not None and self._drop_newest and (missing := self._dropped[kind][step]):
            # As released: the newest that are stored stand in for the new ones that were not.
            fresh = list(range(max(0, len(stored) - missing - len(fresh)), len(stored)))
        batch = fresh[-size:] if size else []
        taken = set(batch)
        rest = [index for index in range(len(stored)) if index not in taken]
        batch += rng.sample(rest, min(size - len(batch), len(rest)))
        batch += rng.choices(range(len(stored)), k=size - len(batch))
        return [stored[index] for index in batch]

    def metrics(self, step: int) -> dict[str, float]:
        """`buffer/{size,new,dropped}/KIND`: tasks held, those of `step` among them, dropped at the cap in `step`."""
        row: dict[str, float] = {}
        for kind in KINDS:
            row[f"buffer/size/{kind.value}"] = float(self.size(kind))
            row[f"buffer/new/{kind.value}"] = float(sum(task.step == step for task in self._tasks[kind]))
            row[f"buffer/dropped/{kind.value}"] = float(self._dropped[kind][step])
        return row

    def digest(self) -> str:
        """Of all tasks by key and step, in their order: equal buffers have the same."""
        found = hashlib.blake2b(digest_size=8)
        for kind in KINDS:
            found.update("".join(f"{task.step} {task.key}\n" for task in self._tasks[kind]).encode())
        return found.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The whole state as JSON-able data; `from_json` is its inverse."""
        return {
            "cap": self.cap,
            "tasks": {kind.value: [task.to_json() for task in self._tasks[kind]] for kind in KINDS},
            "seen": {kind.value: list(self._seen[kind]) for kind in KINDS},
            "dropped": {kind.value: [[step, count] for step, count in self._dropped[kind].items()] for kind in KINDS},
        }

    @classmethod
    def from_json(cls, state: dict[str, Any], rules: PresetRules) -> TaskBuffers:
        """Inverse of `to_json`, under the same preset."""
        buffers = cls(state["cap"], rules)
        for kind in KINDS:
            buffers._tasks[kind] = [Task.from_json(record) for record in state["tasks"][kind.value]]
            buffers._seen[kind] = dict.fromkeys(state["seen"][kind.value])
            buffers._dropped[kind] = Counter(dict(state["dropped"][kind.value]))
        return buffers


def _key(task: Task) -> str:
    return task.key or task_key(task)
