"""Typed configuration: frozen dataclasses, filled from YAML and `a.b=c` overrides.

Every key is documented here, beside its type and default, and nowhere else: `azr-jax config` and docs/config.md are
made from the `#:` comments. Reading files and overrides is `azr_jax.config_loader`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TasksConfig:
    """Proposing, validating and storing tasks."""

    batch: int = 64  #: B, proposals and solves per kind and step
    references: int = 6  #: K, past tasks shown to the proposer of deduction and abduction
    induction_inputs: int = 10  #: N, inputs per induction task; the first half is shown to the solver
    samples: int = 8  #: n, solver samples per valid proposal that estimate learnability
    seed_factor: int = 4  #: each buffer is seeded with seed_factor * batch tasks
    buffer_cap: int = 16384  #: most tasks a buffer holds
    prompt_format: Literal["auto", "base", "chat", "compact"] = "auto"  #: prompt template; auto: see docs/prompts.md


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling from the policy. Top-p and top-k are refused: the policy gradient needs the sampling distribution."""

    max_prompt: int = 6144  #: longest prompt, tokens
    max_response: int = 8096  #: longest response, tokens
    temperature: float = 1.0  #: of every trained or learnability sample
    slots: int = 256  #: sequences decoded together
    block: int = 16  #: decode steps between two looks at which sequences are done
    page: int = 64  #: tokens of a page of the KV cache: a power of two from 8 to 256
    prefill_tokens: int = 0  #: prompt tokens computed at once; 0: 4096, on a CPU 512
    cache_dtype: Literal["auto", "int8"] = "auto"  #: of the KV cache; auto: learn.dtype
    cache_gb: float = 0.0  #: GiB of KV cache on each device; 0: what is free once the weights are there
    ban_untrained_tokens: bool = False  #: never sample tokens whose vocabulary rows look untrained


@dataclass(frozen=True)
class LearnConfig:
    """The policy-gradient update: AdamW on one clipped, token-mean, strictly on-policy step."""

    lr: float = 1e-6  #: peak learning rate
    schedule: Literal["constant", "linear", "cosine"] = "constant"  #: decay from lr to 0 over `steps`
    warmup: int = 0  #: steps of linear warm-up
    beta1: float = 0.9  #: decay of Adam's first moment
    beta2: float = 0.999  #: decay of Adam's second moment
    weight_decay: float = 0.01  #: decoupled, on matrices only
    grad_clip: float = 1.0  #: global norm
    clip_low: float = 0.2  #: PPO ratio clip below 1
    clip_high: float = 0.2  #: PPO ratio clip above 1
    dual_clip: float = 0.0  #: bound on the loss of a token with negative advantage, in advantages; 0: none
    entropy_coef: float = 0.001  #: weight of the exact token entropy bonus
    advantage: Literal["trr", "global", "grpo", "rloo"] = "trr"  #: baseline: of (role, kind), step, task, other samples
    aggregation: Literal["token-mean", "sequence-mean", "constant", "group-mean"] = "token-mean"  #: what weighs alike
    overlong: Literal["score", "mask", "penalty"] = "score"  #: cut responses: as they are, left out, long ones punished
    kl: Literal["none", "k1", "k2", "k3"] = "none"  #: penalty for leaving the initial weights, by estimator
    kl_coef: float = 0.001  #: its weight
    importance_cap: float = 0.0  #: truncated importance sampling instead of the ratio clip; 0: off
    row_tokens: int = 0  #: tokens of a packed row; 0: max_prompt + max_response
    rows: int = 1  #: packed rows in a micro-batch
    reuse_estimates: bool = False  #: also train the solver on the learnability samples
    moments_dtype: Literal["float32", "bfloat16"] = "float32"  #: of Adam's moments; bfloat16 is rounded stochastically
    offload: bool = False  #: keep the optimizer's state in host memory
    dtype: Literal["float32", "bfloat16"] = "float32"  #: of the forward and backward pass; the master is float32
    remat: Literal["block", "dots", "none"] = "block"  #: kept for the backward pass: block inputs, matrix products, all


@dataclass(frozen=True)
class ExecutorConfig:
    """The pool of processes that runs model-written programs."""

    workers: int = 0  #: 0: from CPU affinity
    cpu_seconds: float = 1.0  #: CPU time of one run
    wall_seconds: float = 5.0  #: wall time of one run
    memory_mb: int = 512  #: address space of one run
    output_chars: int = 4096  #: longest canonical output
    determinism_runs: int = 2  #: runs, in different processes and hash seeds, that must agree
    numeric: Literal["strict", "python"] = "strict"  #: strict: 1, 1.0 and True differ; python: they are equal
    allow_weaker_sandbox: bool = False  #: run although a mandatory sandbox layer is missing here


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh, data x fsdp x tensor. 0 means: all devices that the other axes leave."""

    data: int = 1  #: copies of the model, each fed its own share of a batch
    fsdp: int = 0  #: parameters and batch are both split over this axis
    tensor: int = 1  #: heads, hidden units and, between products, tokens are split over this axis


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out micro programs: a fixed set in training, fresh ones before against after at the end."""

    every: int = 0  #: steps between evaluations; 0: never, and no table at the end
    per_kind: int = 500  #: held-out programs of each kind; twice as many fresh ones for the table at the end


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving the whole state as one atomic step."""

    every: int = 10  #: steps between saves
    keep: int = 3  #: newest checkpoints kept, besides the one with the best eval/sampled/pooled (see eval.every)


Control = Literal["none", "no_updates", "random_rewards", "frozen_proposer", "constant_learnability"]


@dataclass(frozen=True)
class Config:
    """One run. `run_dir`, `steps`, `seed`, `preset`, `model` are the keys most runs change."""

    run_dir: str = "runs/default"  #: the run folder; an existing one of the same config is resumed
    steps: int = 500  #: self-play steps; 0 only seeds the buffers
    seed: int = 0  #: of every random choice of the run
    preset: Literal["fixed", "paper", "reference"] = "fixed"  #: see PRESETS and docs/differences.md
    model: str = "embedded"  #: `embedded`, or the path of a Hugging Face folder
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  #: kernel; auto: splash (TPU), cudnn (GPU) or xla
    control: Control = "none"  #: ablation to run instead of the full algorithm
    wandb_project: str = "none"  #: also send metrics to this Weights & Biases project; none: do not
    tasks: TasksConfig = field(default_factory=TasksConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class PresetRules:
    """Where paper and released code differ (docs/differences.md)."""

    extreme_reward: float  #: proposer reward of a valid task whose solve rate is 0 or 1
    whitening: Literal["sequence", "token"]  #: statistics of the six advantage baselines
    solver_tasks: Literal["this_step", "last_step"]  #: whose tasks the solver trains on
    overflow: Literal["drop_oldest", "drop_newest"]  #: a buffer at its cap
    duplicates: Literal["keep", "reject"]  #: tasks whose canonical form was seen before


PRESETS: dict[str, PresetRules] = {
    "paper": PresetRules(0.0, "sequence", "this_step", "drop_oldest", "keep"),
    "reference": PresetRules(-0.5, "token", "last_step", "drop_newest", "keep"),
    "fixed": PresetRules(0.0, "sequence", "this_step", "drop_oldest", "reject"),
}
