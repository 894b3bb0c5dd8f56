"""Several hosts as threads of one process: what one says all hear, and nothing else is shared."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

from azr_jax.dist.hosts import Hosts
from azr_jax.stream import Stopped


class InThreads(Hosts):
    """Hosts that are threads of one process; they take turns with the engine."""

    def __init__(self, index: int, count: int, said: list[bytes | None], barrier: Barrier, turn: Lock) -> None:
        super().__init__(index, count)
        self.said, self.barrier, self.turn = said, barrier, turn

    def gather(self, what: str, data: bytes | None, **same: str) -> list[bytes] | None:
        self.turn.release()
        self.said[self.index] = data
        self.barrier.wait()
        heard = list(self.said)
        self.barrier.wait()
        self.turn.acquire()
        return None if None in heard else heard  # type: ignore[return-value]

    def tell(self, what: str, text: str) -> list[str]:
        heard = self.gather(what, text.encode())
        assert heard is not None
        return [data.decode() for data in heard]


def on_hosts(count: int, play: Callable[[Hosts], object]) -> list[object]:
    """What `play` returns on each of so many hosts; an exception is returned too."""
    said: list[bytes | None] = [None] * count
    barrier, turn = Barrier(count), Lock()

    def one(index: int) -> object:
        with turn:
            try:
                return play(InThreads(index, count, said, barrier, turn))
            except Stopped as stopped:
                return stopped

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))
