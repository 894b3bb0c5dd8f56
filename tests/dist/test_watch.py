"""Who is alive and who is not, by what each host leaves in a store; the store here is a dict."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest

from azr_jax.dist import watch
from azr_jax.dist.watch import GONE, ROOM, Watch


class Memory:
    """A key-value store of this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        if not allow_overwrite and key in self.values:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in list(self.values.items()) if name.startswith(key)]

    def key_value_delete(self, key: str) -> None:
        self.values.pop(key, None)

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        time.sleep(timeout_in_ms / 1000)
        raise RuntimeError("DEADLINE_EXCEEDED")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """What the watch ends the process with; instead of that, its thread goes no further."""
    found: list[tuple[str, int]] = []

    def leave(message: str, code: int = 1) -> NoReturn:
        found.append((message, code))
        threading.Event().wait()
        raise AssertionError

    monkeypatch.setattr(watch, "leave", leave)
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(watch, "FAREWELL_SECONDS", 0.0)
    yield found


def test_what_a_dead_host_left_behind_is_no_sign_of_life(ends: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host 1 spoke, died, and host 0 failed for want of it, all before host 0 had read what it said."""
    monkeypatch.setattr(watch, "DEAD_SECONDS", 2.0)
    store = Memory()
    store.key_value_set(ROOM + "1", "1")
    guard = Watch(store, 0, 2)
    while guard._seen[1][0] != "1":
        time.sleep(0.01)
    store.key_value_set(ROOM + "1", "2", allow_overwrite=True)
    failing = threading.Thread(target=guard.fail, args=("connection reset by peer", 1), daemon=True)
    failing.start()
    while not ends:
        assert failing.is_alive()
        time.sleep(0.01)
    ((message, code),) = ends
    assert code == GONE and message.startswith("host 1 has been silent")
    said = json.loads(store.values[ROOM + "end"])
    assert said == [0, message, GONE] and failing.is_alive()
    guard._seen[1] = "3", time.monotonic()  # lets the thread go
    failing.join()


def test_a_death_is_known_everywhere_within_a_minute() -> None:
    assert watch.DEAD_SECONDS + watch.FAREWELL_SECONDS + 3 * watch.BEAT_SECONDS < 60


def test_an_error_of_this_host_is_told_to_those_alive(ends: list) -> None:
    store, over = Memory(), threading.Event()

    def beat() -> None:
        for n in range(1, 1_000_000):
            store.key_value_set(ROOM + "1", str(n), allow_overwrite=True)
            if over.wait(0.05):
                return

    other = threading.Thread(target=beat)
    other.start()
    try:
        Watch(store, 0, 2).fail("a bug", 1)
    finally:
        over.set()
        other.join()
    assert json.loads(store.values[ROOM + "end"]) == [0, "a bug", 1] and not ends


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (0, "azr-jax: host 1 has stopped: it was told to stop; resumable: run the same command again\n"),
        (GONE, "azr-jax: error: host 1 has stopped: it was told to stop\n"),
    ],
)
def test_a_stop_is_no_error_and_can_be_resumed(code: int, line: str) -> None:
    program = f"from azr_jax.dist.watch import leave; leave('host 1 has stopped: it was told to stop', {code})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, line)
