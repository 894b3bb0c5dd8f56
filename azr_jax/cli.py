"""The command line: arguments, logging, exit codes. No logic of its own.

Every handler imports what it needs when it is called, so `--help` never loads JAX. Results go to stdout, logs and
errors to stderr. Exit codes: 0 done, 1 failed, 2 bad usage or bad config, 3 the answer is no, 75 another host
of the run is gone, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from azr_jax import __version__
from azr_jax.errors import UserError
from azr_jax.platforms import skip_absent_tpu
from azr_jax.signals import GRACE_SECONDS, GracefulStop

FAILED, INTERRUPTED = 1, 130
PRETRAIN_UPDATES = 14_000  # of the shipped model: 29 M tokens
Number = TypeVar("Number", int, float)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; whatever goes wrong is one line on stderr."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments
    hint = "" if debug else " (--debug shows the traceback)"
    skip_absent_tpu()
    try:
        code = _run(arguments, debug)
        sys.stdout.flush()
        if argv is None:  # a process of our own, about to end: one more Ctrl-C has nothing left to stop
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return code
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED, debug)
        if argv is None:  # a process of our own: XLA may still be compiling, and Python's way out crashes under it
            os._exit(INTERRUPTED)
        return INTERRUPTED
    except UserError as error:
        return _fail(f"error: {error}", error.exit_code, debug)
    except ModuleNotFoundError as error:
        if (error.name or "azr_jax").partition(".")[0] == "azr_jax":
            return _fail(f"internal error: {error}{hint}", FAILED, debug)
        return _fail(f"error: package {error.name} is not installed; pip install -r requirements.txt", FAILED, debug)
    except BrokenPipeError as error:
        if not _reader_is_gone():
            return _fail(f"internal error: {error}{hint}", FAILED, debug)
        # `azr-jax ... | head`: nobody is left to tell. The interpreter still flushes stdout when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except MemoryError:
        return _fail(f"error: out of memory; free some, or raise this process's limit{hint}", FAILED, debug)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"error: {error.strerror or error}{where}{hint}", FAILED, debug)
    except Exception as error:
        if (missing := _no_devices()) is not None:
            return _fail(f"error: {missing}", 2, debug)
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", FAILED, debug)


def _no_devices() -> str | None:
    """Why JAX has nothing to compute on, if that was the trouble. JAX says so in many ways, one of them empty."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except Exception as error:
        wanted = os.environ.get("JAX_PLATFORMS")
        what = f"JAX_PLATFORMS={wanted}, but JAX finds no such device here" if wanted else "JAX finds no device here"
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return f"{what}{reason}. JAX_PLATFORMS=cpu computes on the CPU; `azr-jax doctor` looks at the rest"
    return None


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `handler`."""
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show tracebacks and debug logs")
    parser = argparse.ArgumentParser(
        prog="azr-jax",
        description="Absolute Zero Reasoner on JAX: one model proposes Python tasks, solves them and learns from both.",
        epilog="exit codes: 0 done, 1 failed, 2 bad usage or bad config, 3 the answer is no, "
        "75 another host of the run is gone, 130 interrupted",
        allow_abbrev=False,
        parents=[debug],
    )
    parser.add_argument("--version", action="version", version=f"azr-jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, handler: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False, parents=[debug])
        sub.set_defaults(handler=handler)
        return sub

    sub = command("train", _train, "self-play; resumes if the run folder holds a checkpoint of the same config")
    _add_config(sub)
    sub.add_argument(
        "--allow-config-change", action="store_true", help="resume although the config differs from the run folder's"
    )
    patience = f"how long after SIGTERM to wait for an update before giving it up (default: {GRACE_SECONDS:.0f})"
    sub.add_argument("--grace", metavar="SECONDS", type=_not_negative, default=GRACE_SECONDS, help=patience)
    _add_hosts(sub)
    sub = command("seed", _seed, "print only the seed buffers, one JSON task a line")
    _add_config(sub)
    _add_hosts(sub)

    sub = command("check", _check, "run, validate and judge programs: JSON requests in, verdicts out, one a line")
    sub.add_argument("file", metavar="FILE", help="JSON lines, or - for stdin, answered as they come")
    sub.add_argument("--config", metavar="CONFIG", help="YAML file whose executor section is used")
    _add_overrides(sub, "executor.key=value")

    sub = command("sample", _sample, "propose and solve with a model, interactively or one-shot")
    sub.add_argument("--model", metavar="PATH", default="embedded", help="Hugging Face folder (default: embedded)")
    sub.add_argument("--prompt", metavar="TEXT", help="complete this text and exit")
    sub.add_argument("--role", choices=["propose", "solve"], default="solve", help="default: solve")
    kinds = ["deduction", "abduction", "induction"]
    sub.add_argument("--kind", choices=kinds, default=kinds[0], help=f"of task (default: {kinds[0]})")
    sub.add_argument("--temperature", type=_not_negative, default=1.0, help="0 is greedy (default: 1)")
    sub.add_argument("--seed", type=_natural, default=0, help="of the sampling (default: 0)")
    sub.add_argument("--samples", type=_count, default=1, help="of --prompt (default: 1)")
    filters = sub.add_argument_group("filters", "change the distribution that tokens are drawn from; off by default")
    filters.add_argument("--top-k", type=_natural, default=0, help="only the k likeliest tokens")
    filters.add_argument("--top-p", type=_not_negative, default=1.0, help="only the likeliest that together have p")
    filters.add_argument("--min-p", type=_not_negative, default=0.0, help="only those with p of the likeliest's")
    filters.add_argument("--repetition", type=_positive, default=1.0, help="divides logits of tokens seen")
    filters.add_argument("--presence", type=_not_negative, default=0.0, help="off the logits of tokens generated")
    filters.add_argument("--frequency", type=_not_negative, default=0.0, help="the same, as often as generated")
    _add_json(sub)

    sub = command("score", _score, "log-probability of every token given its prefix: JSON lines in, JSON lines out")
    sub.add_argument("file", metavar="FILE", help='{"id", "tokens": [ids]} or {"id", "text"} a line; - for stdin')
    sub.add_argument("--model", metavar="PATH", required=True, help="Hugging Face folder, or embedded")
    dtypes = ["float32", "bfloat16"]
    sub.add_argument(
        "--dtype", choices=dtypes, default=dtypes[0], help=f"of weights and products (default: {dtypes[0]})"
    )
    sub.add_argument("--json", action="store_true", help="accepted as everywhere; the output is JSON lines in any case")

    sub = command("export", _export, "weights of a run, a checkpoint or a Hugging Face folder as a Hugging Face folder")
    sub.add_argument("source", metavar="SOURCE", help="run folder, checkpoint in it, Hugging Face folder, or embedded")
    sub.add_argument("--out", metavar="DIR", required=True, help="folder to write; must be new or empty")
    sub.add_argument("--step", type=_step, help="of a run's checkpoints, or best (default: the newest)")
    dtypes = ["as-loaded", "bfloat16", "float32"]
    loaded = "as-loaded keeps the types of the model that the run started with"
    sub.add_argument("--dtype", choices=dtypes, default=dtypes[0], help=f"{loaded} (default)")
    sub.add_argument("--max-shard-gb", type=_positive, default=5.0, help="most of a weight file (default: 5)")
    _add_json(sub)

    sub = command("plan", _plan, "does a config fit on a slice or GPU, and how fast could it be? needs neither")
    _add_config(sub)
    sub.add_argument(
        "--topology",
        metavar="NAME",
        required=True,
        help="v5e:4x4, v6e:2x4, v5p:2x2x2, v5litepod-16, h200:1, h100:1, cpu, ...",
    )
    sub.add_argument("--layers", type=_count, help="cut the model to so many, to check the rest sooner")
    _add_json(sub)

    sub = command("report", _report, "write report.html, one self-contained file, into a run folder")
    sub.add_argument("run_dir", metavar="RUN_DIR")

    _add_json(command("doctor", _doctor, "devices, versions, sandbox layers, free memory: is this machine ready?"))

    sub = command("bench", _bench, "measured figures on this machine")
    sub.add_argument("target", choices=["executor", "rollout"])
    sub.add_argument("--config", metavar="CONFIG", help="YAML file to start from (default: the keys' defaults)")
    _add_overrides(sub, "a.b=c")
    _add_json(sub)

    sub = command("pretrain", _pretrain, "rebuild the embedded model from nothing: corpus, tokenizer, training")
    sub.add_argument("--out", metavar="DIR", required=True, help="Hugging Face folder to write")
    sub.add_argument("--overwrite", action="store_true", help="also into a folder that is not empty")
    sub.add_argument(
        "--updates", type=_natural, default=PRETRAIN_UPDATES, help=f"of 2048 tokens each (default: {PRETRAIN_UPDATES})"
    )
    sub.add_argument("--seed", type=_natural, default=0, help="of corpus and training (default: 0)")

    command("config", _config, "print every configuration key with its type, default and meaning")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/ and `azr-jax config`")
    _add_overrides(parser, "a.b=c")


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several hosts", "found by themselves under SLURM and on TPU slices")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of host 0, with a port that is free there")
    group.add_argument("--hosts", metavar="N", type=_count, help="how many there are")
    group.add_argument("--host", metavar="I", type=_natural, help="which of them this is, from 0")


def _add_overrides(parser: argparse.ArgumentParser, metavar: str) -> None:
    parser.add_argument(
        "overrides", metavar=metavar, nargs="*", default=[], help="configuration keys to set, the last one wins"
    )  # without a default argparse calls them required when CONFIG is missing


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _not_negative(text: str) -> float:
    number = _number(float, text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return abs(number)  # -0.0 is 0


def _positive(text: str) -> float:
    number = _not_negative(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _natural(text: str) -> int:
    number = _number(int, text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return number


def _step(text: str) -> int | str:
    if text != "best" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"a step is a number, or best: {text}")
    return text if text == "best" else int(text)


def _count(text: str) -> int:
    number = _natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _number(kind: Callable[[str], Number], text: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number: {text}") from None


def _run(arguments: list[str], debug: bool) -> int:
    """Parse, set up logging, call the handler."""
    parser = build_parser()
    try:
        # argparse ends a list of positionals at the first option: overrides after an option arrive as `rest`.
        args, rest = parser.parse_known_args(arguments)
        if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as stop:  # 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else FAILED
    if rest:
        args.overrides = [*args.overrides, *rest]
    _set_up_logging(debug)
    return args.handler(args)


def _set_up_logging(debug: bool) -> None:
    """All logs to stderr, short; the libraries below speak only when something is wrong."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s" if debug else "%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is no news here
    for name in ("absl", "etils", "jax", "orbax", "tensorflow_datasets", "transformers", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"azr-jax: {message}", file=sys.stderr, flush=True)
    return code


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe or socket that nobody reads any more (else some other pipe broke)."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file descriptor
        return False


def _train(args: argparse.Namespace) -> int:
    from azr_jax.config_loader import load_config

    config = load_config(args.config, args.overrides)  # before JAX loads: a mistake is reported at once
    with GracefulStop(args.grace) as stop:
        from azr_jax.dist.join import join
        from azr_jax.train import train

        with join(args.coordinator, args.hosts, args.host) as hosts:
            return train(config, args.config, stop, allow_config_change=args.allow_config_change, hosts=hosts)


def _seed(args: argparse.Namespace) -> int:
    from azr_jax.config_loader import load_config

    config = load_config(args.config, args.overrides)
    from azr_jax.dist.join import join
    from azr_jax.train import seed

    with join(args.coordinator, args.hosts, args.host) as hosts:
        return seed(config, sys.stdout, hosts)


def _check(args: argparse.Namespace) -> int:
    from azr_jax.config_loader import load_config, only_section
    from azr_jax.executor.commands import check_command

    config = load_config(args.config, only_section("executor", args.overrides))
    return check_command(args.file, config.executor, sys.stdout)


def _bench(args: argparse.Namespace) -> int:
    from azr_jax.config_loader import load_config

    config = load_config(args.config, args.overrides)
    if args.target == "rollout":
        from azr_jax.rollout.bench import bench_command as bench_rollout

        return bench_rollout(config, args.json, sys.stdout)
    from azr_jax.executor.commands import bench_command as bench_executor

    return bench_executor(config.executor, args.json, sys.stdout)


def _sample(args: argparse.Namespace) -> int:
    from azr_jax.sample import sample_command

    return sample_command(args)


def _score(args: argparse.Namespace) -> int:
    from azr_jax.score import score_command

    return score_command(args)


def _export(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, and the accelerator may be busy with the run itself
    from azr_jax.export import export_command

    return export_command(args)


def _plan(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, and the accelerator may be busy
    from azr_jax.plan import plan_command

    return plan_command(args, sys.stdout)


def _report(args: argparse.Namespace) -> int:
    from azr_jax.telemetry.report import report_command

    return report_command(args.run_dir)


def _doctor(args: argparse.Namespace) -> int:
    from azr_jax.doctor import doctor_command

    return doctor_command(args.json)


def _pretrain(args: argparse.Namespace) -> int:
    from azr_jax.micro.pretrain import pretrain_command

    return pretrain_command(args)


def _config(args: argparse.Namespace) -> int:
    from azr_jax.config_doc import config_keys_doc

    print(config_keys_doc(), end="")
    return 0
