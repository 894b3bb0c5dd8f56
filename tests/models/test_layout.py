"""Layouts of weights: exact both ways, whole and in parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_jax.models.layout import Row, from_heads, head_vector, into_heads, same, transposed

D, HEADS, DIM = 6, 4, 3
ROWS = {
    "vector": (same("k"), (D,)),
    "matrix": (same("k"), (5, D)),
    "transposed": (transposed("k"), (D, 37)),  # more rows of theirs than are copied at once
    "into_heads": (into_heads("k", HEADS, DIM), (D, HEADS, DIM)),
    "into_many_heads": (into_heads("k", 40, 1), (D, 40, 1)),
    "from_heads": (from_heads("k", HEADS, DIM), (HEADS, DIM, 21)),
    "head_vector": (head_vector("k", HEADS, DIM), (HEADS, DIM)),
}


def random(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", ROWS)
def test_to_theirs_and_back(name):
    row, shape = ROWS[name]
    ours = random(shape)
    theirs = row.to_theirs(ours)
    assert theirs.shape == row.their_shape(shape) and theirs.flags.c_contiguous
    np.testing.assert_array_equal(row.to_ours(theirs), ours)


def test_against_the_definition():
    """y = x W^T as they compute it is the product by heads as we do."""
    x, w = random((2, D)), random((HEADS * DIM, D))
    ours = into_heads("k", HEADS, DIM).to_ours(w)
    np.testing.assert_allclose(np.einsum("bd,dnh->bnh", x, ours), (x @ w.T).reshape(2, HEADS, DIM), rtol=1e-5)
    y, o = random((2, HEADS, DIM)), random((D, HEADS * DIM))
    ours = from_heads("k", HEADS, DIM).to_ours(o)
    np.testing.assert_allclose(np.einsum("bnh,nhd->bd", y, ours), y.reshape(2, -1) @ o.T, rtol=1e-5)
    bias = random((HEADS * DIM,))
    np.testing.assert_array_equal(head_vector("k", HEADS, DIM).to_ours(bias), bias.reshape(HEADS, DIM))
    np.testing.assert_array_equal(transposed("k").to_ours(w), w.T)
    assert same("k").to_ours(w) is w


@given(name=st.sampled_from(sorted(ROWS)), data=st.data())
def test_a_part_of_ours_comes_from_a_part_of_theirs(name, data):
    row, shape = ROWS[name]
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        index.append(slice(None) if data.draw(st.booleans()) else slice(start, stop))
    ours = random(shape)
    cut = row.cut(tuple(index), shape)
    expected = ours[tuple(index)]
    out = np.full(expected.shape, np.nan, np.float64)  # another dtype: what is filled is cast
    row.fill(out, row.to_theirs(ours)[cut.read], cut)
    np.testing.assert_array_equal(out, expected)


def test_no_more_is_read_than_the_part_needs():
    row = into_heads("k", HEADS, DIM)
    assert row.cut((slice(2, 4), slice(1, 3), slice(None)), (D, HEADS, DIM)).read == (slice(3, 9), slice(2, 4))
    row = from_heads("k", HEADS, DIM)
    assert row.cut((slice(3, 4), slice(None), slice(0, 2)), (HEADS, DIM, D)).read == (slice(0, 2), slice(9, 12))
    whole = row.cut((slice(0, 1), slice(1, 2), slice(0, 2)), (HEADS, DIM, D))
    assert whole.read == (slice(0, 2), slice(0, 3)), "a part of a head is read as the whole head"


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="13 is not the product"):
        into_heads("k", HEADS, DIM).to_ours(random((13, D)))


def test_stacked_is_said_by_the_key():
    assert Row("layers.{layer}.w").stacked and not Row("w").stacked
