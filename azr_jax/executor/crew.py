"""The crew of workers: queues runs, hands them to workers, enforces deadlines, replaces what dies.

Two lanes share the processor. A child that is still busy after `_PATIENCE` counts as slow: it is reniced and no longer
holds one of the fast slots, so endless loops take their share of cores but never the queue. Verdict limits are in CPU
time, which does not depend on load; the wall limit is for sleepers, and a child that is starved rather than asleep gets
more of it. A fault of ours (dead worker, failed fork) is retried once and then reported as `infra`.
"""

from __future__ import annotations

import heapq
import math
import os
import selectors
import signal
import time
from collections import OrderedDict, deque
from itertools import islice

from azr_jax.executor import child as child_side
from azr_jax.executor.runs import Limits, Outcome, Run, read_outcome
from azr_jax.executor.sharing import shareable
from azr_jax.executor.worker import ChildProcess, Worker, task_sockets
from azr_jax.executor.zygote import FORK_FAILED, PID

SEEDS = 8  #: workers with hash seeds of their own that a suspicious program can be run on
_PATIENCE = 0.1  # seconds after which a child counts as slow
_STARVED_EXTENSION = 10  # times the wall limit that a starved child may take
_MAX_TOGETHER = 16  # runs in one child
_LOOK_AHEAD = 64  # groups looked at while the first ones wait for a worker to start
_RECYCLE_FORKS = 5000
_RECYCLE_MB = 200.0  # a worker holds about 20
_START_SECONDS = 30.0  # for a worker to say that it is ready
_MAX_FAILED_STARTS = 5  # in a row, then we give up
_RENICE = 10  # below ours
_LOWEST_PRIORITY = 19
_DROPPED = Outcome("infra", reason="dropped")  # nobody waits for it


class CrewFailure(Exception):
    """No worker can be started; the message says why."""


class Crew:
    """Workers, the queue before them and the clock above them. Driven by one event loop through `selector`.

    Every registered object's `data` is a function to call when it is readable; `tick` is to be called after each wait
    of at most `timeout()` seconds.
    """

    def __init__(self, size: int, limits: Limits, selector: selectors.BaseSelector, max_children: int) -> None:
        self.counts = dict.fromkeys(("children", "runs", "kills", "restarts", "retries", "recycled"), 0)
        self._limits = limits
        self._selector = selector
        self._size = max(2, size)  # agreement between runs needs two hash seeds, however few cores there are
        self._regular = size  # workers that get runs whenever there are any; more are kept for runs that must agree
        self._slots = max(2 * size, min(5 * size, max_children))  # with fewer, cores idle while we read results
        self._max_children = max(self._slots, max_children)
        self._queues: tuple[OrderedDict[object, deque[Run]], ...] = (OrderedDict(), OrderedDict())  # urgent, other
        self._alarms: list[tuple[float, int]] = []  # heap of (time, number of a child)
        self._children: dict[int, ChildProcess] = {}
        self._dispatching = False
        self._slow = self._number = self._serial = self._failed_starts = 0
        self.workers: list[Worker] = []
        for _ in range(self._size):
            self._hire()

    def submit(self, runs: list[Run]) -> None:
        """Queue runs; each one's `done` is called with its outcome, later and exactly once."""
        for run in runs:
            self._enqueue(run)
        self._dispatch()

    def timeout(self) -> float:
        """Seconds until something is due."""
        return max(0.0, self._alarms[0][0] - time.monotonic()) if self._alarms else 1.0

    def tick(self) -> None:
        """Do what is due: look at children that run long, at workers that do not start."""
        now = time.monotonic()
        while self._alarms and self._alarms[0][0] <= now:
            child = self._children.get(heapq.heappop(self._alarms)[1])
            if child is not None:
                self._inspect(child, now)
        for worker in [worker for worker in self.workers if not worker.ready]:
            if now - worker.started > _START_SECONDS:
                self._lose(worker)
        if len(self.workers) < self._size:
            self._hire()
        self._dispatch()

    @property
    def queued(self) -> int:
        """Runs that wait for a worker."""
        return sum(len(group) for queue in self._queues for group in queue.values())

    @property
    def busy(self) -> bool:
        """Whether runs wait for a worker."""
        return any(self._queues)

    @property
    def in_flight(self) -> int:
        """Children that are alive."""
        return len(self._children)

    def close(self) -> None:
        """Stop every worker."""
        for worker in self.workers:
            self._selector.unregister(worker.control)
            worker.stop()
        self.workers.clear()

    # Queue

    def _enqueue(self, run: Run) -> None:
        queue = self._queues[0 if run.urgent else 1]
        queue.setdefault(run if run.group is None else run.group, deque()).append(run)

    def _dispatch(self) -> None:
        if self._dispatching:  # a run that failed to start made its request ask for more
            return
        self._dispatching = True
        try:
            for queue in self._queues:
                for key in list(islice(queue, _LOOK_AHEAD)) if self._has_slot() else []:
                    group = queue[key]
                    self._dispatch_group(group)
                    if not group:
                        del queue[key]
                    if not self._has_slot():
                        return
        finally:
            self._dispatching = False

    def _dispatch_group(self, group: deque[Run]) -> None:
        while group and self._has_slot():
            if not group[0].wanted():
                group.popleft().done(_DROPPED)
                continue
            worker = self._choose(group[0].used)
            if worker is None:
                return
            together = len(group) > 1 and shareable(group[0].program)
            self._start(worker, [group.popleft() for _ in range(min(len(group), _MAX_TOGETHER) if together else 1)])

    def _has_slot(self) -> bool:
        return len(self._children) - self._slow < self._slots and len(self._children) < self._max_children

    def _choose(self, used: set[int] | None) -> Worker | None:
        """The least busy worker not in `used`, two children counting as one; None if one has to start first.

        Two at a time keep a worker's memory in the cache, where one each would take turns in pushing the other's out.
        For the same reason no more workers than cores get runs, as long as `used` leaves the choice.
        """
        able = [worker for worker in self.workers if worker.ready and not worker.retired]
        fresh = [worker for worker in able if not used or worker.serial not in used]
        if fresh:
            spare = able[self._regular :]
            return min(fresh, key=lambda worker: (worker in spare, len(worker.children) // 2))
        if all(worker.ready for worker in self.workers):  # none is on its way
            if able and len(self.workers) >= max(SEEDS, self._size):
                min(able, key=lambda worker: len(worker.children)).retired = True
                self._release_retired()
            self._hire()
        return None

    # Workers

    def _hire(self) -> None:
        self._serial += 1
        try:
            worker = Worker(self._serial, self._limits.memory_mb)
        except OSError as error:  # no memory or no process to be had; `tick` tries again
            self._start_failed(error.strerror or str(error))
            return
        self.workers.append(worker)
        self._selector.register(worker.control, selectors.EVENT_READ, lambda: self._listen(worker))

    def _listen(self, worker: Worker) -> None:
        if worker not in self.workers:
            return
        was_ready = worker.ready
        reports = worker.receive()
        if reports is None:
            self._lose(worker)
            return
        if worker.ready and not was_ready:
            self._failed_starts = 0
        for number, status, pid in reports:
            child = worker.children.get(number)
            if child is None:
                continue
            if status == PID:
                child.pid = pid
                self._slow_down(child)
            else:
                self._finish(child, status)
        self._dispatch()

    def _lose(self, worker: Worker) -> None:
        """A worker died or never started: run again what it had, elsewhere."""
        children = list(worker.children.values())
        self._selector.unregister(worker.control)
        self.workers.remove(worker)
        worker.stop()
        self.counts["restarts"] += 1
        if not worker.ready:
            self._start_failed(f"exit status {worker.process.returncode}")
        for child in children:
            self._forget(child)
            for run in child.runs:
                self._fault(run, "worker_died")
        if len(self.workers) < self._size:
            self._hire()

    def _start_failed(self, why: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise CrewFailure(f"worker processes do not start ({why}); free memory or processes")

    def _fault(self, run: Run, reason: str) -> None:
        """Our own fault: once more, then give up."""
        if run.retried:
            run.done(Outcome("infra", reason=reason))
            return
        run.retried += 1
        self.counts["retries"] += 1
        self._enqueue(run)

    def _release_retired(self) -> None:
        for worker in [worker for worker in self.workers if worker.retired and not worker.children]:
            self._selector.unregister(worker.control)
            self.workers.remove(worker)
            worker.stop()
            self.counts["recycled"] += 1
        for _ in range(self._size - len(self.workers)):
            self._hire()

    # Children

    def _start(self, worker: Worker, runs: list[Run]) -> None:
        self._number = (self._number + 1) % 2**32
        try:
            ours, theirs = task_sockets()
        except OSError:  # out of descriptors
            self._split_or_fault(runs)
            return
        cpu_cap = math.ceil(self._limits.cpu_seconds * len(runs)) + 1  # a backstop; `_inspect` is exact
        child = ChildProcess(self._number, worker, runs, ours, self._limits.output_chars, cpu_cap)
        task = child_side.pack_task(runs[0].program, [run.arguments for run in runs], self._limits.output_chars)
        try:
            if ours.send(task) < len(task):  # before the fork, so that the child never waits for us
                raise BlockingIOError
            worker.fork(child, theirs, len(task))
        except OSError:
            ours.close()
            self._split_or_fault(runs)
            return
        finally:
            theirs.close()
        if runs[0].used is not None:
            runs[0].used.add(worker.serial)
        self._children[child.number] = child
        self.counts["children"] += 1
        if len(runs) > 1:  # a single outcome fits the socket and is read at the end
            child.heard = True
            self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(child))
        heapq.heappush(self._alarms, (child.started + _PATIENCE, child.number))

    def _split_or_fault(self, runs: list[Run]) -> None:
        """The task did not fit its socket, or the worker does not answer."""
        for run in runs:
            if len(runs) > 1:
                run.group = None
                self._enqueue(run)
            else:
                self._fault(run, "worker_stuck")

    def _hear(self, child: ChildProcess) -> None:
        if child.number not in self._children:  # it ended in this very round of events
            return
        if child.receive():
            child.progress = time.monotonic()
            if child.pid:
                child.cpu_before = child.cpu_seconds() or child.cpu_before
        else:
            self._deafen(child)  # it has said its last: a closed socket would wake us for ever
        if child.reply.broken:
            self._kill(child, "protocol")

    def _deafen(self, child: ChildProcess) -> None:
        if child.heard:
            child.heard = False
            self._selector.unregister(child.link)

    def _slow_down(self, child: ChildProcess) -> None:
        """Now that the pid is known: lower its priority, look at its CPU clock from here on."""
        try:
            lower = os.getpriority(os.PRIO_PROCESS, 0) + _RENICE
            os.setpriority(os.PRIO_PROCESS, child.pid, min(lower, _LOWEST_PRIORITY))
        except OSError:  # it just ended
            pass
        self._inspect(child, time.monotonic())

    def _inspect(self, child: ChildProcess, now: float) -> None:
        """Kill a child that is over a limit, or set the time of the next look."""
        limits = self._limits
        if child.killed:
            return
        if not child.slow:
            child.slow = True
            self._slow += 1
            child.worker.ask_pid(child)
        wall = now - child.progress
        total = child.cpu_seconds()
        if total is None:  # not known yet, or the child has ended and its report is on its way, or not Linux
            if wall > limits.wall_seconds:
                self._kill(child, "wall")
            else:
                heapq.heappush(self._alarms, (now + limits.wall_seconds / 4, child.number))
            return
        cpu = total - child.cpu_before
        patience = limits.wall_seconds * _STARVED_EXTENSION
        if cpu >= limits.cpu_seconds:
            self._kill(child, "cpu")
        elif wall >= limits.wall_seconds and (child.asleep(cpu, wall) or wall >= patience):
            self._kill(child, "wall")
        else:
            # One thread cannot use more CPU time than wall time passes.
            left = min(limits.cpu_seconds - cpu, max(limits.wall_seconds - wall, 0.05))
            heapq.heappush(self._alarms, (now + max(left, 0.005), child.number))

    def _kill(self, child: ChildProcess, why: str) -> None:
        if not child.killed:
            child.killed = why
            self.counts["kills"] += 1
            child.worker.kill(child)

    def _forget(self, child: ChildProcess) -> None:
        self._deafen(child)
        child.link.close()
        self._slow -= child.slow
        self._children.pop(child.number, None)
        child.worker.children.pop(child.number, None)

    def _finish(self, child: ChildProcess, status: int) -> None:
        """A child was reaped: settle each of its runs."""
        child.receive()
        self._forget(child)
        worker = child.worker
        if status == FORK_FAILED:
            for run in child.runs:
                self._fault(run, "fork_failed")
        else:
            self._settle_all(child, status)
        if worker.forks >= _RECYCLE_FORKS or (worker.forks % 500 == 0 and worker.rss_mb() > _RECYCLE_MB):
            worker.retired = True
        if worker.retired:
            self._release_retired()

    def _settle_all(self, child: ChildProcess, status: int) -> None:
        """Give every run of an ended child its outcome, or another turn."""
        reply, runs, limit = child.reply, child.runs, self._limits.output_chars
        frames = reply.frames
        if frames and frames[0][0] == child_side.SYNTAX:
            frames = frames[:1] * len(runs)
        complete = reply.finished and not reply.broken and status == 0
        if reply.broken or (len(runs) == 1 and not complete):
            frames = []  # without the last frame and a clean exit nothing a lone child said counts
        for run, frame in zip(runs, frames, strict=False):
            self._settle(run, read_outcome(*frame, limit, child.worker.serial))
        rest = runs[len(frames) :]
        if rest:
            outcome = self._post_mortem(child, status)
            if len(frames) and outcome.status != "timeout":
                rest[0].group = None  # earlier company may have caused it: once more, alone
                self._enqueue(rest[0])
            else:
                self._settle(rest[0], outcome)
        for run in rest[1:]:  # these never had their turn
            self._enqueue(run)

    def _settle(self, run: Run, outcome: Outcome) -> None:
        self.counts["runs"] += 1
        run.done(outcome)

    def _post_mortem(self, child: ChildProcess, status: int) -> Outcome:
        """Why a child ended without a complete result."""
        serial = child.worker.serial
        if child.killed in ("cpu", "wall"):
            return Outcome("timeout", reason=child.killed, worker=serial)
        if child.killed:
            return Outcome("crashed", reason="malformed_result", worker=serial)
        ended_by = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "no_result"
        if ended_by == "SIGXCPU":  # the kernel's limit on CPU time, should we come too late
            return Outcome("timeout", reason="cpu", worker=serial)
        if ended_by == "SIGKILL":
            return Outcome("memory", reason="killed_by_system", worker=serial)
        return Outcome("crashed", reason=ended_by, worker=serial)
