"""Staying together: a stop, an error or a death on one host reaches all the others, whatever they are doing.

Two threads a host, beside the main one, which may be waiting inside a collective for somebody who will never come. One
says every second that this host is alive, and reads what the others say; the other looks at how old that news is. All
of it goes through the key-value store of JAX's coordination service, which host 0 keeps. A stop becomes a stop here, as
if the signal had come here; an error elsewhere, or silence, ends this process with one line and a code that is not 0.

What this does not do: notice a host that is alive and stuck (its threads go on; the others warn that they wait), or go
on without one. When host 0 goes, JAX itself ends the other processes, and its own lines may come before ours, or, on a
machine that is very busy, instead of them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
#: Silence after which a host counts as dead. Longer than a thread is ever kept from running, and shorter than JAX's own
#: patience (100 s), which ends in an abort.
DEAD_SECONDS = 40.0
#: Exit code of a host that could go on if another one were there (EX_TEMPFAIL of sysexits.h): try again.
GONE = 75
FAREWELL_SECONDS = 5.0  # how long host 0 waits for the others to learn of an end
ROOM = "azr_jax/live/"
ADVICE = "Start the same command on all hosts again: the run resumes from its last checkpoint"


class Store(Protocol):
    """The key-value store: what is used of jaxlib's DistributedRuntimeClient. Errors are RuntimeError."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def key_value_delete(self, key: str) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


class Stop(Protocol):
    """What `relay` shares with the other hosts (azr_jax.signals.GracefulStop)."""

    farewell: Callable[[int], None]

    @property
    def received(self) -> signal.Signals | None: ...

    @property
    def exit_code(self) -> int: ...

    def request(self, number: signal.Signals) -> None: ...


class Watch:
    """Looks after host `index` of `count`; starts at once, ends with `close`."""

    def __init__(self, store: Store, index: int, count: int) -> None:
        self._store, self._index, self._count = store, index, count
        self._seen = {host: ("", time.monotonic()) for host in range(count)}  # what each said last, and since when
        self._stop: Stop | None = None
        self._stop_is_known = False
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._look)]
        for thread in self._threads:
            thread.start()

    def relay(self, stop: Stop) -> None:
        """From now on a stop here stops all hosts, and the other way round."""
        self._stop = stop

    def close(self) -> None:
        """All hosts are about to end in order. Silence means nothing any more."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def farewell(self, code: int) -> None:
        """This host is about to end, told to stop and unable to save: so do all others."""
        self._end("it was told to stop", code)

    def fail(self, message: str, code: int) -> None:
        """This host cannot go on, for this reason: all others end too. Returns when they know, or does not return.

        If it cannot go on only because another host has gone, that is what is said instead, by ending here and now. So
        each of the others has to say that it is alive after what is there already, which a dead one may have left.
        """
        others = [host for host in self._seen if host != self._index]
        try:
            left = {key: int(value) for key, value in self._store.key_value_dir_get(ROOM) if key[len(ROOM) :].isdigit()}
        except RuntimeError:  # host 0 is gone; `_beat` ends this process
            left = {f"{ROOM}{host}": sys.maxsize for host in others}
        while any(int(self._seen[host][0] or 0) <= left.get(f"{ROOM}{host}", 0) for host in others):
            time.sleep(BEAT_SECONDS / 10)
        self._end(message, code)
        self._closed.set()

    def _beat(self) -> None:
        beats = 0
        while not self._closed.is_set():
            try:
                beats += 1
                self._store.key_value_set(f"{ROOM}{self._index}", str(beats), allow_overwrite=True)
                if self._stop is not None and self._stop.received is not None and not self._stop_is_known:
                    self._store.key_value_set(ROOM + "stop", self._stop.received.name, allow_overwrite=True)
                    self._stop_is_known = True
                for key, value in self._store.key_value_dir_get(ROOM):
                    self._hear(key.removeprefix(ROOM), value)
                # Nobody ever writes this: waiting for it is a sleep that ends at once when host 0 does.
                self._store.blocking_key_value_get(ROOM + "never", int(1000 * BEAT_SECONDS))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error) and not self._closed.is_set():
                    leave(f"host 0, which coordinates all others, is gone. {ADVICE}", self._code())

    def _hear(self, key: str, value: str) -> None:
        if key == "end":
            host, message, code = json.loads(value)
            if host != self._index:
                self._end(message, code)
                leave(f"host {host} has stopped: {message}", code)
        elif key == "stop":
            self._stop_is_known = self._stop is not None
            if self._stop is not None and self._stop.received is None:
                log.warning("another host was told to stop")
                self._stop.request(signal.Signals[value])
        elif key.isdigit() and value != self._seen[int(key)][0]:
            self._seen[int(key)] = value, time.monotonic()

    def _look(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            silent = [host for host, (_, since) in self._seen.items() if time.monotonic() - since > DEAD_SECONDS]
            if 0 in silent:  # and with it what all others say
                message = f"host 0, which coordinates all others, does not answer since {DEAD_SECONDS:.0f} s. {ADVICE}"
                leave(message, self._code())
            if silent:
                who = f"host {silent[0]} has" if len(silent) == 1 else f"hosts {', '.join(map(str, silent))} have"
                message = f"{who} been silent for {DEAD_SECONDS:.0f} s (killed, or cut off). {ADVICE}"
                self._end(message, self._code(), len(silent))
                leave(message, self._code())

    def _code(self) -> int:
        """Of an end that is another host's: one that was told to stop and did, before us, is no failure."""
        return self._stop.exit_code if self._stop is not None and self._stop.received is not None else GONE

    def _end(self, message: str, code: int, dead: int = 0) -> None:
        """All hosts learn of this end, or of the one that was there before. Host 0, who keeps the store, goes last.

        dead: hosts that cannot learn of anything.
        """
        with contextlib.suppress(RuntimeError):  # there was one before
            self._store.key_value_set(ROOM + "end", json.dumps([self._index, message, code]))
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{ROOM}gone/{self._index}", "")
            deadline = time.monotonic() + FAREWELL_SECONDS
            while self._index == 0 and time.monotonic() < deadline:
                told = sum(key.startswith(ROOM + "gone/") for key, _ in self._store.key_value_dir_get(ROOM))
                if told + dead >= self._count:
                    return
                time.sleep(BEAT_SECONDS / 10)


def leave(message: str, code: int = 1) -> NoReturn:
    """End this process, whatever its main thread is doing, with one line on stderr. Code 0: the run was told to stop."""
    line = f"error: {message}" if code else f"{message}; resumable: run the same command again"
    try:
        sys.stdout.flush()
        os.write(2, f"azr-jax: {line}\n".encode())
    finally:  # also where nobody can be told: a full disk, a closed pipe
        os._exit(code)


def quietly(code: int) -> NoReturn:
    """For `atexit`: end with this code without taking leave of hosts that are not there any more."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
