"""Stopping a run without losing a step: SIGTERM (preemption, `kill`) and Ctrl-C.

The first signal only raises a flag; the loop looks at it between two blocks of decoding, gives up the step, which a
resumed run makes again, saves what came before it and leaves. A Ctrl-C after that stops at once by KeyboardInterrupt:
checkpoints are renamed into place when complete, so the last one survives even that.

What this does not do: save anything itself, reach other hosts (the loop must agree on the flag across processes before
acting on it), or protect from SIGKILL (the last checkpoint does).
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

#: Exit code of a run that stopped early, by signal. A preempted run ended well: its checkpoint resumes it.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


class GracefulStop:
    """Context manager: the first SIGINT or SIGTERM sets `requested`, a further SIGINT raises KeyboardInterrupt.

        with GracefulStop() as stop:
            while step < steps and not stop.requested:
                ...

    Outside the main thread, where Python allows no handlers, it does nothing and `requested` stays false.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        """0 if not stopped or stopped by SIGTERM, 130 if by Ctrl-C."""
        return EXIT_CODES[self._signal] if self._signal is not None else 0

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._signal is None:
            self._signal = received
            hint = "; Ctrl-C again stops at once" if received is signal.SIGINT else ""
            self._say(f"{received.name}: saving, the run can be resumed{hint}")
        elif received is signal.SIGINT:
            # From here on the system's own default: a third Ctrl-C ends even code that never returns to Python.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._say("stopping at once; the last checkpoint is intact")
            raise KeyboardInterrupt

    def _say(self, message: str) -> None:
        # A handler may interrupt a write to the very stream it logs to, which Python refuses.
        with contextlib.suppress(RuntimeError):
            logger.warning(message)
