"""What each script asks of gcloud, argument by argument, and what it says when gcloud refuses."""

from __future__ import annotations

import shlex
import subprocess
import tarfile

import pytest

WHERE = ["--project=a-project", "--zone=us-west4-a"]
CREATE = ["compute", "tpus", "queued-resources", "create", "azr", *WHERE, "--node-id=azr"]
SHAPE = ["--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite"]
DELETE = ["compute", "tpus", "queued-resources", "delete", "azr", *WHERE, "--force", "--quiet"]
STOP = 'systemctl is-active azr | grep -qxE "inactive|failed|unknown" || sudo systemctl stop azr'
QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded.\n"
)


def ssh(worker, command):
    return ["compute", "tpus", "tpu-vm", "ssh", "azr", *WHERE, f"--worker={worker}", f"--command={command}"]


def scp(source, target):
    return ["compute", "tpus", "tpu-vm", "scp", source, f"azr:{target}", *WHERE, "--worker=all"]


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, ["--spot"]),
        ({"CAPACITY": "on-demand"}, []),
        ({"CAPACITY": "reserved", "VALID_UNTIL": "12h"}, ["--reserved", "--valid-until-duration=12h"]),
    ],
)
def test_create(desk, settings, flags):
    desk.settings(**settings)
    done = desk.run("create.sh")
    assert done.returncode == 0, done.stderr
    assert desk.calls == [[*CREATE, *SHAPE, *flags]]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (QUOTA, "no quota for v5litepod-8 (spot) in us-west4-a"),
        ("ERROR: ALREADY_EXISTS: Resource azr already exists\n", "a request named azr exists"),
        ("ERROR: PERMISSION_DENIED: Cloud TPU API has not been used\n", "is the Cloud TPU API enabled in a-project"),
        ("ERROR: something else\n", ""),
    ],
)
def test_create_refused(desk, error, advice):
    desk.replies(create=[{"err": error, "code": 1}])
    done = desk.run("create.sh")
    assert done.returncode == 1
    assert error in done.stderr
    assert advice in done.stderr
    assert ("create.sh:" in done.stderr) == bool(advice)


def test_setup_copies_the_tree_and_the_settings_to_all_hosts(desk):
    for name in ("README.md", "azr_jax/cli.py", "runs/demo/metrics.jsonl", ".venv/bin/python", "x/__pycache__/a.pyc"):
        path = desk.repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    done = desk.run("setup.sh")
    assert done.returncode == 0, done.stderr
    *copies, install = desk.calls
    assert copies == [
        scp("build/azr_jax.tar.gz", "azr_jax.tar.gz"),
        scp("tpu_scripts/settings.sh", "azr_settings.sh"),
    ]
    command = install[-1].removeprefix("--command=")
    assert install == ssh("all", command)
    assert command.endswith("-C azr_jax && bash azr_jax/tpu_scripts/worker/install.sh")
    with tarfile.open(desk.repository / "build/azr_jax.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"./README.md", "./azr_jax/cli.py", "./tpu_scripts/worker/run.sh"} <= names
    assert not [name for name in names if name.startswith(("./runs", "./.venv", "./build")) or "__pycache__" in name]


def test_setup_stops_at_the_first_failure(desk):
    desk.replies(scp=[{"err": "ERROR: [255] connection lost\n", "code": 255}])
    done = desk.run("setup.sh")
    assert done.returncode == 255
    assert "connection lost" in done.stderr
    assert desk.verbs() == ["scp"]


def test_launch_sends_the_settings_of_now(desk):
    assert desk.run("launch.sh").returncode == 0
    assert desk.calls == [
        scp("tpu_scripts/settings.sh", "azr_settings.sh"),
        ssh("all", "bash azr_jax/tpu_scripts/worker/start.sh"),
    ]


@pytest.mark.parametrize(
    ("arguments", "worker", "option"),
    [([], "0", ""), (["3"], "3", ""), (["all"], "all", ""), (["1", "--follow"], "1", " --follow")],
)
def test_logs(desk, arguments, worker, option):
    assert desk.run("logs.sh", *arguments).returncode == 0
    assert desk.calls == [ssh(worker, "bash azr_jax/tpu_scripts/worker/log.sh" + option)]


def test_stop_and_delete(desk):
    assert desk.run("stop.sh").returncode == 0
    assert desk.calls == [ssh("all", STOP)]
    assert desk.run("delete.sh").returncode == 0
    upload = "[ ! -d azr_jax ] || bash azr_jax/tpu_scripts/worker/sync.sh"
    assert desk.calls[1:] == [ssh("all", STOP), ssh("0", upload), DELETE]


def test_delete_keeps_a_slice_whose_run_cannot_be_stopped(desk):
    desk.replies(ssh=[{"err": "Connection closed\n", "code": 255}])
    done = desk.run("delete.sh")
    assert done.returncode == 1
    assert "delete.sh --now" in done.stderr
    assert desk.verbs() == ["ssh"]
    assert desk.run("delete.sh", "--now").returncode == 0
    assert desk.calls[1:] == [DELETE]


def test_delete_keeps_a_slice_that_has_the_only_copy(desk):
    desk.settings(BUCKET="")
    done = desk.run("delete.sh")
    assert done.returncode == 2
    assert "delete.sh --now" in done.stderr
    assert not desk.calls
    assert desk.run("delete.sh", "--now").returncode == 0
    assert desk.calls == [DELETE]


@pytest.mark.parametrize("script", ["create.sh", "launch.sh", "watch.sh"])
def test_several_hosts_need_a_bucket(desk, script):
    desk.settings(BUCKET="", ACCELERATOR_TYPE="v5litepod-16")
    done = desk.run(script)
    assert done.returncode == 2
    assert "v5litepod-16 has several hosts" in done.stderr
    assert not desk.calls
    assert desk.run("delete.sh", "--now").returncode == 0  # what is there can always be given back


def test_sync(desk):
    assert desk.run("sync.sh", "up").returncode == 0
    assert desk.calls == [ssh("0", "bash azr_jax/tpu_scripts/worker/sync.sh")]
    metrics = desk.fake / "bucket/a-bucket/azr/demo/metrics.jsonl"
    checkpoint = metrics.parent / "checkpoints/step_000010/state"
    checkpoint.parent.mkdir(parents=True)
    metrics.write_text("{}")
    checkpoint.write_text("x")
    assert desk.run("sync.sh", "down").returncode == 0
    here = desk.repository / "runs/demo"
    assert (here / "metrics.jsonl").exists()
    assert not (here / "checkpoints").exists()
    assert desk.run("sync.sh", "checkpoints").returncode == 0
    assert (here / "checkpoints/step_000010/state").exists()
    assert desk.calls[2] == ["storage", "rsync", "--recursive", "gs://a-bucket/azr/demo", "runs/demo"]


def test_status(desk):
    state = "worker 0 run: running\n"
    desk.replies(queue=[{"out": "ACTIVE\n"}], node=[{"out": "READY\n"}], state=[{"out": state}])
    done = desk.run("status.sh")
    assert done.returncode == 0
    assert done.stdout == "queued resource azr: ACTIVE\nnode: READY\nworker 0 run: running\n"
    describe = ["compute", "tpus", "queued-resources", "describe", "azr", *WHERE, "--format=value(state.state)"]
    assert desk.calls[0] == describe
    assert desk.calls[1] == ["compute", "tpus", "tpu-vm", "describe", "azr", *WHERE, "--format=value(state)"]


@pytest.mark.parametrize(
    ("queue", "node", "shown"),
    [
        ({"out": "WAITING_FOR_RESOURCES\n"}, {}, "queued resource azr: WAITING_FOR_RESOURCES\n"),
        ({"out": "ACTIVE\n"}, {"out": "PREEMPTED\n"}, "queued resource azr: ACTIVE\nnode: PREEMPTED\n"),
        ({"err": "ERROR: NOT_FOUND: Resource azr was not found\n", "code": 1}, {}, "queued resource azr: ABSENT\n"),
        ({"err": "ERROR: no network\n", "code": 1}, {}, "queued resource azr: UNKNOWN\n"),
    ],
)
def test_status_asks_no_further_than_there_is_something(desk, queue, node, shown):
    desk.replies(queue=[queue], node=[node])
    done = desk.run("status.sh")
    assert done.returncode == 0
    assert done.stdout == shown
    assert ("no network" in done.stderr) == ("UNKNOWN" in shown)  # an error that says nothing about the slice is shown


def test_status_says_why_a_request_failed(desk):
    desk.replies(queue=[{"out": "FAILED\n"}, {"out": "no capacity\n"}])
    assert desk.run("status.sh").stdout == "queued resource azr: FAILED\nno capacity\n"
    assert desk.calls[1][-1] == "--format=value(state.failedData.error.message)"


SCRIPTS = ["create.sh", "setup.sh", "launch.sh", "stop.sh", "logs.sh", "status.sh", "delete.sh", "watch.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_does_nothing(desk, script):
    desk.settings(PROJECT="my-project")  # even the placeholder will do
    done = desk.run(script, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "gcloud compute tpus " in done.stdout
    assert not desk.calls
    assert not (desk.repository / "build").exists()


@pytest.mark.parametrize("script", ["create.sh", "setup.sh", "launch.sh", "logs.sh", "delete.sh"])
def test_settings_are_data(desk, script):
    """Blanks, quotes and what bash would run: gcloud gets them as they are, and so it does by what a dry run prints."""
    nasty = """it's "a" $(touch boom) `touch boom`; *"""
    desk.settings(TPU_NAME=shlex.quote(nasty), ZONE=shlex.quote("a b"))
    done = desk.run(script)
    assert done.returncode == 0, done.stderr
    assert desk.calls
    for call in desk.calls:
        assert "--zone=a b" in call
        assert any(word.startswith(nasty) for word in call)
    printed = [shlex.split(line) for line in desk.run(script, "--dry-run").stdout.splitlines()]
    assert [words[1:] for words in printed if words[0] == "gcloud"] == desk.calls
    assert not list(desk.fake.parent.rglob("boom"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PROJECT": "my-project"}, "still the placeholder my-project"),
        ({"BUCKET": "gs://my-bucket/azr"}, "still the placeholder gs://my-bucket/azr"),
        ({"ZONE": ""}, "ZONE is missing in tpu_scripts/settings.sh"),
        ({"BUCKET": "my-bucket"}, "must be empty or begin with gs://"),
        ({"BUCKET": "", "DELETE_WHEN_DONE": "yes"}, "would delete the run as well"),
        ({"RUN_NAME": "a/b"}, "must be a name without /"),
        ({"CAPACITY": "free"}, "must be spot, on-demand or reserved"),
    ],
)
def test_bad_settings(desk, settings, message):
    desk.settings(**settings)
    done = desk.run("create.sh")
    assert done.returncode == 2
    assert message in done.stderr
    assert not desk.calls


def test_bad_arguments(desk):
    """A misspelt --dry-run must not run."""
    cases = [("logs.sh", "one"), ("sync.sh", "left"), ("delete.sh", "--soon")]
    cases += [(f"{name}.sh", "--dryrun") for name in ("create", "launch", "setup", "status", "stop", "watch")]
    for script, argument in cases:
        done = desk.run(script, argument)
        assert done.returncode == 2
        assert "see --help" in done.stderr
    assert not desk.calls


def test_own_settings_file(desk):
    text = (desk.repository / "tpu_scripts/settings.sh").read_text()
    (desk.fake / "mine.sh").write_text(text + "TPU_NAME=other\n")
    assert desk.run("launch.sh", TPU_SETTINGS="mine.sh").returncode == 0
    assert desk.calls[0][4:6] == [str(desk.fake / "mine.sh"), "other:azr_settings.sh"]


def test_without_gcloud(desk):
    (desk.bin / "gcloud").unlink()
    (desk.bin / "dirname").symlink_to("/usr/bin/dirname")
    done = subprocess.run(
        ["/bin/bash", str(desk.repository / "tpu_scripts/create.sh")],
        env={"PATH": str(desk.bin)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "gcloud is missing" in done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "sync.sh"])
def test_help(desk, script):
    done = desk.run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(script)
    assert "shellcheck" not in done.stdout
    assert not desk.calls
