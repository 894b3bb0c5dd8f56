"""First signal: a flag. Second Ctrl-C: at once. Handlers are put back."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from azr_jax.signals import GracefulStop

BOTH = (signal.SIGINT, signal.SIGTERM)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in BOTH]
    yield
    assert [signal.getsignal(number) for number in BOTH] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_first_signal_raises_a_flag_only(number, code, caplog):
    with GracefulStop() as stop:
        assert not stop.requested and stop.exit_code == 0
        with caplog.at_level(logging.WARNING):
            send(number)
        assert stop.requested and stop.exit_code == code
    assert stop.requested and stop.exit_code == code, "still known after the block"
    assert len(caplog.messages) == 1 and number.name in caplog.text and "resumed" in caplog.text


def test_the_second_ctrl_c_stops_at_once_and_the_third_is_the_systems():
    with pytest.raises(KeyboardInterrupt), GracefulStop() as stop:
        send(signal.SIGINT)
        assert stop.requested
        try:
            send(signal.SIGINT)
        finally:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert stop.exit_code == 130


def test_a_cluster_that_repeats_sigterm_changes_nothing():
    with GracefulStop() as stop:
        for _ in range(3):
            send(signal.SIGTERM)
        assert stop.requested and stop.exit_code == 0


def test_ctrl_c_after_sigterm_does_not_wait():
    with pytest.raises(KeyboardInterrupt), GracefulStop():
        send(signal.SIGTERM)
        send(signal.SIGINT)


def test_handlers_are_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), GracefulStop():
        1 / 0  # noqa: B018


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def work():
        with GracefulStop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_stop_elsewhere_is_a_stop_here():
    with GracefulStop() as stop:
        stop.request(signal.SIGTERM)
        assert stop.requested and stop.received is signal.SIGTERM and stop.exit_code == 0
        send(signal.SIGTERM)
        assert stop.requested


CHILD = """
import hashlib, logging, sys, time
from azr_jax.signals import GracefulStop
logging.basicConfig(format="%(message)s")
with GracefulStop(grace=4.0) as stop:
    until = time.monotonic() + 5.0
    if sys.argv[1] == "saves":
        stop.busy = lambda: time.monotonic() < until
    print("ready", flush=True)
    if sys.argv[1] == "compiles":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    while not stop.requested or stop.busy():
        time.sleep(0.01)
    print("saved", flush=True)
"""


@pytest.mark.parametrize(("how", "output"), [("listens", "saved\n"), ("saves", "saved\n"), ("compiles", "")])
def test_what_cannot_listen_is_given_up_but_no_save(how, output):
    """Minutes inside a C function, where Python's handlers do not run, stand in for compiling an update."""
    command = [sys.executable, "-c", CHILD, how]
    root = Path(__file__).parents[1]
    child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.terminate()  # the first is over at once, the second after the time is up, the third never
    printed, errors = child.communicate()
    assert child.returncode == 0 and printed == output
    assert ("resumable" in errors) == (how == "compiles") and "Traceback" not in errors
