"""watch.sh through the life of a slice: queue, set-up, run, preemption, lost connections, quota, a run that fails."""

from __future__ import annotations

ABSENT = {"err": "ERROR: NOT_FOUND: Resource azr was not found\n", "code": 1}
ACTIVE, READY = {"out": "ACTIVE\n"}, {"out": "READY\n"}
LOST = {"err": "ERROR: [/usr/bin/ssh] exited with return code [255].\n", "code": 255}
NONE, RUNNING, FINISHED = ({"out": f"worker 0 run: {word}\n"} for word in ("none", "running", "finished"))
START = ["ssh", "scp", "scp", "ssh install.sh", "scp", "ssh start.sh"]  # stop.sh, setup.sh, launch.sh
LOOK = ["describe", "describe", "ssh state.sh"]


def test_from_nothing_to_a_finished_run(desk):
    waiting = [{"out": f"{state}\n"} for state in ("WAITING_FOR_RESOURCES", "PROVISIONING")]
    desk.replies(queue=[ABSENT, *waiting, ACTIVE], node=[READY], state=[NONE, RUNNING, FINISHED])
    done = desk.run("watch.sh")
    assert done.returncode == 0, done.stderr
    assert desk.verbs() == ["describe", "create", "describe", "describe", *LOOK, *START, *LOOK, *LOOK]
    assert "WAITING_FOR_RESOURCES: waiting" in done.stderr
    assert "the slice still costs until delete.sh" in done.stderr


def test_a_preempted_slice_is_replaced_and_the_run_resumed(desk):
    queue = [ACTIVE, ACTIVE, {"out": "SUSPENDING\n"}, {"out": "SUSPENDED\n"}, ABSENT, ACTIVE]
    desk.replies(queue=queue, node=[READY], state=[RUNNING, LOST, NONE, FINISHED])
    done = desk.run("watch.sh")
    assert done.returncode == 0, done.stderr
    replaced = ["describe", "describe", "delete", "describe", "create"]
    assert desk.verbs() == [*LOOK, *LOOK, *replaced, *LOOK, *START, *LOOK]
    assert ["--force", "--quiet"] == next(call for call in desk.calls if "delete" in call)[-2:]


def test_a_preempted_node_below_an_active_request(desk):
    desk.replies(queue=[ACTIVE, ABSENT, ACTIVE], node=[{"out": "PREEMPTED\n"}, READY], state=[FINISHED])
    done = desk.run("watch.sh")
    assert done.returncode == 0, done.stderr
    assert desk.verbs() == ["describe", "describe", "delete", "describe", "create", *LOOK]
    assert "node PREEMPTED" in done.stderr


def test_lost_connections_are_survived(desk):
    """While asking, and in the middle of the installation, after which set-up starts again from its beginning."""
    desk.replies(queue=[ACTIVE], node=[READY], state=[LOST, NONE, NONE, FINISHED], install=[LOST, {}])
    done = desk.run("watch.sh")
    assert done.returncode == 0, done.stderr
    assert desk.verbs() == [*LOOK, *LOOK, *START[:4], *LOOK, *START, *LOOK]


def test_gcloud_without_an_answer_changes_nothing(desk):
    trouble = {"err": "ERROR: Unable to find the server at tpu.googleapis.com\n", "code": 1}
    desk.replies(queue=[trouble, trouble, ACTIVE], node=[trouble, READY], state=[FINISHED])
    done = desk.run("watch.sh")
    assert done.returncode == 0, done.stderr
    assert set(desk.verbs()) == {"describe", "ssh state.sh"}


def test_quota_ends_it(desk):
    refusal = {"err": "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded.\n", "code": 1}
    desk.replies(queue=[ABSENT], create=[refusal])
    done = desk.run("watch.sh")
    assert done.returncode == 1
    assert desk.verbs() == ["describe", "create"] * 5
    assert "no quota for v5litepod-8" in done.stderr
    assert "giving up" in done.stderr
    assert "costs" not in done.stderr  # there is none


def test_a_slice_that_is_given_up_still_costs(desk):
    desk.replies(queue=[ACTIVE], node=[READY], state=[NONE], install=[LOST])
    done = desk.run("watch.sh")
    assert done.returncode == 1
    assert desk.verbs() == [*LOOK, *START[:4]] * 5
    assert "setup.sh failed" in done.stderr
    assert "giving up; the slice still costs until delete.sh" in done.stderr


def test_hosts_that_never_answer_are_given_up(desk):
    """An answer in between starts the count again; one that says nothing is none, and no finished run."""
    desk.settings(DELETE_WHEN_DONE="yes")
    nothing = {"out": "worker 0 run: \n"}
    desk.replies(queue=[ACTIVE], node=[READY], state=[*[LOST] * 4, RUNNING, *[LOST] * 3, nothing, LOST, RUNNING])
    done = desk.run("watch.sh")
    assert done.returncode == 1
    assert desk.verbs() == LOOK * 10
    assert "giving up; the slice still costs until delete.sh" in done.stderr


def test_a_failed_run_is_not_restarted_and_its_slice_stays(desk):
    failed = {"out": "worker 0 run: running\nworker 1 run: failed (exit code 1)\n"}
    desk.replies(queue=[ACTIVE], node=[READY], state=[failed])
    done = desk.run("watch.sh")
    assert done.returncode == 1
    assert desk.verbs() == [*LOOK, "ssh log.sh"]
    assert "failed (exit code 1)" in done.stderr
    assert "the slice still costs until delete.sh" in done.stderr


def test_a_host_that_lost_its_run_makes_all_start_again(desk):
    half = {"out": "worker 0 run: running\nworker 1 run: none\n"}
    desk.replies(queue=[ACTIVE], node=[READY], state=[half, FINISHED])
    assert desk.run("watch.sh").returncode == 0
    assert desk.verbs() == [*LOOK, *START, *LOOK]


def test_delete_when_done(desk):
    desk.settings(DELETE_WHEN_DONE="yes")
    desk.replies(queue=[ACTIVE], node=[READY], state=[FINISHED])
    assert desk.run("watch.sh").returncode == 0
    assert desk.verbs() == [*LOOK, "delete"]


def test_a_slice_that_cannot_be_deleted_still_costs(desk):
    desk.settings(DELETE_WHEN_DONE="yes")
    desk.replies(queue=[ACTIVE], node=[READY], state=[FINISHED], delete=[LOST])
    done = desk.run("watch.sh")
    assert done.returncode == 1
    assert "the slice still costs until delete.sh" in done.stderr
