"""One run: weights, buffers, step after step, saved so that a kill costs at most the steps since the last save.

The algorithm is in `selfplay.py` and `learn/`; this file puts a step together, writes the run folder, evaluates,
saves and resumes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from azr_jax.attempts import Step
from azr_jax.bucket import is_bucket
from azr_jax.checkpoint import BEST_BY, Checkpointer, best_step
from azr_jax.config import PRESETS, Config
from azr_jax.config_loader import config_to_yaml
from azr_jax.dist.hosts import Hosts, facts, require_shared
from azr_jax.dist.mesh import make_mesh
from azr_jax.errors import UserError
from azr_jax.evals.heldout import Outcome, evaluate
from azr_jax.evals.schedule import Evaluate, FixedEvaluation, fresh_comparison, to_json
from azr_jax.executor import ExecutorPool
from azr_jax.learn.prepare import prepare
from azr_jax.learn.state import TrainState, init_state, param_shardings
from azr_jax.learn.step import Update, make_update, micro_rows
from azr_jax.learn.throughput import throughput
from azr_jax.micro.language import is_held_out
from azr_jax.models.attention import attend
from azr_jax.models.attention_choice import choose_attention
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import Tokenizer
from azr_jax.models.transformer import Params
from azr_jax.models.vocabulary import audit
from azr_jax.models.weights import digests, load_weights, model_folder
from azr_jax.records import write_rows
from azr_jax.rollout.engine import Engine
from azr_jax.selfplay import SelfPlay
from azr_jax.signals import GracefulStop
from azr_jax.stream import Stopped
from azr_jax.tasks.buffers import TaskBuffers
from azr_jax.tasks.compact import CompactFormat
from azr_jax.tasks.kinds import GROUPS, KINDS, Role, Task
from azr_jax.tasks.prompts import PromptFormat
from azr_jax.telemetry import oversight
from azr_jax.telemetry.process import CompileCounter, resident_mb
from azr_jax.telemetry.progress import LEGEND, Progress, before_after_table, comparisons
from azr_jax.telemetry.report import write_report
from azr_jax.telemetry.run_folder import Onlooker, RunFolder
from azr_jax.telemetry.step_metrics import engine_metrics, step_metrics
from azr_jax.telemetry.wandb_sink import WandbSink
from azr_jax.templates import load_prompts

log = logging.getLogger(__name__)

MOST_SKIPS = 10  # updates in a row with a gradient that is not finite, after which a run stops


class Run:
    """Everything built from a config: model, sampler, self-play, learner, evaluation."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        prompts: PromptFormat,
        pool: ExecutorPool,
        stopped: Callable[[], bool] = lambda: False,
        hosts: Hosts | None = None,
    ) -> None:
        """config, tokenizer, prompts: as `with_prompts` gives them. stopped: asked now and then whether to raise
        `Stopped`. hosts: those of the run; None: this one alone.
        """
        self.config, self.stopped, self.hosts = config, stopped, hosts or Hosts()
        self.compiles = CompileCounter()
        self.folder = model_folder(config.model)
        self.model = ModelConfig.load(self.folder)
        self.mesh = make_mesh(config.mesh)
        self.prompts = prompts
        kind = choose_attention(
            config.attention,
            head_dim=self.model.head_dim,
            dtype=config.learn.dtype,
            windows=bool(self.model.sliding_layers),
        )
        self.attend = partial(attend, kind=kind, mesh=self.mesh)
        dtype = config.learn.dtype
        self.engine = Engine(self.model, config.rollout, tokenizer, self.mesh, self.prompts.stop, kind, dtype)
        self.micro = isinstance(self.prompts, CompactFormat)  # the held-out sets speak this format only
        held_out = is_held_out if self.micro else lambda _: False
        self.selfplay = SelfPlay(config, self.engine, pool, self.prompts, held_out, self.hosts)
        self.pool = pool
        self.evaluation = FixedEvaluation(config.eval.per_kind) if self.micro and config.eval.every else None
        if not self.micro and config.eval.every:
            log.warning("no evaluation: the held-out micro programs are for models of the compact prompt format")
        self.reference: Params | None = None
        if config.learn.kl != "none":
            self.reference = self.first_weights()
        self.rows = micro_rows(config, self.mesh)
        self.skipped = 0  # updates in a row
        self.scores: dict[int, float] = {}  # BEST_BY, by step
        self.unfinished: dict[str, Any] | None = None  # metrics of the step that still lacks its evaluation
        self.audited = False
        self.banned: jax.Array | None = None  # bool [V], tokens that are never sampled

    def warm_up(self, params: Params) -> None:
        """Compile the sampler's programs before they are needed."""
        self.engine.load(params)
        self.engine.warm_up()

    @cached_property
    def update(self) -> Update:
        """The compiled update; made once it is known which tokens are banned."""
        return make_update(self.config, self.model, self.mesh, self.reference, self.attend, self.banned)

    def fresh_state(self) -> TrainState:
        """The state before the first update. The first call looks over the vocabulary."""
        weights = self._load("float32")
        if not self.audited:
            wanted = self.config.rollout.ban_untrained_tokens
            self.banned = audit(weights, self.model, self.engine.tokenizer, self.mesh, wanted)
            if self.banned is not None:
                self.engine.ban(self.banned)
            self.audited = True
        return init_state(weights, self.config, self.model, self.mesh)

    def first_weights(self) -> Params:
        """The weights before the first update, as the learner's forward pass sees them."""
        return self._load(self.config.learn.dtype)

    def _load(self, dtype: str) -> Params:
        return load_weights(self.folder, self.model, param_shardings(self.model, self.mesh), jnp.dtype(dtype))

    def evaluator(self, params: Params) -> Evaluate:
        """Evaluate given weights on a list of tasks. Stopped: between two lists."""

        def evaluate_or_stop(tasks: list[Task], temperature: float) -> Outcome:
            if self.hosts.agree("evaluation", self.stopped()):
                raise Stopped
            everything = self.engine, params, self.pool, self.prompts, tasks, temperature, self.config.seed
            return evaluate(*everything, self.hosts)

        return evaluate_or_stop

    def learn(self, state: TrainState, step: Step) -> tuple[TrainState, dict[str, float]]:
        """One policy-gradient update on a step's trajectories: six baselines, packed rows, one optimizer step."""
        self.engine.release()  # weights and cache of the sampler make room for gradients
        trained = step.trained(self.config)
        trajectories = step.trajectories(self.config)
        if self.config.control == "no_updates" or not trajectories:
            return state, {}
        batch, stats = prepare(trajectories, self.config, self.rows)
        if not batch.n_micro:  # every response was cut and `learn.overlong` leaves them out
            return state, {}
        start = time.monotonic()
        state, metrics = self.update(state, batch)
        metrics |= throughput(batch, time.monotonic() - start, self.model, self.mesh.devices.flatten().tolist())
        self.skipped = self.skipped + 1 if metrics["learner/skipped"] else 0
        if self.skipped >= MOST_SKIPS:
            raise UserError(
                f"the gradients of {self.skipped} updates in a row were not finite, so training has stopped; the last "
                "checkpoint holds weights from before. Lower learn.lr, or set learn.dtype=float32"
            )
        if not any(attempt.role is Role.PROPOSE for attempt in trained):
            del metrics["learner/entropy_propose"]  # of no tokens: absent, not 0
        for role, kind in GROUPS:
            spread = stats.get(f"{role.value}_{kind.value}/std")
            if spread is not None:
                metrics[f"learner/reward_std/{role.value}/{kind.value}"] = spread
        metrics["learner/rows"] = float(batch.n_micro * self.rows)
        metrics["learner/padding"] = batch.padding_share
        return state, metrics


def with_prompts(config: Config) -> tuple[Config, Tokenizer, PromptFormat]:
    """The configuration with `tasks.prompt_format` settled, as it is saved, and what follows from it."""
    template, tokenizer, prompts = load_prompts(config.model, config.tasks.prompt_format)
    return replace(config, tasks=replace(config.tasks, prompt_format=template)), tokenizer, prompts


def _start(config: Config, hosts: Hosts) -> tuple[Config, Tokenizer, PromptFormat]:
    """`with_prompts`, once all hosts are known to mean the same. UserError: they do not."""
    found = with_prompts(config)
    hosts.agree("the start", False, **facts(found[0]), **digests(config.model))
    return found


def train(
    config: Config, config_path: str, stop: GracefulStop, allow_config_change: bool = False, hosts: Hosts | None = None
) -> int:
    """`azr-jax train`: run or resume; returns the exit code. `config_path` is only shown, `stop` is entered already.

    hosts: those of the run, all of which call this; None: this one alone.
    """
    hosts = hosts or Hosts()
    hosts.relay(stop)
    config, tokenizer, prompts = _start(config, hosts)
    text = config_to_yaml(config)
    folder = RunFolder.open(config.run_dir, text, allow_config_change) if hosts.leads else Onlooker(config.run_dir)
    wandb = WandbSink(config.wandb_project if hosts.leads else "none", folder.path, asdict(config))
    checkpoints = Checkpointer(folder.checkpoints, config.checkpoint.keep, hosts)
    with folder, wandb, ExecutorPool(config.executor) as pool, checkpoints:
        if not is_bucket(config.run_dir):
            require_shared(folder.path, hosts)
        run = Run(config, tokenizer, prompts, pool, lambda: stop.requested, hosts)
        stop.busy = lambda: checkpoints.saving
        log.info(
            "%s: preset %s (%s), control %s, %d parameters on %d device(s), run folder %s",
            config_path,
            config.preset,
            ", ".join(f"{name} {value}" for name, value in asdict(PRESETS[config.preset]).items()),
            config.control,
            run.model.num_params,
            run.mesh.size,
            folder.path,
        )
        beginning = _resume_or_seed(run, checkpoints, folder, wandb)
        if beginning is None:
            # Warnings, since hosts but the first show no less; tpu_scripts/worker/run.sh looks for these lines.
            log.warning("stopped before the first step: nothing is lost; resumable: run the same command again")
            return stop.exit_code
        state, number = beginning
        progress, saved = Progress(config.steps), number
        log.info(LEGEND)
        while number < config.steps and not hosts.agree(f"step {number + 1}", stop.requested):
            checkpoints.poll()
            started, compiling = time.monotonic(), run.compiles.seconds
            number += 1
            before = replace(run.engine.stats)
            try:
                step = run.selfplay.step(state.params, number, lambda: stop.requested)
            except Stopped:  # a resumed run makes this step again, the same
                number -= 1
                break
            rolled = time.monotonic()
            state, learned = run.learn(state, step)
            same = {name: repr(value) for name, value in learned.items() if name.startswith("learner/")}
            hosts.agree("the update", False, **same)  # before anything of it is saved
            step.seconds["update"] = time.monotonic() - rolled
            metrics = step_metrics(step, run.selfplay.buffers, run.prompts) | learned
            metrics |= engine_metrics(before, run.engine.stats, step.seconds["rollout"]) | _machine_metrics(run)
            metrics |= write_rows(folder, step, run.engine.tokenizer, config)
            try:
                if run.evaluation and (number % config.eval.every == 0 or number == config.steps):
                    metrics |= _timed_evaluation(run, state, number)
            except Stopped:  # the state is new, so it is saved; a resumed run evaluates it first
                run.unfinished = metrics
                break
            metrics |= {"time/step": time.monotonic() - started, "time/compile": run.compiles.seconds - compiling}
            folder.append_metrics(number, metrics)
            wandb.log(number, metrics)
            log.info("%s", progress.line(number, metrics))
            if hosts.agree("saving", _is_due(run, checkpoints, number)):
                _save(checkpoints, number, state, run, folder)
                saved = number
        if saved != number:
            _save(checkpoints, number, state, run, folder)
        checkpoints.wait()
        stopped = hosts.agree("the end of training", stop.requested)
        if number < config.steps or stopped:  # the table at the end takes longer than a preemption waits
            log.warning("stopped after step %d of %d; resumable: run the same command again", number, config.steps)
            return stop.exit_code
        try:
            _finish(run, state, folder)
        except Stopped:
            log.warning("stopped before the table at the end; resumable: run the same command again")
        folder.push()
    return stop.exit_code


def _resume_or_seed(
    run: Run, checkpoints: Checkpointer, folder: RunFolder, wandb: WandbSink
) -> tuple[TrainState, int] | None:
    """The state and step to go on from: the newest checkpoint, or seeded buffers at step 0; None if stopped before."""
    try:
        resumes = run.hosts.agree("resuming", run.hosts.leads and bool(checkpoints.steps()))
        return (_resume if resumes else _seed)(run, checkpoints, folder, wandb)
    except Stopped:
        return None


def _resume(run: Run, checkpoints: Checkpointer, folder: RunFolder, wandb: WandbSink) -> tuple[TrainState, int]:
    """From the newest checkpoint that can be read. Stopped: before an evaluation that has to come first."""
    fresh = run.fresh_state()
    run.warm_up(fresh.params)
    run.engine.release()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
    del fresh  # there is room for one state only
    restored = checkpoints.restore(abstract)
    assert restored is not None  # none that can be read is an error
    number, state, extra = restored
    run.selfplay.buffers = TaskBuffers.from_json(extra["buffers"], run.selfplay.rules)
    run.selfplay.buffers.cap = run.config.tasks.buffer_cap  # the two differ only after --allow-config-change
    run.skipped = extra.get("skipped", 0)
    if run.evaluation and not run.evaluation.take_baseline(extra["baseline"]):
        log.info("the evaluation was changed: measuring the weights before the first update with the new one")
        run.evaluation.measure(run.evaluator(run.first_weights()))
    folder.begin_after(number)
    chain = oversight.verify(folder.oversight, extra["oversight_head"])
    if run.hosts.leads and not chain.ok:
        log.warning("%s was changed since the checkpoint: line %d %s", folder.oversight, chain.line, chain.problem)
    log.info("resuming after step %d", number)
    if number >= run.config.steps:
        log.info("all %d steps are done; with a larger `steps` the run goes on", run.config.steps)
    rows = folder.read_metrics()
    run.scores = {row["step"]: row[BEST_BY] for row in rows if row.get(BEST_BY) is not None}
    lacks = extra.get("unfinished") is not None  # a resume from the same checkpoint may have brought it already
    if lacks and run.hosts.agree("the evaluation", run.hosts.leads and not any(row["step"] == number for row in rows)):
        metrics = extra["unfinished"] | (_timed_evaluation(run, state, number) if run.evaluation else {})
        folder.append_metrics(number, metrics)
        wandb.log(number, metrics)
    return state, number


def _seed(run: Run, checkpoints: Checkpointer, folder: RunFolder, wandb: WandbSink) -> tuple[TrainState, int]:
    """From the identity program. Stopped: before the buffers were full and the first weights evaluated."""
    fresh = run.fresh_state()
    run.warm_up(fresh.params)
    folder.begin_after(-1)
    log.info("seeding the buffers from the identity program")
    if not run.selfplay.seed(fresh.params, run.stopped):
        raise Stopped
    log.info("seeded: %s", {kind.value: run.selfplay.buffers.size(kind) for kind in KINDS})
    metrics = run.selfplay.buffers.metrics(0)
    if run.evaluation:
        metrics |= _timed_evaluation(run, fresh, 0)
    folder.append_tasks(0, [task.to_json() for kind in KINDS for task in run.selfplay.buffers.tasks(kind)])
    folder.append_metrics(0, metrics)
    wandb.log(0, metrics)
    _save(checkpoints, 0, fresh, run, folder)
    return fresh, 0


def _save(checkpoints: Checkpointer, number: int, state: TrainState, run: Run, folder: RunFolder) -> None:
    baseline = run.evaluation.baseline if run.evaluation else {}
    extra = {
        "buffers": run.selfplay.buffers.to_json(),
        "baseline": baseline,
        "oversight_head": folder.oversight_head,
        "skipped": run.skipped,
        "unfinished": run.unfinished,
    }
    folder.push()  # its rows are there before it is
    checkpoints.save(number, state, extra, _best(run, checkpoints, number))


def _is_due(run: Run, checkpoints: Checkpointer, number: int) -> bool:
    """Whether a step is to be saved now; the first host, which knows all scores, decides for all."""
    if not run.hosts.leads:
        return False
    evaluated = number in run.scores
    return number % run.config.checkpoint.every == 0 or (evaluated and number == _best(run, checkpoints, number))


def _best(run: Run, checkpoints: Checkpointer, number: int) -> int | None:
    """The step to keep because it is the best: this one if it is to be saved for that."""
    if not run.scores:  # no evaluation, or another host's
        return None
    return best_step(run.scores, {*checkpoints.steps(), *checkpoints.under_way, number})


def _timed_evaluation(run: Run, state: TrainState, number: int) -> dict[str, float]:
    assert run.evaluation is not None
    started = time.monotonic()
    row = run.evaluation.measure(run.evaluator(state.params))
    shown = [f"{name} {100 * row[f'eval/sampled/{name}']:.1f}" for name in (*(k.value for k in KINDS), "pooled")]
    gains = [f"{mode} {100 * row[f'eval/gain/{mode}/pooled']:+.1f}" for mode in ("sampled", "greedy")]
    run.scores[number] = row[BEST_BY]
    log.info("held-out pass@1 in %%, sampled: %s; gain so far: %s points", ", ".join(shown), ", ".join(gains))
    return row | {"time/eval": time.monotonic() - started}


def _machine_metrics(run: Run) -> dict[str, float]:
    executor = {f"executor/{name}": value for name, value in run.pool.stats().items()}
    return {"perf/rss_mb": resident_mb(), "perf/compiles": float(run.compiles.programs)} | executor


def _finish(run: Run, state: TrainState, folder: RunFolder) -> None:
    """The table before/after and the report."""
    lines = comparisons(folder.read_metrics())
    if run.evaluation:
        log.info("comparing before and after on fresh held-out tasks")
        before = run.evaluator(run.first_weights())
        after = run.evaluator(state.params)
        lines = fresh_comparison(before, after, 2 * run.config.eval.per_kind, run.config.seed)
        folder.write_outcome(to_json(lines))
    if lines:
        log.info("held-out tasks, before and after:\n%s", before_after_table(lines))
    if run.hosts.leads:
        log.info("report: %s", write_report(folder.path))


def seed(config: Config, out: TextIO, hosts: Hosts | None = None) -> int:
    """`azr-jax seed`: only the seed buffers, one task a line, by the first of `hosts`."""
    hosts = hosts or Hosts()
    config, tokenizer, prompts = _start(replace(config, eval=replace(config.eval, every=0)), hosts)
    with ExecutorPool(config.executor) as pool:
        run = Run(config, tokenizer, prompts, pool, hosts=hosts)
        params = run.fresh_state().params
        run.warm_up(params)
        run.selfplay.seed(params)
        for kind in KINDS if hosts.leads else ():
            for task in run.selfplay.buffers.tasks(kind):
                out.write(json.dumps(task.to_json()) + "\n")
    return 0
