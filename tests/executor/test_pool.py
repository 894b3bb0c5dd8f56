"""The pool's life: order, streaming, sharing, deadlines, faults of ours, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from azr_jax.config import ExecutorConfig
from azr_jax.errors import UserError
from azr_jax.executor import ExecutorPool, Request
from azr_jax.executor.sizing import broker_shares
from tests.executor.conftest import CONFIG
from tests.executor.test_hostile import descendants, families

ROOT = Path(__file__).parents[2]
SPIN = "def f(x):\n    while True: pass"


def plain(number, op="run"):
    return Request(str(number), op, program=f"def f(x):\n    return x + {number}", input="1")


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_run_all_keeps_order_and_ids(pool):
    verdicts = pool.run_all([plain(number) for number in range(100)])
    assert [(v.id, v.output) for v in verdicts] == [(str(n), str(n + 1)) for n in range(100)]
    assert pool.run_all([]) == []


def test_equal_ids_and_duplicates_each_get_a_verdict(pool):
    before = pool.stats()
    request = Request("same", "run", program="def f(x):\n    return x * 1000", input="1")
    verdicts = pool.run_all([request] * 50)
    after = pool.stats()
    assert [verdict.output for verdict in verdicts] == ["1000"] * 50
    assert after["children"] - before["children"] == 1
    assert after["duplicates"] - before.get("duplicates", 0) == 49


def test_inputs_of_one_program_share_children(pool):
    before = pool.stats()["children"]
    requests = [Request(str(n), "run", program="def f(x):\n    return x - 5", input=str(n)) for n in range(64)]
    assert [verdict.output for verdict in pool.run_all(requests)] == [str(n - 5) for n in range(64)]
    assert (
        pool.stats()["children"] - before < 32
    )  # fewer the faster the machine: runs are handed over while more come in


def test_a_bad_input_does_not_spoil_its_company(pool):
    program = (
        "def f(x):\n    if x == 3:\n        while True: pass\n    if x == 5:\n        return 'x' * 10**10\n"
        "    return 10 // (x - 7)"
    )
    requests = [Request(str(n), "run", program=program, input=str(n)) for n in range(10)]
    statuses = [verdict.status for verdict in pool.run_all(requests)]
    assert statuses == ["ok", "ok", "ok", "timeout", "ok", "memory", "ok", "error", "ok", "ok"]


def test_streaming(pool):
    pool.submit([Request("slow", "run", program=SPIN + "  # streaming", input="1")])
    pool.submit([plain(number) for number in range(200, 220)])
    assert pool.pending == 21
    seen: list[str] = []
    while pool.pending:
        seen += [verdict.id for verdict in pool.poll(5.0)]
    assert seen[-1] == "slow", "an endless loop holds up nobody"
    assert sorted(seen[:-1]) == [str(number) for number in range(200, 220)]
    assert pool.poll(0.01) == []


def test_run_all_leaves_submitted_verdicts_for_poll(pool):
    pool.submit([plain(300)])
    assert pool.run_all([plain(301)])[0].output == "302"
    found = pool.poll(5.0)
    assert [verdict.id for verdict in found] == ["300"]


def test_deadline_gives_up_without_scoring():
    with ExecutorPool(ExecutorConfig(workers=1, cpu_seconds=5, wall_seconds=30)) as pool:
        verdicts = pool.run_all([plain(1), Request("spin", "run", program=SPIN, input="1")], deadline=1.0)
        assert [(v.status, v.reason) for v in verdicts] == [("ok", ""), ("infra", "deadline")]
        pool.submit([Request("spin", "run", program=SPIN, input="2")])
        pool.give_up()
        assert [(v.id, v.status) for v in pool.poll()] == [("spin", "infra")]
        assert pool.run_all([plain(2)])[0].output == "3", "and the pool goes on"


def test_many_requests_at_once_do_not_deadlock(pool):
    """More than the broker keeps open and more than a socket holds: writes wait, verdicts are read meanwhile."""
    padding = "#" * 3000
    requests = [
        Request(str(n), "judge", "deduction", program=padding, output=str(n), answer=str(n % 7)) for n in range(5000)
    ]
    verdicts = pool.run_all(requests)
    assert sum(verdict.correct for verdict in verdicts) == 7


def test_loops_in_flight_leave_the_rest_quick(pool):
    loops = [Request(f"loop{n}", "run", program=SPIN + f"  # {n}", input="1") for n in range(20)]
    pool.submit(loops)
    verdicts = pool.run_all([plain(number) for number in range(400, 500)])
    assert all(verdict.status == "ok" for verdict in verdicts)
    ends = []
    while pool.pending:
        ends += [verdict.status for verdict in pool.poll(5.0)]
    assert ends == ["timeout"] * 20


def workers_of(pool):
    """Pids of the worker processes: the broker's children."""
    return families().get(pool.broker_pids[0], [])


def test_dead_workers_are_replaced():
    with ExecutorPool(CONFIG) as pool:
        pool.run_all([plain(0)])
        for _ in range(3):
            pool.submit([plain(number) for number in range(20)])
            for worker in workers_of(pool):
                os.kill(worker, signal.SIGKILL)
            verdicts = []
            while pool.pending:
                verdicts += pool.poll(10.0)
            assert len(verdicts) == 20
            assert {verdict.status for verdict in verdicts} <= {"ok", "infra"}
        assert [verdict.status for verdict in pool.run_all([plain(n) for n in range(20)])] == ["ok"] * 20
        assert pool.stats()["restarts"] >= 2


def test_a_dead_broker_is_replaced_and_its_requests_repeated():
    with ExecutorPool(CONFIG) as pool:
        before = descendants(os.getpid())
        pool.submit([plain(number) for number in range(20)])
        os.kill(pool.broker_pids[0], signal.SIGKILL)
        verdicts = []
        while pool.pending:
            verdicts += pool.poll(20.0)
        assert sorted(int(verdict.id) for verdict in verdicts) == list(range(20))
        assert {verdict.status for verdict in verdicts} == {"ok"}
        wait_until(lambda: len(descendants(os.getpid())) <= len(before))


def test_a_broker_that_keeps_dying_ends_in_a_clear_error(monkeypatch):
    with ExecutorPool(CONFIG) as pool:
        monkeypatch.setattr("azr_jax.executor.pool.time.sleep", lambda seconds: None)
        with pytest.raises(UserError, match="keeps dying"):
            for _ in range(10):
                os.kill(pool.broker_pids[0], signal.SIGKILL)
                pool._links[0].process.wait()
                pool.poll(1.0)
                pool.submit([])


@pytest.fixture
def two_brokers(monkeypatch):
    monkeypatch.setattr("azr_jax.executor.sizing.WORKERS_PER_BROKER", 1)
    with ExecutorPool(CONFIG) as pool:
        assert len(pool.broker_pids) == 2
        yield pool


def test_brokers_share_the_work_by_program(two_brokers):
    requests = [plain(number % 40) for number in range(80)]
    assert [v.output for v in two_brokers.run_all(requests)] == [str(number % 40 + 1) for number in range(80)]
    stats = two_brokers.stats()
    assert stats["requests"] == 80 and stats["duplicates"] == 40, "equal requests meet, whichever broker has them"
    assert stats["children"] == 40 and stats["workers"] == 4
    assert all(link.stats["requests"] > 0 for link in two_brokers._links)
    pairs = (("1", "2"), ("2", "3"))
    judged = [Request(str(n), "judge", "induction", pairs=pairs, answer=plain(n).program) for n in range(4)]
    assert [verdict.correct for verdict in two_brokers.run_all(judged)] == [False, True, False, False]
    suspect = Request("s", "validate", program="def f(x):\n    return sorted(set(x))", input="[2, 1]")
    assert two_brokers.run_all([suspect])[0].output == "[1, 2]"


def test_the_death_of_a_broker_costs_the_other_nothing(two_brokers):
    victim, survivor = two_brokers._links
    two_brokers.submit([plain(number) for number in range(40)])
    assert victim.open and survivor.open
    pids = two_brokers.broker_pids
    os.kill(pids[0], signal.SIGKILL)
    verdicts = []
    while two_brokers.pending:
        verdicts += two_brokers.poll(20.0)
    assert sorted(int(verdict.id) for verdict in verdicts) == list(range(40))
    assert {verdict.status for verdict in verdicts} == {"ok"}
    assert two_brokers.broker_pids[0] != pids[0] and two_brokers.broker_pids[1] == pids[1]
    assert two_brokers.stats()["broker_restarts"] == 1


@pytest.mark.parametrize(
    ("workers", "shares"), [(1, [1]), (8, [8]), (9, [5, 4]), (64, [8] * 8), (54, [8] * 5 + [7] * 2)]
)
def test_workers_of_each_broker(workers, shares):
    assert broker_shares(workers) == shares


def test_missing_layers_are_named_in_a_warning(monkeypatch, caplog):
    """By the pool, hence in every command that runs programs."""
    monkeypatch.setattr(ExecutorPool, "layers", {"rlimits": True, "landlock": False, "no_clock": False})
    with ExecutorPool(CONFIG):
        pass
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "landlock, no_clock" in record.getMessage()
    caplog.clear()
    monkeypatch.setattr(ExecutorPool, "layers", {"rlimits": True})
    with ExecutorPool(CONFIG):
        pass
    assert not caplog.records


def test_what_waits_for_its_turn_is_not_asleep():
    with ExecutorPool(ExecutorConfig(workers=1, cpu_seconds=0.75, wall_seconds=1.0)) as pool:
        loops = [Request(str(n), "run", program=SPIN + f"  # {n}", input="1") for n in range(3)]
        found = [(v.status, v.reason) for v in pool.run_all(loops)]
    # Each needs three quarters of the wall limit alone on a core; where it gets next to none, ten times that ends, too.
    assert ("timeout", "cpu") in found and set(found) <= {("timeout", "cpu"), ("timeout", "wall")}


def test_close_leaves_nothing(tmp_path):
    before = descendants(os.getpid())
    descriptors = len(os.listdir("/proc/self/fd"))
    pool = ExecutorPool(CONFIG)
    pool.submit([Request("spin", "run", program=SPIN, input="1")] + [plain(n) for n in range(10)])
    pool.poll(1.0)
    assert descendants(os.getpid()) - before
    pool.close()
    pool.close()
    wait_until(lambda: descendants(os.getpid()) <= before)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_sigkill_of_the_trainer_takes_everything_along():
    code = (
        "import sys, time\n"
        "from azr_jax.config import ExecutorConfig\n"
        "from azr_jax.executor import ExecutorPool, Request\n"
        "pool = ExecutorPool(ExecutorConfig(workers=2, cpu_seconds=60, wall_seconds=60))\n"
        f"pool.submit([Request(str(n), 'run', program={SPIN!r}, input=str(n)) for n in range(4)])\n"
        "pool.poll(1.0)\n"
        "sys.stdout.write('up\\n')\n"
        "sys.stdout.flush()\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert trainer.stdout is not None and trainer.stdout.readline() == b"up\n"
    family = descendants(trainer.pid)
    assert len(family) >= 4  # broker, two workers, a spinning child
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_until(lambda: not [pid for pid in family if alive(pid)], seconds=5.0)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_no_zombies_and_no_growth(pool):
    pool.run_all([plain(number) for number in range(1000, 1200)])
    before = pool.stats()
    broker = Path(f"/proc/{pool.broker_pids[0]}/fd")
    descriptors = len(list(broker.iterdir()))
    pool.run_all([plain(number) for number in range(2000, 2600)])
    after = pool.stats()
    assert after["in_flight"] == after["queued"] == 0
    assert abs(after["worker_rss_mb"] - before["worker_rss_mb"]) < 2
    assert len(list(broker.iterdir())) <= descriptors + 3  # a worker more may have started
    states = [
        Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in descendants(pool.broker_pids[0])
    ]
    assert "Z" not in states


def test_no_secret_of_ours_in_the_processes(pool):
    os.environ["AZR_SECRET"] = "gold"
    try:
        with ExecutorPool(CONFIG) as other:
            for pid in descendants(other.broker_pids[0]) | {other.broker_pids[0]}:
                try:
                    assert b"gold" not in Path(f"/proc/{pid}/environ").read_bytes()
                except OSError:  # not dumpable: nobody may look; or a child that has ended
                    pass
    finally:
        del os.environ["AZR_SECRET"]
