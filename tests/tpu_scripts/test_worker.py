"""What happens on a host: installation, the run as a unit, upload and restore; a slice's life with nothing scripted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINER = """
for argument; do [[ $argument != run_dir=* ]] || run=${argument#run_dir=}; done
printf '%s\\n' "$@" >"$FAKE/trainer"
mkdir -p "$run/checkpoints" && touch "$run/config.yaml" "$run/.lock"
last=$(ls "$run/checkpoints" | sed -n 's/^step_0*//p' | tail -n 1)
step=$((${last:-0} + 1))
save() { mkdir "$run/checkpoints/step_00000$step" && echo "$step" >"$run/checkpoints/step_00000$step/state"; }
echo "{\\"step\\": $step}" >>"$run/metrics.jsonl"
case $(cat "$FAKE/behaviour") in
  fail) echo "it broke"; exit 5 ;;
  wait) trap 'save; exit 0' TERM; echo "working"; while :; do sleep 0.02; done ;;
  slow) trap 'until [[ -e $FAKE/go ]]; do sleep 0.02; done; save; exit 0' TERM
    echo "working"; while :; do sleep 0.02; done ;;
  relayed) save; echo "stopped after step $step of 500; resumable: run the same command again" >&2 ;;
  *) save ;;
esac
"""
SYSTEMCTL = """
unit=$(cat "$FAKE/unit" 2>/dev/null)
live() { grep -q '^State:.[^Z]' "/proc/$unit/status" 2>/dev/null; }
if ! live; then state=inactive; elif [[ $(cat "$FAKE/told" 2>/dev/null) == "$unit" ]]; then state=deactivating
else state=active; fi
case "$*" in
  "is-active --quiet azr") [[ $state == active ]] ;;
  "is-active azr") echo "$state"; [[ $state == active ]] ;;
  "stop azr")
    if [[ $state == deactivating ]]; then touch "$FAKE/waits"; else echo "$unit" >"$FAKE/told"; kill "$unit"; fi
    while live; do sleep 0.02; done ;;
esac
"""

UV = """
printf '%s\\n' "$*" >>"$FAKE/uv"
if [[ $1 == venv ]]; then # venv --python VERSION FOLDER
  mkdir -p "$4/bin" && cp "$FAKE/../bin/azr-jax" "$4/bin/" && cp "$FAKE/../bin/azr-jax" "$4/bin/python"
fi
"""


@pytest.fixture
def host(desk):
    """The desk, with one host that has what the VM image has, pretended where it matters."""
    desk.host.mkdir()
    desk.program("systemctl", SYSTEMCTL)
    desk.program("sudo", 'exec "$@"')
    desk.program("systemd-run", 'printf "%s\\n" "$@" >"$FAKE/systemd-run"\nsetsid "${@: -2}" & echo $! >"$FAKE/unit"')
    desk.program(
        "curl", 'case "$*" in *agent-worker-number) cat "$FAKE/worker" ;; *) echo "touch \\$FAKE/fetched" ;; esac'
    )
    desk.program("uv", UV)
    desk.program("azr-jax", TRAINER)
    (desk.fake / "worker").write_text("0\n")
    (desk.fake / "behaviour").write_text("finish")
    yield desk
    kill(desk)


def kill(desk):
    """Ends what a test has left of the unit: all of its session, as a preemption does once its notice is over."""
    unit = desk.fake / "unit"
    session = unit.read_text().strip() if unit.exists() else None
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if session and path.read_text().rpartition(")")[2].split()[3] == session:
                os.kill(int(path.parent.name), signal.SIGKILL)


def until(condition, seconds=300):
    """Polls; the limit only ends a test that hangs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def state(desk):
    return desk.run("status.sh").stdout.splitlines()[-1]


def ended(desk):
    """Whether run.sh is through."""
    return unit_state(desk) == "inactive"


def unit_state(desk):
    """Its state: asks the pretended systemd directly, which is cheaper than status.sh."""
    asked = ["bash", desk.bin / "systemctl", "is-active", "azr"]
    return subprocess.run(asked, env=desk.environment, capture_output=True, text=True).stdout.strip()


def start(desk):
    for script in ("setup.sh", "launch.sh"):
        done = desk.run(script)
        assert done.returncode == 0, done.stderr


def active(desk):
    desk.replies(queue=[{"out": "ACTIVE\n"}], node=[{"out": "READY\n"}])


def test_a_run_from_set_up_to_finished(host):
    active(host)
    host.settings(OVERRIDES="(steps=3 'model=a b')")
    assert state(host) == "run: none"
    start(host)
    until(lambda: ended(host))
    assert state(host) == "worker 0 run: finished"
    tree, venv = host.host / "azr_jax", host.host / "azr_venv"
    assert (host.fake / "uv").read_text().splitlines() == [
        f"venv --python 3.12 {venv}",
        f"pip install --quiet --python {venv}/bin/python --editable {tree}[tpu]",
    ]
    unit = (host.fake / "systemd-run").read_text().splitlines()
    assert {"--unit=azr", f"--working-directory={tree}", "--property=KillMode=mixed"} <= set(unit)
    assert {"--property=LimitMEMLOCK=infinity", "--property=After=network.target network-online.target"} <= set(unit)
    assert unit[-2:] == ["bash", f"{tree}/tpu_scripts/worker/run.sh"]
    run = host.host / "azr_runs/demo"
    assert (host.fake / "trainer").read_text().splitlines() == [
        "train", "configs/demo.yaml", f"run_dir={run}", "steps=3", "model=a b", "--grace", "20",
    ]  # fmt: skip
    kept = host.fake / "bucket/a-bucket/azr/demo"
    assert (kept / "checkpoints/step_000001/state").read_text() == "1\n"
    assert (kept / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (kept / ".lock").exists()
    assert "nothing at gs://a-bucket/azr/demo: a new run" in host.run("logs.sh").stdout


def test_on_several_hosts_the_run_folder_is_the_bucket(host):
    active(host)
    endpoints = "echo unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"
    host.program("curl", f'case "$*" in *number) echo 0 ;; *endpoints) {endpoints} ;; *) echo true ;; esac')
    start(host)
    until(lambda: ended(host))
    assert state(host) == "worker 0 run: finished"
    assert "run_dir=gs://a-bucket/azr/demo" in (host.fake / "trainer").read_text().splitlines()
    assert not (host.host / "azr_runs/demo").exists() and not (host.fake / "bucket").exists(), "train uploads by itself"
    host.settings(BUCKET="")
    start(host)
    until(lambda: ended(host))
    assert "needs a BUCKET" in state(host)


def at_work(host, behaviour):
    """A trainer that has begun, and goes on until it is told to stop."""
    active(host)
    (host.fake / "behaviour").write_text(behaviour)
    start(host)
    log = host.host / "azr_runs/demo.log"
    until(lambda: log.exists() and "working" in log.read_text())


def test_a_preempted_run_goes_on_from_the_bucket(host):
    at_work(host, "wait")
    assert state(host) == "worker 0 run: running"
    refused = host.run("setup.sh")
    assert refused.returncode == 1
    assert "a run is live" in refused.stderr
    assert "live already" in host.run("launch.sh").stdout  # and nothing is started twice
    assert host.run("stop.sh").returncode == 0
    assert state(host) == "worker 0 run: stopped"

    shutil.rmtree(host.host)  # another machine
    host.host.mkdir()
    (host.fake / "behaviour").write_text("finish")
    start(host)
    until(lambda: ended(host))
    assert state(host) == "worker 0 run: finished"
    run = host.host / "azr_runs/demo"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (host.fake / "bucket/a-bucket/azr/demo/checkpoints/step_000002/state").exists()


def test_a_slice_that_vanishes_without_notice(host):
    active(host)
    host.settings(SYNC_SECONDS="0.05")
    (host.fake / "behaviour").write_text("wait")
    checkpoints = host.host / "azr_runs/demo/checkpoints"
    start(host)
    until(lambda: (host.fake / "bucket/a-bucket/azr/demo/metrics.jsonl").exists())
    (checkpoints / "step_000001").mkdir()
    (checkpoints / "step_000001/state").write_text("1\n")
    until(lambda: (host.fake / "bucket/a-bucket/azr/demo/checkpoints/step_000001/state").exists())
    kill(host)
    until(lambda: ended(host))
    shutil.rmtree(host.host)
    host.host.mkdir()
    (host.fake / "behaviour").write_text("finish")
    host.settings(SYNC_SECONDS="3600")
    start(host)
    until(lambda: ended(host))
    assert state(host) == "worker 0 run: finished"
    assert (host.host / "azr_runs/demo/metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (host.fake / "bucket/a-bucket/azr/demo/checkpoints/step_000002/state").exists()


def test_a_run_that_is_stopped_while_it_starts_is_no_failure(host):
    active(host)
    host.program("azr-jax", 'echo importing; touch "$FAKE/trainer"; sleep 60')  # no handler of SIGTERM yet
    start(host)
    until((host.fake / "trainer").exists)
    assert host.run("stop.sh").returncode == 0
    assert state(host) == "worker 0 run: stopped"


def test_a_run_that_still_saves_is_a_run(host):
    """A connection broke while the run was stopped: to stop it again is to wait, and its code stays."""
    at_work(host, "slow")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lost = pool.submit(host.run, "stop.sh")
        until(lambda: unit_state(host) == "deactivating")
        assert state(host) == "worker 0 run: running"
        refused = host.run("setup.sh")
        deleted = pool.submit(host.run, "delete.sh")
        until(lambda: (host.fake / "waits").exists() or deleted.done())
        (host.fake / "go").touch()
        assert lost.result().returncode == deleted.result().returncode == 0
    assert refused.returncode == 1
    assert "a run is live" in refused.stderr
    verbs = [call[3] if call[0] == "compute" else call[-1] for call in host.calls]
    assert verbs.index("gs://a-bucket/azr/demo/checkpoints/step_000001") < verbs.index("delete")
    assert (host.fake / "bucket/a-bucket/azr/demo/checkpoints/step_000001/state").exists()


def test_a_run_that_was_not_told_to_stop_but_did_is_not_finished(host):
    """Another host was told, or only the trainer was: it ends with 0 as after its last step."""
    active(host)
    host.settings(DELETE_WHEN_DONE="yes")
    (host.fake / "behaviour").write_text("relayed")
    start(host)
    until(lambda: ended(host))
    assert state(host) == "worker 0 run: stopped"
    (host.fake / "behaviour").write_text("finish")
    done = host.run("watch.sh")
    assert done.returncode == 0, done.stderr
    last = [verb for verb in host.verbs() if verb in ("ssh start.sh", "delete")]
    assert last == ["ssh start.sh", "ssh start.sh", "delete"]
    assert "run: finished" in done.stderr  # although the log still has the words of the launch before
    assert (host.fake / "bucket/a-bucket/azr/demo/checkpoints/step_000002/state").exists()


def test_the_words_of_a_stop_are_those_of_the_trainer():
    (words,) = re.findall("grep -q '(.*?)'", (ROOT / "tpu_scripts/worker/run.sh").read_text())
    for name in ("train", "signals", "dist/watch"):
        ends = [line for line in (ROOT / f"azr_jax/{name}.py").read_text().splitlines() if "resumable:" in line]
        assert ends and all(words in line for line in ends)


def test_a_failing_run_says_so(host):
    active(host)
    (host.fake / "behaviour").write_text("fail")
    start(host)
    until(lambda: ended(host))
    assert state(host) == "worker 0 run: failed (exit code 5)"
    assert "it broke" in host.run("logs.sh").stdout
    assert (host.fake / "bucket/a-bucket/azr/demo/metrics.jsonl").exists()  # what there is, is kept


def test_a_run_that_lost_another_host_can_be_started_again(host):
    active(host)
    host.program("azr-jax", "exit 75")
    start(host)
    until(lambda: ended(host))
    assert state(host).startswith("worker 0 run: stopped")


def test_a_bucket_that_cannot_be_read_starts_nothing(host):
    refusal = {"err": "ERROR: HTTPError 403: no permission\n", "code": 1}
    host.replies(queue=[{"out": "ACTIVE\n"}], node=[{"out": "READY\n"}], ls=[refusal])
    start(host)
    until(lambda: ended(host))
    assert state(host) == "worker 0 run: failed (could not read gs://a-bucket/azr/demo)"
    assert not (host.fake / "trainer").exists()
    assert not (host.fake / "bucket").exists()
    assert "HTTPError 403" in host.run("logs.sh").stdout


def test_the_bucket_keeps_the_checkpoints_that_the_host_keeps(host):
    kept = host.fake / "bucket/a-bucket/azr/demo/checkpoints"
    local = host.host / "azr_runs/demo/checkpoints"
    for name in ("step_000010", "step_000020", "step_000030.orbax-checkpoint-tmp"):
        (local / name).mkdir(parents=True)
        (local / name / "state").write_text("x")
    assert host.run("setup.sh").returncode == 0
    assert host.run("sync.sh", "up").returncode == 0
    assert sorted(path.name for path in kept.iterdir()) == ["step_000010", "step_000020"]
    (local / "step_000010").rename(local / "step_000030")
    assert host.run("sync.sh", "up").returncode == 0
    assert sorted(path.name for path in kept.iterdir()) == ["step_000020", "step_000030"]
    shutil.rmtree(local)  # nothing here is no reason to remove what is there
    assert host.run("sync.sh", "up").returncode == 0
    assert sorted(path.name for path in kept.iterdir()) == ["step_000020", "step_000030"]


def checkpoint(folder, number):
    path = folder / f"step_{number:06d}"
    path.mkdir(parents=True)
    for name in ("a", "b"):
        (path / name).write_text(f"{number}\n")


def kept_whole(folder):
    """Numbers of the checkpoints in the bucket, which are all whole."""
    names = sorted(path.name for path in folder.iterdir())
    assert all(sorted(path.name for path in (folder / name).iterdir()) == ["a", "b"] for name in names)
    return [int(name.removeprefix("step_")) for name in names]


SAVE = """
cd "$HOME/azr_runs/demo/checkpoints"
named() { printf 'step_%06d' "$(($1))"; }
save() { mkdir new && echo "$1" >new/a && echo "$1" >new/b && mv new "$(named "$1")"; }
prune() { mv "$(named "$1")" old.removed && rm -r old.removed; }
"""


def test_checkpoints_that_are_pruned_while_they_go_up(host):
    """Three are there. While the newest goes up the oldest is pruned, and then the other one between its two files."""
    kept, local = host.fake / "bucket/a-bucket/azr/demo/checkpoints", host.host / "azr_runs/demo/checkpoints"
    for number in (1, 2, 3):
        checkpoint(local, number)
    checkpoint(kept, 1)
    assert host.run("setup.sh").returncode == 0
    script = 'case "$*" in "step_000003 1") save 4; prune 1 ;; "step_000002 1") save 5; prune 2 ;; esac\n'
    (host.fake / "meanwhile").write_text(SAVE + script)
    done = host.run("sync.sh", "up")
    assert done.returncode == 0, done.stderr
    assert kept_whole(kept) == [3]
    (host.fake / "meanwhile").unlink()
    assert host.run("sync.sh", "up").returncode == 0
    assert kept_whole(kept) == [3, 4, 5]


def test_a_newest_checkpoint_that_is_pruned_while_it_goes_up(host):
    """The bucket keeps the whole one that it has until a newer one has arrived; the torn one goes then too."""
    kept, local = host.fake / "bucket/a-bucket/azr/demo/checkpoints", host.host / "azr_runs/demo/checkpoints"
    checkpoint(local, 2)
    checkpoint(kept, 1)
    assert host.run("setup.sh").returncode == 0
    (host.fake / "meanwhile").write_text(SAVE + 'case "$*" in "step_000002 1") save 3; prune 2 ;; esac\n')
    done = host.run("sync.sh", "up")
    assert done.returncode == 1
    assert "step_000002 was pruned" in done.stdout
    assert sorted(path.name for path in (kept / "step_000001").iterdir()) == ["a", "b"]
    assert host.run("sync.sh", "up").returncode == 0
    assert kept_whole(kept) == [3]


def test_a_run_that_prunes_faster_than_it_uploads(host):
    """It keeps two, and while one goes up it saves another, for ever: some arrive whole all the same."""
    active(host)
    host.settings(SYNC_SECONDS="0.05")
    (host.fake / "behaviour").write_text("wait")
    kept, local = host.fake / "bucket/a-bucket/azr/demo/checkpoints", host.host / "azr_runs/demo/checkpoints"
    for number in (1, 2):
        checkpoint(local, number)
    script = """
    all=(step_??????)
    case "$*" in "step_"*" 1") save $((10#${all[-1]#step_} + 1)); prune "10#${all[0]#step_}" ;; esac
    """
    (host.fake / "meanwhile").write_text(SAVE + script)
    start(host)
    until(lambda: any((path.parent / "a").exists() for path in kept.glob("step_*/b")))


def test_a_failed_upload_removes_nothing(host):
    kept = host.fake / "bucket/a-bucket/azr/demo/checkpoints/step_000010"
    kept.mkdir(parents=True)
    (host.host / "azr_runs/demo/checkpoints/step_000020").mkdir(parents=True)
    assert host.run("setup.sh").returncode == 0
    host.replies(rsync=[{"err": "ERROR: disk quota\n", "code": 1}])
    assert host.run("sync.sh", "up").returncode == 1
    assert kept.exists()


def test_only_the_first_worker_uploads(host):
    (host.fake / "worker").write_text("1\n")
    (host.host / "azr_runs/demo").mkdir(parents=True)
    assert host.run("setup.sh").returncode == 0
    assert host.run("sync.sh", "up").returncode == 0
    assert "rsync" not in host.verbs()


def test_installation_fetches_uv_and_the_model(host):
    (host.bin / "uv").rename(host.bin / "uv2")
    if shutil.which("uv", path=host.environment["PATH"]):
        pytest.skip("this machine has uv where programs of the system are")
    host.program("curl", 'case "$*" in *agent*) echo 0 ;; *) echo "cp \\$FAKE/../bin/uv2 \\$FAKE/../bin/uv" ;; esac')
    model = host.fake / "bucket/models/qwen/config.json"
    model.parent.mkdir(parents=True)
    model.write_text("{}")
    host.settings(MODEL="gs://models/qwen", OVERRIDES="(steps=1)")
    active(host)
    start(host)
    assert (host.host / "azr_model/config.json").exists()
    until(lambda: ended(host))
    assert state(host) == "worker 0 run: finished"
    assert f"model={host.host}/azr_model\nsteps=1\n" in (host.fake / "trainer").read_text()

    host.settings(MODEL="gs://models/other")  # whose weights are not here
    begun = (host.fake / "trainer").read_text()
    assert host.run("launch.sh").returncode == 0
    until(lambda: "setup.sh again" in state(host))
    assert "run: failed (MODEL is gs://models/other" in state(host) and (host.fake / "trainer").read_text() == begun
