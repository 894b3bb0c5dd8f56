"""Stopping a run without losing a step: SIGTERM (preemption, `kill`) and Ctrl-C.

The first signal only raises a flag; the loop looks at it between two blocks of decoding, gives up the step, which a
resumed run makes again, saves what came before it and leaves. Some things cannot look: an update that compiles for
minutes, or a long one. Who sends SIGTERM will not wait for them, so after a grace time a thread ends the process,
unless a checkpoint is being written; the last one is what the run goes on from.

A Ctrl-C after the first signal stops at once by KeyboardInterrupt: checkpoints are renamed into place when complete, so
the last one survives even that.

What this does not do: save anything itself, reach other hosts (azr_jax.dist.watch does, through `request`), or protect
from SIGKILL (the last checkpoint does).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

#: Exit code of a run that stopped early, by signal. A preempted run ended well: its checkpoint resumes it.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
#: Unless `--grace` says more, from SIGTERM to giving up what does not end by itself. Compute Engine and Kubernetes kill
#: after 30 s.
GRACE_SECONDS = 20.0


class GracefulStop:
    """Context manager: the first SIGINT or SIGTERM sets `requested`, a further SIGINT raises KeyboardInterrupt.

        with GracefulStop() as stop:
            while step < steps and not stop.requested:
                ...

    `busy` tells whether the process must not end although its time is up: a checkpoint is being written. `farewell` is
    called with the exit code before it does end. Outside the main thread, where Python allows no handlers, it does
    nothing and `requested` stays false.
    """

    def __init__(self, grace: float = GRACE_SECONDS) -> None:
        """grace: seconds from SIGTERM to the end of a process that is not `busy`."""
        self.busy: Callable[[], bool] = lambda: False
        self.farewell: Callable[[int], None] = lambda code: None
        self.grace = grace
        self._signal: signal.Signals | None = None
        self._told = False  # the user, that a signal came
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self._pipe: tuple[int, int] | None = None  # the system's own handler writes each signal's number into it

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""
        return self._signal is not None

    @property
    def received(self) -> signal.Signals | None:
        """The signal that asked for it."""
        return self._signal

    def request(self, number: signal.Signals) -> None:
        """As if this signal had come: another host was told to stop. Without effect if one came already."""
        if self._signal is None:
            self._signal = number
            if self._pipe is not None:
                os.write(self._pipe[1], bytes([number]))  # the same patience as for a signal of our own

    @property
    def exit_code(self) -> int:
        """0 if not stopped or stopped by SIGTERM, 130 if by Ctrl-C."""
        return EXIT_CODES[self._signal] if self._signal is not None else 0

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._handle)
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="stop", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._pipe[1])  # ends the thread, which closes the other end
            self._pipe = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if not self._told:
            self._told = True
            self._signal = self._signal or received
            hint = "; Ctrl-C again stops at once" if received is signal.SIGINT else ""
            self._say(f"{received.name}: saving, the run can be resumed{hint}")
        elif received is signal.SIGINT:
            # From here on the system's own default: a third Ctrl-C ends even code that never returns to Python.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._say("stopping at once; the last checkpoint is intact")
            raise KeyboardInterrupt

    def _watch(self, pipe: int) -> None:
        """In a thread of its own: hears of a signal even while the main one is deep inside compiled code."""
        with open(pipe, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == signal.SIGTERM:
                    break
            else:
                return
            self._signal = self._signal or signal.SIGTERM
            deadline = time.monotonic() + self.grace
            while time.monotonic() < deadline:
                if self.busy():
                    deadline = max(deadline, time.monotonic() + self.grace / 2)  # time to leave in order afterwards
                if select.select([signals], [], [], 0.1)[0] and not signals.read(1):
                    return  # the block was left in time
        self._say("what is under way takes too long and is given up; resumable: run the same command again")
        self.farewell(EXIT_CODES[signal.SIGTERM])
        os._exit(EXIT_CODES[signal.SIGTERM])

    def _say(self, message: str) -> None:
        # A handler may interrupt a write to the very stream it logs to, which Python refuses.
        with contextlib.suppress(RuntimeError):
            logger.warning(message)
