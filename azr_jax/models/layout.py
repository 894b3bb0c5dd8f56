"""How one weight lies in a Hugging Face checkpoint and how it lies here, both ways: the rows of a family's table.

A row is a key and, for each axis of their array, which of our axes it merges and in what order. From that alone follow
the change of layout and its inverse, their shape, and the part of their array that a part of ours is made of: a process
reads only what its own shards need.

`{layer}` in a key means one tensor a layer there and one stacked array here: everything below is about a single layer,
without the leading axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]


#: Rows of the source that are copied at a time. Turning a matrix in one go misses the cache with every element; a few
#: rows at a time are several times as fast.
BLOCK = 16


class Cut(NamedTuple):
    """A part of one of our arrays: read `theirs[read]`, change its layout, then take `[keep]` of that."""

    read: Index
    keep: Index
    shape: Shape  # of ours, between the two


@dataclass(frozen=True)
class Row:
    """One weight.

    key: its name in the checkpoint, perhaps with `{layer}`.
    groups: for each axis of theirs the axes of ours that it merges, slowest first; None: the same axes as ours.
    sizes: of our axes, -1 for those that are an axis of their own in the checkpoint.
    """

    key: str
    groups: tuple[tuple[int, ...], ...] | None = None
    sizes: Shape = ()

    @property
    def stacked(self) -> bool:
        """Whether the checkpoint has a tensor a layer."""
        return "{layer}" in self.key

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """The whole of theirs in our layout. ValueError if it cannot be split so."""
        if self.groups is None:
            return theirs
        shape = list(self.sizes)
        for group, size in zip(self.groups, theirs.shape, strict=True):
            if len(group) == 1:
                shape[group[0]] = size
            elif math.prod(self.sizes[axis] for axis in group) != size:
                raise ValueError(f"{size} is not the product of {[self.sizes[axis] for axis in group]}")
        whole = (slice(None),) * len(shape)
        ours = np.empty(shape, theirs.dtype)
        self.fill(ours, theirs, self.cut(whole, tuple(shape)))
        return ours

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """The whole of ours in their layout, contiguous: the inverse of `to_ours`."""
        if self.groups is None:
            return np.ascontiguousarray(ours)
        theirs = np.empty(self.their_shape(ours.shape), ours.dtype)
        view = self._split(theirs, ours.shape)
        (unit,) = (math.prod(ours.shape[axis] for axis in group[1:]) for group in self.groups if group[0] == 0)
        step = max(1, BLOCK // unit)
        for start in range(0, len(ours), step):
            view[start : start + step] = ours[start : start + step]
        return theirs

    def their_shape(self, ours: Shape) -> Shape:
        """The shape of theirs, from the shape of ours."""
        if self.groups is None:
            return ours
        return tuple(math.prod(ours[axis] for axis in group) for group in self.groups)

    def cut(self, index: Index, shape: Shape) -> Cut:
        """What `ours[index]` is made of, `shape` being that of the whole of ours. Slices have step 1.

        Where several of our axes are one of theirs, the range read covers whole units of the slowest: a part of every
        head is read as whole heads and cut afterwards.
        """
        ranges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        if self.groups is None:
            return Cut(tuple(slice(*r) for r in ranges), (), tuple(stop - start for start, stop in ranges))
        read, keep, between = [], [slice(None)] * len(shape), [stop - start for start, stop in ranges]
        for slowest, *others in self.groups:
            unit = math.prod(shape[axis] for axis in others)
            start, stop = ranges[slowest]
            read.append(slice(start * unit, stop * unit))
            for axis in others:
                keep[axis], between[axis] = slice(*ranges[axis]), shape[axis]
        return Cut(tuple(read), tuple(keep), tuple(between))

    def fill(self, out: np.ndarray, piece: np.ndarray, cut: Cut) -> None:
        """Write `ours[index]` into `out`, in out's dtype, from `piece` = `theirs[cut.read]`."""
        if self.groups is None:
            out[...] = piece
            return
        slowest, *others = self.groups[0]
        unit = math.prod(cut.shape[axis] for axis in others)
        step = max(1, BLOCK // unit)
        before = (slice(None),) * slowest
        for start in range(0, cut.shape[slowest], step):
            rows = piece[start * unit : (start + step) * unit].astype(out.dtype, copy=False)
            shape = list(cut.shape)
            shape[slowest] = len(rows) // unit
            out[*before, start : start + step] = self._split(rows, tuple(shape))[cut.keep]

    def _split(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """A view of theirs, contiguous or of whole rows, as ours of this shape."""
        assert self.groups is not None
        order = [axis for group in self.groups for axis in group]
        return theirs.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def same(key: str) -> Row:
    """The same layout, of any rank."""
    return Row(key)


def transposed(key: str) -> Row:
    """[F, D] <-> [D, F]: a linear layer, which they store with its outputs first."""
    return Row(key, ((1,), (0,)), (-1, -1))


def into_heads(key: str, heads: int, dim: int) -> Row:
    """[heads * dim, D] <-> [D, heads, dim]."""
    return Row(key, ((1, 2), (0,)), (-1, heads, dim))


def from_heads(key: str, heads: int, dim: int) -> Row:
    """[D, heads * dim] <-> [heads, dim, D]."""
    return Row(key, ((2,), (0, 1)), (heads, dim, -1))


def head_vector(key: str, heads: int, dim: int) -> Row:
    """[heads * dim] <-> [heads, dim]: a bias."""
    return Row(key, ((0, 1),), (heads, dim))
