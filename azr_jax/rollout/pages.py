"""Who holds which page of the KV cache: reference counts and prompts that were prefilled once. No arrays here.

A page is a fixed number of token places in every layer's cache. Full pages of a prompt are shared by all sequences
that continue it; the last, partly filled one is copied for each. Page 0 belongs to nobody: rows of a batch that have
nothing to write, write there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """Pages 1 to count - 1, each with the number of its holders. ValueError: a page given back that nobody holds."""

    def __init__(self, count: int) -> None:
        self.holders = [0] * count
        self._free = list(range(count - 1, 0, -1))

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages for one holder. ValueError if there are not so many."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> list[int]:
        """The same pages for one more holder."""
        pages = list(pages)
        for page in pages:
            if not self.holders[page]:
                raise ValueError(f"page {page} is free and cannot be shared")
            self.holders[page] += 1
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """One holder lets go of each of `pages`."""
        for page in pages:
            if not self.holders[page]:
                raise ValueError(f"page {page} given back twice")
            self.holders[page] -= 1
            if not self.holders[page]:
                self._free.append(page)


class Prefixes:
    """Pages of prompts that were prefilled, the least recently used first; dropped when their pages are needed."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()

    def __contains__(self, prompt: tuple[int, ...]) -> bool:
        return prompt in self._pages

    def find(self, prompt: tuple[int, ...]) -> list[int]:
        """The pages of a known prompt, which becomes the most recently used. KeyError: unknown."""
        self._pages.move_to_end(prompt)
        return self._pages[prompt]

    def add(self, prompt: tuple[int, ...], pages: list[int]) -> None:
        """Remember a prompt; its pages, taken from the pool, are held from now on."""
        self._pages[prompt] = pages

    def make_room(self, count: int) -> bool:
        """Forget prompts, the least recently used first, until `count` pages are free.

        False, and nothing is forgotten, if that is not enough: pages that sequences hold as well stay taken.
        """
        if self._pool.free >= count:
            return True
        idle = {name: self._alone(pages) for name, pages in self._pages.items()}
        if self._pool.free + sum(idle.values()) < count:
            return False
        for name in [name for name, pages in idle.items() if pages]:
            self._pool.give_back(self._pages.pop(name))
            if self._pool.free >= count:
                break
        return True

    def _alone(self, pages: list[int]) -> int:
        """How many of `pages` nobody else holds."""
        return sum(self._pool.holders[page] == 1 for page in pages)

    def clear(self) -> None:
        """Forget all: the weights changed."""
        while self._pages:
            self._pool.give_back(self._pages.popitem()[1])
