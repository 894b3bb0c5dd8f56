"""What the embedded model can do before any self-play: the figures of its card.

    python benchmarks/embedded_model.py --per-kind 1000 --out benchmarks/results/embedded_model.json

Greedy and sampled pass@1 on held-out programs in three modes: `free` (the model chooses whether to think), `direct`
(the prompt ends in the answer tag), `think` (it ends in the think tag); by kind and by number of statements. Then
1,000 proposals of each kind from the identity program: validity and diversity. Programs run in the executor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from demo import machine

from azr_jax.config import Config, ExecutorConfig, MeshConfig, RolloutConfig, TasksConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.evals.heldout import Outcome, evaluate, held_out_tasks
from azr_jax.executor import ExecutorPool
from azr_jax.learn.state import param_shardings
from azr_jax.micro.language import is_held_out
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import load_tokenizer
from azr_jax.models.weights import load_weights, model_folder
from azr_jax.rollout.engine import Engine
from azr_jax.selfplay import SelfPlay
from azr_jax.tasks.compact import CompactFormat
from azr_jax.tasks.kinds import KINDS, Kind, Task


class Prefixed(CompactFormat):
    """The compact format with the first tag of the response already in the prompt."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def solve(self, task: Task) -> str:
        """The prompt and the forced tag."""
        return super().solve(task) + self.prefix

    def parse_answer(self, kind: Kind, response: str) -> str | None:
        """The answer of tag and response together."""
        return super().parse_answer(kind, self.prefix + response)

    def thinks(self, response: str) -> bool:
        """Of tag and response together."""
        return super().thinks(self.prefix + response)


def by_size(outcome: Outcome, kind: Kind) -> dict[str, float]:
    """pass@1 by number of statements."""
    groups: dict[int, list[bool]] = defaultdict(list)
    for task, correct in zip(outcome.tasks, outcome.correct, strict=True):
        if task.kind is kind:
            groups[task.program.count("\n")].append(correct)
    return {str(n): round(sum(v) / len(v), 3) for n, v in sorted(groups.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--per-kind", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = model_folder(args.model)
    model, tokenizer = ModelConfig.load(folder), load_tokenizer(folder)
    rollout = RolloutConfig(max_prompt=96, max_response=64, slots=256)
    mesh = make_mesh(MeshConfig())
    params = load_weights(folder, model, param_shardings(model, mesh))
    engine = Engine(model, rollout, tokenizer, mesh)
    tasks = held_out_tasks("standard", args.per_kind, seed=7)
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "per_kind": args.per_kind}
    with ExecutorPool(ExecutorConfig()) as pool:
        for name, prefix in (("free", ""), ("direct", "<ans>"), ("think", "<think>")):
            for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                outcome = evaluate(engine, params, pool, Prefixed(prefix), tasks, temperature, seed=0)
                result[f"{name}/{mode}"] = {
                    kind.value: {
                        "pass@1": round(outcome.accuracy(kind).value, 4),
                        "by_statements": by_size(outcome, kind),
                        "think_share": round(outcome.think_share(kind), 3),
                        "length": round(outcome.mean_length(kind), 1),
                    }
                    for kind in KINDS
                }
                print(name, mode, {k.value: result[f"{name}/{mode}"][k.value]["pass@1"] for k in KINDS}, flush=True)
        config = Config(rollout=rollout, tasks=TasksConfig(batch=1000, references=1, induction_inputs=6))
        play = SelfPlay(config, engine, pool, CompactFormat(), is_held_out)
        proposals = play.propose(params, 0, KINDS, ("benchmark",))
        play.validate(proposals, 0)
        result["proposals"] = {
            kind.value: {
                "valid": sum(a.task is not None for a in proposals if a.kind is kind) / 1000,
                "new": play.buffers.size(kind) / 1000,
            }
            for kind in KINDS
        }
    print(result["proposals"])
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
