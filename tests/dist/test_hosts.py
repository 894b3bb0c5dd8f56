"""Hosts as processes of their own: what they tell each other, how they stop, and how they end when one of them does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from azr_jax.config import Config, ExecutorConfig, LearnConfig
from azr_jax.dist import hosts
from azr_jax.dist import join as joining
from azr_jax.dist.hosts import Hosts, facts, require_shared
from azr_jax.dist.join import from_environment, join
from azr_jax.errors import ConfigError, UserError
from tests.hosts import on_hosts
from tests.learn.test_two_processes import free_port

ROOT = Path(__file__).parents[2]
#: Silence counts as death a little sooner than for users, so that nobody has to wait for it here.
DEAD_SECONDS = 10
PROCESS = f"""
import sys, time
from azr_jax.dist import watch
from azr_jax.dist.join import join
from azr_jax.errors import UserError
from azr_jax.signals import GracefulStop

watch.DEAD_SECONDS = {DEAD_SECONDS}
address, hosts, host, case = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
try:
    with GracefulStop(0.5 if case == "busy" and host == 0 else 60.0) as stop, join(address, hosts, host) as we:
        we.relay(stop)
        print("joined", flush=True)
        if case == "talk":
            for size in (0, 5, 3_000_000):
                said = [bytes([i]) * (size + i) for i in range(hosts)]
                assert we.gather("bytes", said[we.index], fact="same") == said
            assert we.gather("a stop", None if we.index == 1 else b"") is None
            assert we.agree("yes", we.index == 1) and not we.agree("no", False)
            assert we.tell("names", str(we.index)) == [str(i) for i in range(hosts)]
            assert sorted(sum(([p] if we.owns(p) else [] for p in range(9)), [])) == list(range(we.index, 9, hosts))
            while not we.agree("going on", stop.requested):
                time.sleep(0.01)
            print("stopped by", stop.received.name)
        if case == "fact":
            we.gather("facts", b"", weather=("rain", "sun")[we.index])
        if case == "place":
            we.agree(f"place {{we.index}}", False)
        if case == "mistake" and we.index == 0:
            raise UserError("the disk is full", 2)
        if case == "bug" and we.index == 1:
            raise ValueError("a bug")
        if case == "waiting":
            we.agree("all here", False)
            if we.index == hosts - 1:
                print("ready", flush=True)
                time.sleep(100)
            we.agree("what never comes", False)
        if case == "busy":
            we.agree("all here", False)
            if we.index == 0:
                print("ready", flush=True)
                time.sleep(100)
            we.agree("what never comes", False)
        if case in ("mistake", "bug"):
            we.agree("what never comes", False)
    raise SystemExit(stop.exit_code)
except UserError as error:
    print("azr-jax: error:", error, file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
"""


class Job:
    """Processes that are the hosts of one job."""

    def __init__(self, case: str, count: int = 2) -> None:
        address = f"127.0.0.1:{free_port()}"
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        self.hosts = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, address, str(count), str(host), case],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for host in range(count)
        ]

    def says(self, host: int, line: str) -> None:
        """Wait until it does."""
        found = self.hosts[host].stdout
        assert found is not None
        while line not in (text := found.readline()):
            assert text, self.hosts[host].stderr and self.hosts[host].stderr.read()

    def end(self, host: int) -> tuple[int, str]:
        """Exit code, and what is printed from now on (stdout) or was at all (stderr)."""
        out, errors = self.hosts[host].communicate(timeout=300)
        assert "Gloo" not in out  # stdout is for results
        return self.hosts[host].returncode, out + errors


def one_line(said: str) -> str:
    """The one line for the user; nothing else of ours is a traceback."""
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("azr-jax:")]
    return line


def test_they_hear_each_other_and_stop_together() -> None:
    job = Job("talk", 3)
    job.says(0, "joined")
    job.hosts[1].send_signal(signal.SIGINT)
    for host in range(3):
        code, said = job.end(host)
        assert code == 130 and "stopped by SIGINT" in said, said


def test_a_host_that_gives_up_after_sigterm_takes_the_others_along() -> None:
    job = Job("busy")
    job.says(0, "ready")
    job.hosts[0].send_signal(signal.SIGTERM)
    for host in (0, 1):
        code, said = job.end(host)
        assert code == 0 and "terminate called" not in said, said


#: case -> (exit code of all, the host it happens on (None: all notice it), what is said)
ERRORS = {
    "fact": (1, None, "weather is sun on host 1 and rain on host 0"),
    "place": (1, None, "host 1 is at place 1, host 0 at place 0"),
    "mistake": (2, 0, "the disk is full"),
    "bug": (1, 1, "a bug"),
}


def test_an_error_on_one_is_the_end_of_all() -> None:
    jobs = {case: Job(case) for case in ERRORS}
    for case, (code, by, says) in ERRORS.items():
        for host in range(2):
            found, said = jobs[case].end(host)
            assert found == code and says in said, said
            if by is not None and host != by:
                assert one_line(said) == f"azr-jax: error: host {by} has stopped: {says}"


def test_all_others_end_when_one_is_gone() -> None:
    killed, frozen, first = Job("waiting", 3), Job("waiting", 2), Job("waiting", 2)
    for job, victim, number in ((killed, 2, signal.SIGKILL), (frozen, 0, signal.SIGSTOP), (first, 0, signal.SIGKILL)):
        job.says(len(job.hosts) - 1, "ready")
        job.hosts[victim].send_signal(number)
    for host in (0, 1):
        code, said = killed.end(host)
        assert code == 75 and "host 2 has been silent" in said and "resumes" in one_line(said), said
    # When host 0 goes, JAX's own lines may come first, or, when the machine is very busy, instead of ours.
    for job in (frozen, first):
        code, said = job.end(1)
        assert code != 0 and ("host 0, which coordinates all others" in said or "distributed service" in said), said
    frozen.hosts[0].kill()


@pytest.mark.parametrize("host", [0, 1])
def test_a_job_that_is_never_complete_is_given_up(host: int) -> None:
    program = "from azr_jax.dist import join; join.JOIN_SECONDS = 3.0\n" + PROCESS
    arguments = [sys.executable, "-c", program, f"127.0.0.1:{free_port()}", "2", str(host), "talk"]
    found = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1 and "Is the command running on every host" in one_line(found.stderr), found.stderr
    assert ("does not answer" if host else "not all hosts have joined") in found.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("here:1", None, 0), "belong together"),
        ((None, 2, None), "belong together"),
        (("here", 2, 0), "HOST:PORT"),
        (("here:99999", 2, 0), "HOST:PORT"),
        (("here:1", 2, 2), "numbered from 0"),
    ],
)
def test_flags_that_make_no_sense(flags: tuple[str | None, int | None, int | None], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        join(*flags)


def test_one_host_is_alone_and_hears_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in joining.SLURM:
        monkeypatch.delenv(name, raising=False)
    for hosts in (join(), join("here:1", 1, 0)):
        with hosts:
            assert (hosts.index, hosts.count, hosts.leads) == (0, 1, True) and hosts.owns(7)
            assert hosts.gather("it", b"said") == [b"said"] and hosts.gather("it", None) is None
            assert hosts.agree("it", True) and not hosts.agree("it", False, fact="1")


SLURM = dict(zip(joining.SLURM, ("17", "node[1-2]", "2", "1", "0"), strict=True))
NODES = {"SLURM_GPUS_ON_NODE": "4"}


@pytest.mark.parametrize(
    ("variables", "says", "arguments"),
    [
        (SLURM, "task 1 of 2", {}),
        (
            SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
            "task 1 of 2",
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "4"}, "task 1 of 2", {}),
        (SLURM | {"SLURM_NTASKS": "1"}, None, {}),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None, {}),  # a batch script
        ({"MEGASCALE_NUM_SLICES": "2"}, "one of 2 TPU slices", {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "one of 4 hosts of a TPU slice", {}),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None, {}),
    ],
)
def test_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str | None, arguments: dict[str, object]
) -> None:
    for name in (*joining.SLURM, "MEGASCALE_NUM_SLICES", "TPU_WORKER_HOSTNAMES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joining, "has_tpu", lambda: "TPU_WORKER_HOSTNAMES" in variables)
    found, given = from_environment()
    assert given == arguments and (says in found if says and found else found is says)


def test_facts_name_what_differs_and_leave_the_machine_out() -> None:
    same = facts(Config())
    assert facts(Config(executor=ExecutorConfig(workers=7), model="/of/this/host")) == same
    other = facts(Config(learn=LearnConfig(lr=1e-3)))
    assert {name for name in same if same[name] != other[name]} == {"learn.lr"}
    assert {"azr_jax", "jax", "numpy", "Python"} <= same.keys()


def test_a_run_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "SHARED_SECONDS", 0.5)

    def play(we: Hosts, name: str) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        try:
            require_shared(folder, we)
        except UserError as error:
            return str(error)
        return ""

    assert on_hosts(3, lambda we: play(we, "shared")) == ["", "", ""]
    assert not list((tmp_path / "shared").iterdir())
    said = on_hosts(3, lambda we: play(we, f"of {min(we.index, 1)}"))
    assert all("cannot be read on host 1, 2; run_dir has to be" in str(text) for text in said)
