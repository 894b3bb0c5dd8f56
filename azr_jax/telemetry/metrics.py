"""The glossary: every metric name, once, with its definition; docs/metrics.md is generated from here.

Rows of metrics.jsonl are flat: {"step": 12, "solve/accuracy/deduction": 0.41, ...}. `{kind}` and the like in a name
stand for the choices below, `*` for an open set. Regenerate the page with
`python -m azr_jax.telemetry.metrics > docs/metrics.md`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from azr_jax.telemetry.oversight import CATEGORIES

KIND_NAMES = ("deduction", "abduction", "induction")
CHOICES: dict[str, tuple[str, ...]] = {
    "kind": KIND_NAMES,
    "role": ("propose", "solve"),
    "mode": ("greedy", "sampled"),
    "set": (*KIND_NAMES, "pooled", "longer", "bigger"),
    "category": CATEGORIES,
    "phase": ("rollout", "update", "eval", "compile", "step"),
}

#: group -> (what the group is about, {name without the group: definition})
GLOSSARY: dict[str, tuple[str, dict[str, str]]] = {
    "reward": (
        "What the update is given. Format counts: -1 for an unreadable answer, -0.5 for a readable one worth nothing.",
        {
            "propose/{kind}": "mean reward of the proposals",
            "solve/{kind}": "mean reward of the solver's answers",
        },
    ),
    "solve": (
        "The solver on the tasks of this step. Falling accuracy is no failure by itself: proposed tasks get harder.",
        {
            "accuracy/{kind}": "share of answers judged correct",
            "format_error/{kind}": "share of responses without a readable answer",
            "think_share/{kind}": "share of responses that reason before answering",
            "length/{kind}": "mean tokens of a response",
            "length_correct/{kind}": "mean tokens of a response judged correct",
            "length_wrong/{kind}": "mean tokens of a response judged wrong",
            "truncated/{kind}": "share of responses cut at the length limit",
            "unjudged/{kind}": "answers left out of the update because judging them failed through our own fault",
        },
    ),
    "propose": (
        "The proposer's funnel. Shares are of all proposals of the kind where nothing else is said.",
        {
            "count/{kind}": "proposals made; fewer than tasks.batch if prompts did not fit into rollout.max_prompt",
            "parsed/{kind}": "share in a readable format",
            "valid/{kind}": "share that also runs, is deterministic and passes the static rules",
            "accepted/{kind}": "share that also entered the buffer: valid, new and not held out",
            "duplicate/{kind}": "share of the valid ones whose canonical form was seen before",
            "held_out/{kind}": "share of the valid ones refused because they belong to the held-out evaluation",
            "reject/*": "proposals refused for one reason (code of the validator or status of the executor)",
            "solve_rate/{kind}": "mean success rate r of the learnability samples, over valid proposals",
            "rate_between/{kind}": "share of valid proposals with 0 < r < 1: those that teach",
            "rate_between": "the same over all kinds; below 5 % raises an alarm",
            "rate_zero/{kind}": "share of valid proposals that no sample solved",
            "rate_one/{kind}": "share of valid proposals that every sample solved",
            "statements/{kind}": "mean lines of a valid program after its first (in the micro language, statements)",
            "unique_programs": "distinct canonical programs among the valid deduction and abduction proposals",
            "new_programs": "those of them that entered a buffer; in the preset `fixed` their kind had never had them",
            "think_share/{kind}": "share of proposals that reason before the task",
            "length/{kind}": "mean tokens of a proposal",
            "truncated/{kind}": "share of proposals cut at the length limit",
        },
    ),
    "buffer": (
        "Stored tasks.",
        {
            "size/{kind}": "tasks held",
            "new/{kind}": "tasks added in this step",
            "age_mean/{kind}": "mean age, in steps, of the tasks the solver was given",
            "dropped/{kind}": "tasks dropped in this step because the buffer was at its cap",
        },
    ),
    "learner": (
        "The update. With one strictly on-policy step the ratio is 1 up to rounding and nothing is clipped.",
        {
            "loss": "policy-gradient loss, mean over trained tokens, entropy bonus included",
            "surrogate": "the clipped policy-gradient objective alone, mean over trained tokens",
            "entropy": "entropy of the next token, exact over the vocabulary, mean over trained tokens (nats)",
            "entropy_{role}": "the same over the tokens of one role",
            "grad_norm": "global norm of the gradient before clipping",
            "ratio_mean": "mean probability ratio of learner to sampler",
            "ratio_max": "largest such ratio",
            "clip_low": "share of tokens whose ratio is below 1 - clip_low and whose gradient is cut by it",
            "clip_high": "share of tokens whose ratio is above 1 + clip_high and whose gradient is cut by it",
            "kl": "estimate of KL from sampler to learner a token, mean of ratio - 1 - log ratio (nats)",
            "logp_gap_mean": "mean absolute difference of log-probability between sampler and learner",
            "logp_gap_p99": "99th percentile of it, rounded up to one of four levels to a factor of ten",
            "logp_gap_max": "largest such difference",
            "lr": "learning rate",
            "rows": "packed rows",
            "tokens": "trained tokens (those of responses)",
            "padding": "share of the packed rows' positions that hold no token",
            "skipped": "1 if the update was skipped because its gradient was not finite",
            "reward_std/{role}/{kind}": "standard deviation of the rewards of one of the six groups; 0: no signal",
            "update_norm": "global norm of the change of the parameters",
            "param_norm": "global norm of the parameters after the update",
            "bf16_changed": "share of the weights whose bfloat16 rounding changed: what a bfloat16 sampler sees of it",
            "importance_ess": "with `learn.importance_cap`: effective sample size, as a share of the trained tokens",
            "importance_truncated": "with `learn.importance_cap`: share of tokens whose importance weight was capped",
            "reference_kl": "with `learn.kl`: its estimate of the divergence from the initial weights (nats a token)",
        },
    ),
    "sampler": (
        "Generation, all roles together.",
        {
            "sequences": "responses generated",
            "tokens": "tokens generated",
            "truncated": "share of responses cut at the length limit",
        },
    ),
    "time": (
        "Wall-clock seconds of this step. `rollout` is everything from the first prompt to the last verdict; `compile` "
        "is the part of all these that XLA spent on new programs; `step` is the whole, without writing files.",
        {"{phase}": "seconds spent in one phase"},
    ),
    "perf": (
        "What the work cost. These depend on the machine and on timing, as `time/` does; nothing else does.",
        {
            "tokens_per_second": "tokens generated over the time of the rollout, waiting for the executor included",
            "device_share": "share of the rollout's time in which the device had work",
            "slot_use": "tokens over decode steps times slots: the share of the decoder's work that was kept",
            "prefilled": "prompts whose keys and values were computed",
            "shared": "responses that continue a prompt computed before",
            "preempted": "responses that had to start over because the cache was full",
            "update_tokens_per_second": "tokens of prompts and responses over the time of the update, with compiling",
            "mfu": "share of the devices' peak that went into the update's model FLOPs; on devices whose peak is known",
            "rss_mb": "resident memory of the trainer process, MiB",
            "compiles": "programs compiled so far; constant after the first steps",
        },
    ),
    "executor": (
        "The pool of processes that runs programs. Counts are since the start (or resume) of the trainer.",
        {
            "requests": "checks asked for",
            "runs": "program runs finished",
            "status_*": "checks answered with one status: ok, timeout, memory, crashed, infra and so on",
            "reason_*": "checks refused for one reason",
            "p50_ms": "median time of a check, milliseconds",
            "p99_ms": "99th percentile of it",
            "worker_rss_mb": "resident memory of the largest worker, MiB",
            "*": "further figures of the pool",
        },
    ),
    "oversight": (
        "First-tier rules over the texts of this step; never part of the reward.",
        {
            "scanned": "texts looked at",
            "flagged_share": "share of them with at least one flag",
            "flags/{category}": "flags of one category",
        },
    ),
    "eval": (
        "The fixed held-out set: the same items each time, so that differences are paired. Sets: each kind, all kinds "
        "`pooled`, `longer` programs and `bigger` values. `_low` and `_high` bound the 95 % interval.",
        {
            "{mode}/{set}": "pass@1, greedy or sampled at temperature 1",
            "{mode}/{set}_low": "lower bound of its 95 % interval",
            "{mode}/{set}_high": "upper bound of its 95 % interval",
            "gain/{mode}/{set}": "difference to the evaluation before the first update, paired by item",
            "gain/{mode}/{set}_low": "lower bound of its 95 % interval",
            "gain/{mode}/{set}_high": "upper bound of its 95 % interval",
            "count/{set}": "items of the set",
            "think_share/{mode}": "share of deduction and abduction responses that reason before answering",
            "length/{mode}": "mean tokens of a response",
        },
    ),
}

#: Groups that depend on the machine and on timing. Every other figure is the same in any two runs of one configuration,
#: on one kind of device, however often they were killed and resumed.
MEASURED = ("time", "perf", "executor")


def repeatable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without what was measured: what a run and its repetition must have in common."""
    return {name: value for name, value in row.items() if name.partition("/")[0] not in MEASURED}


def unknown_names(metrics: Iterable[str]) -> list[str]:
    """Names of a row that the glossary does not hold ("step" is no metric), in the row's order."""
    pattern = _known()
    return [name for name in metrics if name != "step" and not pattern.fullmatch(name)]


def markdown() -> str:
    """Content of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "<!-- generated: `python -m azr_jax.telemetry.metrics > docs/metrics.md` -->",
        "",
        "`metrics.jsonl` in a run folder holds one JSON object a step: `step` and the names below. A name is absent",
        "when there was nothing to measure (no evaluation in this step, no valid proposal of a kind); a number that is",
        "not finite is written as `null`. `*` stands for an open set, and:",
        "",
        *(f"- `{{{name}}}`: {', '.join(values)}" for name, values in CHOICES.items()),
    ]
    for group, (about, names) in GLOSSARY.items():
        lines += ["", f"## {group}/", "", about, "", "| name | definition |", "|---|---|"]
        lines += [f"| `{group}/{name}` | {text} |" for name, text in names.items()]
    return "\n".join(lines) + "\n"


@cache
def _known() -> re.Pattern[str]:
    """One pattern that matches every name of the glossary."""
    alternatives = []
    for group, (_, names) in GLOSSARY.items():
        for name in names:
            pattern = re.escape(f"{group}/{name}").replace(r"\*", r"[\w/.\-]+")
            for choice, values in CHOICES.items():
                pattern = pattern.replace(rf"\{{{choice}\}}", f"(?:{'|'.join(values)})")
            alternatives.append(pattern)
    return re.compile("|".join(alternatives))


if __name__ == "__main__":
    sys.stdout.write(markdown())
