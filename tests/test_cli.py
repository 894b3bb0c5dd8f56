"""The command line: help without JAX, exit codes, one line for every failure, and what each handler is given."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from azr_jax import __version__
from azr_jax.cli import build_parser, main
from azr_jax.config import Config, ExecutorConfig
from azr_jax.config_doc import config_keys_doc
from azr_jax.errors import ConfigError, UserError
from azr_jax.signals import GRACE_SECONDS

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "train",
    "seed",
    "check",
    "sample",
    "score",
    "export",
    "plan",
    "report",
    "doctor",
    "bench",
    "pretrain",
    "config",
]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\nexecutor: {workers: 2}\n")
    return str(path)


class Handler:
    """Stands in for a command's module: records how it was called, then returns or raises."""

    def __init__(self, monkeypatch, module: str, function: str) -> None:
        self.calls: list[tuple[tuple, dict]] = []
        self.result: int | BaseException = 0
        stand_in = ModuleType(module)
        setattr(stand_in, function, self)
        monkeypatch.setitem(sys.modules, module, stand_in)

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def train(monkeypatch):
    return Handler(monkeypatch, "azr_jax.train", "train")


def azr_jax(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "azr_jax", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_commands_are_all_there():
    actions = build_parser()._subparsers._group_actions
    assert list(actions[0].choices) == COMMANDS


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert "usage: azr-jax" in capsys.readouterr().out


def test_help_and_config_load_neither_jax_nor_numpy():
    code = (
        "import sys; from azr_jax.cli import main\n"
        "assert main(['train', '--help']) == 0 and main(['config']) == 0\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_version_and_module_entry():
    done = azr_jax("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"azr-jax {__version__}")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "a.yaml", "--allow-config"],
        ["train", "a.yaml", "--hosts", "0"],
        ["train", "a.yaml", "--grace", "soon"],
        ["report", "a", "b"],
        ["sample", "--kind", "production"],
        ["sample", "--temperature", "-1"],
        ["sample", "--temperature", "warm"],
        ["sample", "--seed", "-1"],
        ["score", "tokens.jsonl"],
        ["score", "tokens.jsonl", "--model", "m", "--dtype", "float16"],
        ["export", "runs/a"],
        ["export", "runs/a", "--out", "b", "--max-shard-gb", "0"],
        ["export", "runs/a", "--out", "b", "--step", "newest"],
        ["pretrain"],
        ["pretrain", "--out", "d", "--updates", "1e3"],
        ["bench", "everything"],
    ],
)
def test_bad_usage_exits_2(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error:" in err and "Traceback" not in err


def test_usage_errors_ask_for_what_is_needed(capsys):
    main(["train"])
    assert "required: CONFIG\n" in capsys.readouterr().err  # not the overrides, too
    main(["sample", "--temperature", "-1"])
    assert "must be 0 or more, got -1" in capsys.readouterr().err


def test_train_gets_the_config(train, config_file):
    assert main(["train", config_file, "seed=4", "learn.lr=1e-5"]) == 0
    (config, path, stop), options = train.calls[0]
    assert (config.steps, config.seed, config.learn.lr) == (3, 4, 1e-5)
    assert path == config_file and not stop.requested
    assert options["hosts"].count == 1 and not options["allow_config_change"] and stop.grace == GRACE_SECONDS
    assert main(["train", config_file, "--grace", "480"]) == 0
    assert train.calls[1][0][2].grace == 480


@pytest.mark.parametrize("flag_at", [0, 1, 2, 3])
def test_flags_and_overrides_mix(train, config_file, flag_at):
    arguments = [config_file, "seed=4", "steps=5"]
    arguments.insert(flag_at, "--allow-config-change")
    assert main(["train", *arguments]) == 0
    (config, *_), options = train.calls[0]
    assert (config.seed, config.steps) == (4, 5) and options["allow_config_change"]


def test_flags_of_several_hosts_come_together(train, config_file, capsys):
    assert main(["train", config_file, "--hosts", "2", "--host", "1"]) == 2
    assert "--coordinator" in capsys.readouterr().err and not train.calls
    assert main(["train", config_file, "--coordinator", "here:1", "--hosts", "1", "--host", "0"]) == 0
    assert train.calls[0][1]["hosts"].count == 1


def test_seed_writes_to_stdout(monkeypatch, config_file):
    seed = Handler(monkeypatch, "azr_jax.train", "seed")
    assert main(["seed", config_file]) == 0
    ((config, out, hosts), _), *more = seed.calls
    assert config == Config(steps=3, executor=ExecutorConfig(workers=2)) and out is sys.stdout
    assert hosts.count == 1 and not more


def test_check_and_bench_get_the_executor_section(monkeypatch, config_file, capsys):
    check = Handler(monkeypatch, "azr_jax.executor.commands", "check_command")
    check.result = 3
    assert main(["check", "-"]) == 3
    assert main(["check", "tasks.jsonl", "--config", config_file, "executor.numeric=python"]) == 3
    assert [args for args, _ in check.calls] == [
        ("-", ExecutorConfig(), sys.stdout),
        ("tasks.jsonl", ExecutorConfig(workers=2, numeric="python"), sys.stdout),
    ]
    assert main(["check", "-", "steps=3"]) == 2
    assert "only the keys of `executor`" in capsys.readouterr().err
    bench = Handler(monkeypatch, "azr_jax.executor.commands", "bench_command")
    assert main(["bench", "executor", "--json", "executor.workers=1"]) == 0
    assert bench.calls == [((ExecutorConfig(workers=1), True, sys.stdout), {})]


def test_other_handlers(monkeypatch):
    report = Handler(monkeypatch, "azr_jax.telemetry.report", "report_command")
    assert main(["report", "runs/a"]) == 0 and report.calls == [(("runs/a",), {})]
    sample = Handler(monkeypatch, "azr_jax.sample", "sample_command")
    assert main(["sample", "--model", "m", "--prompt", "x", "--temperature", "0", "--json"]) == 0
    args = sample.calls[0][0][0]
    assert isinstance(args, argparse.Namespace)
    assert (args.model, args.prompt, args.role, args.kind) == ("m", "x", "solve", "deduction")
    assert (args.temperature, args.seed, args.json) == (0.0, 0, True)
    pretrain = Handler(monkeypatch, "azr_jax.micro.pretrain", "pretrain_command")
    assert main(["pretrain", "--out", "d", "--updates", "10"]) == 0
    args = pretrain.calls[0][0][0]
    assert (args.out, args.updates, args.seed) == ("d", 10, 0)


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (UserError("no such model: m"), 1, "azr-jax: error: no such model: m\n"),
        (UserError("does not fit", exit_code=3), 3, "azr-jax: error: does not fit\n"),
        (ConfigError("unknown key `a`"), 2, "azr-jax: error: unknown key `a`\n"),
        (KeyboardInterrupt(), 130, "azr-jax: interrupted\n"),
        (OSError(28, "No space left on device", "runs/a"), 1, "azr-jax: error: No space left on device: runs/a"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), 1, "azr-jax: error: package wandb is not inst"),
        (BrokenPipeError(32, "Broken pipe"), 1, "azr-jax: internal error: "),
        (MemoryError(), 1, "azr-jax: error: out of memory; "),
        (ValueError("surprise"), 1, "azr-jax: internal error: ValueError: surprise (--debug shows the traceback)\n"),
    ],
)
def test_failures_are_one_line(train, config_file, capsys, raised, code, text):
    train.result = raised
    assert main(["train", config_file]) == code
    err = capsys.readouterr().err
    assert err.startswith(text) and err.count("\n") == 1


def test_an_interrupted_process_ends_at_once():
    code = (
        "import atexit, sys; from azr_jax import cli\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "atexit.register(print, 'on the way out'); cli._run = interrupted; sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "azr-jax: interrupted\n")


def test_debug_shows_the_traceback(train, config_file, capsys):
    train.result = ValueError("surprise")
    for arguments in (["--debug", "train", config_file], ["train", config_file, "--debug"]):
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err and err.endswith("azr-jax: internal error: ValueError: surprise\n")


def test_bad_config_exits_2_before_anything_starts(train, tmp_path, config_file, capsys):
    assert main(["train", str(tmp_path / "missing.yaml")]) == 2
    assert main(["train", config_file, "tasks.bach=3"]) == 2
    err = capsys.readouterr().err
    assert "did you mean `tasks.batch`" in err and "Traceback" not in err
    assert not train.calls


def test_config_prints_the_documented_keys(capsys):
    assert main(["config"]) == 0
    assert capsys.readouterr().out == config_keys_doc()


def test_a_reader_that_left_is_no_error_message():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "azr_jax", "config"]
    done = subprocess.run(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_doctor_prints_one_object():
    done = azr_jax("doctor", "--json")
    findings = json.loads(done.stdout)
    assert done.returncode == (0 if findings["ok"] else 1) and findings["ok"] == (not findings["problems"])


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_without_a_device_is_the_users_mistake(platform):
    """JAX ends in an empty assertion, or in a RuntimeError, as the case may be."""
    command = [sys.executable, "-m", "azr_jax", "seed", "configs/debug_cpu.yaml"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("azr-jax:")]
    assert done.returncode == 2 and f"JAX_PLATFORMS={platform}, but JAX finds no such device here" in line, done.stderr
    assert "JAX_PLATFORMS=cpu" in line and "internal" not in line and "Traceback" not in done.stderr
