"""What the hosts of a run say to each other: bytes from each to all, and one question.

Every host runs the same program and computes whatever follows from what all know; only what one of them alone has seen
is exchanged. An exchange has two parts. First each host leaves a note in the key-value store of JAX's coordination
service: where in the run it is, how many bytes it brings, and what must be the same everywhere. A host that waits for a
note waits in Python, where news of a stop or of a dead host can reach it (watch.py). When all notes are there, nobody
has to wait long, and the bytes go over the devices, in pieces of one size: one small program, little memory. The store
alone would be simpler and several times slower: it compresses, and all goes through host 0 (benchmarks/hosts.py).

One host is not a special case for those who call this: it hears what it said.
"""

from __future__ import annotations

import atexit
import json
import logging
import platform
import time
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Any
from uuid import uuid4

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from azr_jax import __version__
from azr_jax.config import Config
from azr_jax.dist.watch import ADVICE, GONE, Stop, Store, Watch, quietly
from azr_jax.errors import UserError

log = logging.getLogger(__name__)

PIECE = 1 << 20  # bytes a host brings at a time; every device holds as many pieces as there are hosts
SHARED_SECONDS = 20.0  # a network file system may show a new file that much later
PATIENCE_SECONDS = 300.0  # between two warnings that a host is being waited for


def facts(config: Config) -> dict[str, str]:
    """What must be the same on all hosts, or they would compute different things: versions, devices, configuration.

    Not the path of the model: its files are compared instead.
    """
    found = {"azr_jax": __version__, "jax": jax.__version__, "numpy": np.__version__}
    found |= {"Python": platform.python_version(), "devices": str(jax.local_device_count())}
    for name, value in asdict(config).items():
        keys = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        found |= {key: repr(part) for key, part in keys.items() if key not in ("executor.workers", "model")}
    return found


def require_shared(folder: Path, hosts: Hosts) -> None:
    """UserError, on all hosts, unless this is one and the same folder on all of them. Host 0 has made it."""
    if hosts.count == 1:
        return
    marker = folder / ".shared"
    said = uuid4().hex if hosts.leads else ""
    if hosts.leads:
        marker.write_text(said)
    said = hosts.tell("the run folder", said)[0]
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := _content(marker) == said) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [host for host, answer in enumerate(hosts.tell("who sees it", str(seen))) if answer != "True"]
    if hosts.leads:
        marker.unlink()
    if blind:
        where = f"what host 0 wrote to {folder} cannot be read on host {', '.join(map(str, blind))}"
        raise UserError(f"{where}; run_dir has to be on storage that all hosts share, or on a bucket (gs://...)", 2)


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class Hosts:
    """This host among all of them. A context manager: leaving it in order is what all do together.

    index: of this host. count: of hosts. Methods that ask the others must be called by all hosts in the same order.
    """

    def __init__(self, index: int = 0, count: int = 1, store: Store | None = None) -> None:
        """store: where notes are left; None for one host."""
        self.index, self.count = index, count
        self._store = store
        self._watch = Watch(store, index, count) if store is not None else None
        self._stop: Stop | None = None
        self._met = 0

    @property
    def leads(self) -> bool:
        """Whether this is the host that writes and reports."""
        return self.index == 0

    def owns(self, place: int) -> bool:
        """Whether the work numbered `place` is this host's: every host has every `count`-th."""
        return place % self.count == self.index

    def relay(self, stop: Stop) -> None:
        """A stop of one host stops all, within seconds."""
        self._stop = stop
        if self._watch is not None:
            self._watch.relay(stop)
            stop.farewell = self._watch.farewell

    def gather(self, what: str, data: bytes | None, **same: str) -> list[bytes] | None:
        """What every host gives, in the order of hosts; None on all of them if one gave None (it has to stop).

        what: names the exchange, the same everywhere. same: facts that must be the same everywhere.
        UserError, on all hosts: they are not at the same exchange, or a fact differs.
        """
        notes = self._meet(what, {"size": None if data is None else len(data)}, same)
        sizes = [note["size"] for note in notes]
        if data is None or None in sizes:
            return None
        return self._move(data, sizes)

    def agree(self, what: str, flag: bool, **same: str) -> bool:
        """Whether any host says yes. UserError as `gather`."""
        return any(note["flag"] for note in self._meet(what, {"flag": flag}, same))

    def tell(self, what: str, text: str) -> list[str]:
        """A short text from every host, in the order of hosts."""
        return [note["text"] for note in self._meet(what, {"text": text}, {})]

    def _meet(self, what: str, note: dict[str, Any], same: dict[str, str]) -> list[dict[str, Any]]:
        """The notes of all hosts, in their order. If one of them was told to stop, all are."""
        if self._store is None:
            return [note]
        self._met += 1
        stop = self._stop.received.name if self._stop is not None and self._stop.received is not None else None
        note |= {"what": what, "same": same, "stop": stop}
        self._store.key_value_set(f"azr_jax/note/{self._met}/{self.index}", json.dumps(note))
        notes = [json.loads(self._read(host, what)) for host in range(self.count)]
        # Who has left a note of this meeting has read all of the one before.
        self._store.key_value_delete(f"azr_jax/note/{self._met - 1}/{self.index}")
        for host, other in enumerate(notes):
            if other["what"] != notes[0]["what"]:
                there = f"host {host} is at {other['what']}, host 0 at {notes[0]['what']}"
                raise UserError(f"the hosts have come apart: {there}. {ADVICE}")
            for name in sorted(other["same"].keys() | notes[0]["same"].keys()):
                value, first = other["same"].get(name), notes[0]["same"].get(name)
                if value != first:
                    there = f"{name} is {value} on host {host} and {first} on host 0"
                    raise UserError(f"the hosts have come apart ({what}): {there}. {ADVICE}")
            if other["stop"] is not None and self._stop is not None:
                self._stop.request(Signals[other["stop"]])
        return notes

    def _read(self, host: int, what: str) -> str:
        assert self._store is not None
        began = warned = time.monotonic()
        while True:
            try:
                return self._store.blocking_key_value_get(f"azr_jax/note/{self._met}/{host}", 1000)
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise UserError(f"host 0, which coordinates all others, is gone. {ADVICE}", GONE) from error
            if time.monotonic() - warned > PATIENCE_SECONDS:
                warned = time.monotonic()
                log.warning("%s: host %d is being waited for since %.0f s", what, host, warned - began)

    def _move(self, data: bytes, sizes: list[int]) -> list[bytes]:
        """The bytes of all hosts, `sizes` of them."""
        if self.count == 1:
            return [data]
        mine = np.zeros(-(-max(sizes) // PIECE) * PIECE, np.uint8)
        mine[: len(data)] = np.frombuffer(data, np.uint8)
        parts = [process_allgather(piece) for piece in mine.reshape(-1, PIECE)]  # each [hosts, PIECE]
        return [b"".join(part[host].tobytes() for part in parts)[:size] for host, size in enumerate(sizes)]

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is None:
            return
        if error is None:
            self._meet("the end", {}, {})
            self._watch.close()
            jax.distributed.shutdown()
        else:
            interrupted = isinstance(error, KeyboardInterrupt)
            code = 130 if interrupted else getattr(error, "exit_code", 1)
            self._watch.fail("interrupted" if interrupted else str(error) or type(error).__name__, code)
            atexit.register(quietly, code)  # JAX's own way out would wait for the others
