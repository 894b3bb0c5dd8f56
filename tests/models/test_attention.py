"""The XLA attention, against a dense one written out by hand, and against itself cut in other ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh, row_sharding
from azr_jax.models import attention, attention_blocks
from azr_jax.models.attention import Visibility, attend, attend_decode, attend_paged

Array = Any

#: Segment lengths of rows of 24 tokens, negative for padding: whole, packed, padded right, left and both, all padding.
LAYOUT = [[24], [9, 6, 9], [1, 20, -3], [17, -7], [1, -23], [-7, 17], [-23, 1], [-2, 5, 14, -3], [-24]]


def rows(layout: list[list[int]]) -> Visibility:
    """Segments and positions of rows described by segment lengths."""
    segments, positions = [], []
    for row in layout:
        segments.append([0 if n < 0 else i + 1 for i, n in enumerate(row) for _ in range(abs(n))])
        positions.append([0 if n < 0 else at for n in row for at in range(abs(n))])
    return Visibility.within(jnp.asarray(segments, jnp.int32), jnp.asarray(positions, jnp.int32))


def arrays(b: int, t: int, h: int, kv: int, hd: int, dtype: Any = jnp.float32) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(b, t, n, hd)), dtype) for n in (h, kv, kv)]


def dense(q: Array, k: Array, v: Array, visibility: Visibility, scale: float, window: int | None) -> Array:
    """Every score in float32, every pair looked at one by one, keys copied to every query head."""
    q_segments, k_segments, q_positions, k_positions = map(np.asarray, visibility)
    b, t, h, _ = q.shape
    seen = np.zeros((b, t, k.shape[1]), bool)
    for row, i, j in np.ndindex(*seen.shape):
        distance = q_positions[row, i] - k_positions[row, j]
        near = 0 <= distance and (window is None or distance < window)
        seen[row, i, j] = near and q_segments[row, i] == k_segments[row, j] != 0
    k, v = (jnp.repeat(x.astype(jnp.float32), h // x.shape[2], axis=2) for x in (k, v))
    seen = jnp.asarray(seen)
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k) * scale
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1, where=seen[:, None])
    weights = jnp.where(seen[:, None], weights, 0)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def with_gradients(function: Callable[..., Array], q: Array, k: Array, v: Array) -> list[np.ndarray]:
    """The result, and the gradients of a sum of it that weighs every element differently."""

    def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        out = function(q, k, v).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def run(function: Callable[..., Array], *arguments: Any, **options: Any) -> np.ndarray:
    """`function`, compiled, with a scale of 0.3."""
    return np.asarray(jax.jit(partial(function, scale=0.3, **options))(*arguments))


def assert_same(left: list[np.ndarray], right: list[np.ndarray], atol: float) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


def use_blocks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, attention_blocks):
        monkeypatch.setattr(module, "SMALLEST_BLOCK", size)
    monkeypatch.setattr(attention_blocks, "MOST_BLOCKS", 1000)


@pytest.mark.parametrize("window", [None, 6])
def test_matches_dense(window: int | None) -> None:
    visibility, inputs = rows(LAYOUT), arrays(len(LAYOUT), 24, 4, 2, 8)
    found = with_gradients(lambda *x: attend(*x, visibility, scale=0.3, window=window), *inputs)
    assert_same(found, with_gradients(lambda *x: dense(*x, visibility, 0.3, window), *inputs), 1e-5)
    assert not found[0][np.asarray(visibility.q_segments) == 0].any()


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 1), (8, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    visibility, inputs = rows([[9, 6, 9]]), arrays(1, 24, heads, kv_heads, 8)
    found = with_gradients(lambda *x: attend(*x, visibility, scale=0.3), *inputs)
    assert_same(found, with_gradients(lambda *x: dense(*x, visibility, 0.3, None), *inputs), 1e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_blocks_match_dense(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under recomputation of a decoder block, as the learner runs it."""
    use_blocks_of(5, monkeypatch)
    visibility, inputs = rows(LAYOUT), arrays(len(LAYOUT), 24, 4, 2, 8)
    found = with_gradients(jax.checkpoint(lambda *x: attend(*x, visibility, scale=0.3, window=window)), *inputs)
    assert_same(found, with_gradients(lambda *x: dense(*x, visibility, 0.3, window), *inputs), 1e-5)


def test_bfloat16_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    visibility, inputs = rows([[256]]), arrays(1, 256, 2, 1, 16, jnp.bfloat16)
    expected = with_gradients(lambda *x: dense(*x, visibility, 0.25, None), *inputs)
    at_once = with_gradients(lambda *x: attend(*x, visibility, scale=0.25), *inputs)
    use_blocks_of(2, monkeypatch)
    in_blocks = with_gradients(lambda *x: attend(*x, visibility, scale=0.25), *inputs)
    for index in (2, 3):  # of k and v, sums over 128 blocks
        error, error_at_once = (np.abs(x[index] - expected[index]).mean() for x in (in_blocks, at_once))
        assert error < 1.5 * error_at_once  # 1.2; 3 when they are summed in bfloat16


def test_blocks_that_nobody_sees_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: NaN in keys and values would spread to every query whose loop meets them."""
    use_blocks_of(4, monkeypatch)
    visibility, (q, k, v) = rows([[8, 12, -4], [8, 8, -8]]), arrays(2, 24, 4, 2, 8)
    expected = with_gradients(lambda *x: attend(*x, visibility, scale=0.3), q, k, v)
    poisoned = [x.at[:, :8].set(jnp.nan).at[:, 20:].set(jnp.nan) for x in (k, v)]  # whole blocks: 0, 1 and 5
    found = with_gradients(lambda *x: attend(*x, visibility, scale=0.3)[:, 8:], q, *poisoned)
    np.testing.assert_array_equal(found[0], expected[0][:, 8:])
    assert np.isfinite(found[1][:, 8:]).all() and np.isfinite(found[2][:, 8:20]).all()


def test_padding_does_not_matter() -> None:
    visibility, (q, k, v) = rows([[-7, 17], [-23, 1]]), arrays(2, 24, 4, 2, 8)
    padding = (visibility.q_segments == 0)[:, :, None, None]
    other = [jnp.where(padding, 1e4, x) for x in (q, k, v)]
    np.testing.assert_array_equal(run(attend, q, k, v, visibility), run(attend, *other, visibility))
    for gradient in with_gradients(lambda *x: attend(*x, visibility, scale=0.3), *other)[1:]:
        assert np.isfinite(gradient).all()
        assert not gradient[np.asarray(padding)[:, :, 0, 0]].any()


def test_a_packed_row_is_its_segments_apart() -> None:
    q, k, v = arrays(1, 24, 4, 2, 8)
    packed = run(attend, q, k, v, rows([[9, 6, 9]]))
    for start, length in ((0, 9), (9, 6), (15, 9)):
        part = slice(start, start + length)
        alone = run(attend, q[:, part], k[:, part], v[:, part], rows([[length]]))
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


def test_queries_over_other_keys() -> None:
    """As when a row is continued: the last queries over all keys are the end of the whole row."""
    visibility, (q, k, v) = rows([[20, -4], [-3, 21]]), arrays(2, 24, 4, 2, 8)
    whole = run(attend, q, k, v, visibility, window=9)
    late = visibility._replace(q_segments=visibility.q_segments[:, 15:], q_positions=visibility.q_positions[:, 15:])
    np.testing.assert_allclose(run(attend, q[:, 15:], k, v, late, window=9), whole[:, 15:], atol=1e-6)


@pytest.mark.parametrize("window", [None, 64])
def test_long_rows_hold_no_square(window: int | None) -> None:
    """In the compiled forward and backward pass, no array has two axes as long as the row."""
    t = 2304  # 16 blocks of 144: no other axis is as long
    visibility = rows([[t]])
    shapes = [jax.ShapeDtypeStruct((1, t, n, 16), jnp.float32) for n in (64, 32, 32)]

    def text(function: Callable[..., Array]) -> str:
        loss = jax.grad(lambda *x: jnp.sum(function(*x)), argnums=(0, 1, 2))
        return jax.jit(loss).lower(*shapes).compile().as_text()

    def squares(compiled: str) -> list[str]:
        return [s for s in re.findall(r"\[([\d,]+)\]", compiled) if s.split(",").count(str(t)) > 1]

    assert not squares(text(lambda *x: attend(*x, visibility, scale=0.3, window=window)))
    one_piece = text(lambda *x: attention._attend_piece(*x, visibility, 0.3, window))
    assert squares(one_piece), "the search finds a square where there is one"


@pytest.mark.parametrize("sizes, in_blocks", [((1, 2, 4), False), ((2, 2, 2), True)])
def test_sharded(sizes: tuple[int, int, int], in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_blocks:
        use_blocks_of(5, monkeypatch)
    mesh = make_mesh(MeshConfig(*sizes))
    visibility, inputs = rows([[9, 6, 9], [1, 20, -3]] * 4), arrays(8, 24, 8, 4, 8)
    expected = with_gradients(lambda *x: dense(*x, visibility, 0.3, None), *inputs)
    heads = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    visibility = jax.device_put(visibility, row_sharding(mesh))
    found = with_gradients(lambda *x: attend(*x, visibility, scale=0.3), *jax.device_put(inputs, heads))
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("window", [None, 5])
def test_decode_is_the_query_of_its_position(window: int | None, chunk: int) -> None:
    """Columns after it are not written yet, a row at -1 has none at all."""
    q, k, v = arrays(4, 24, 4, 2, 8)
    whole = run(attend, q, k, v, rows([[24]] * 4), window=window)
    for positions in ([16, 23, 0, 5], [7, 8, -1, 15], [3, 2, -1, 1]):
        at = jnp.asarray(positions)
        later = (jnp.arange(24) > at[:, None])[:, :, None, None]
        cache = [jnp.where(later, 1e4, x).transpose(0, 2, 1, 3) for x in (k, v)]
        one = jnp.take_along_axis(q, jnp.maximum(at, 0)[:, None, None, None], axis=1)
        found = run(attend_decode, one, *cache, at, window=window, chunk=chunk)
        for row, position in enumerate(positions):
            expected = whole[row, position] if position >= 0 else np.zeros((4, 8))
            np.testing.assert_allclose(found[row, 0], expected, atol=1e-6)


@pytest.mark.parametrize("window", [None, 70])
def test_decode_in_chunks_does_not_depend_on_its_surroundings(window: int | None) -> None:
    """Bit for bit: not on the number of columns, nor on other rows, however long or many, nor on its place."""
    q, k, v = arrays(6, 1024, 4, 2, 16)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    at = jnp.asarray([3, 255, 256, 100, 300, 511])
    decode = partial(run, attend_decode, window=window, chunk=256)
    expected = decode(q[:, :1], k[:, :, :512], v[:, :, :512], at)
    for n in (768, 1024):
        np.testing.assert_array_equal(decode(q[:, :1], k[:, :, :n], v[:, :, :n], at), expected)
    longer = at.at[5].set(1023)
    np.testing.assert_array_equal(decode(q[:, :1], k, v, longer)[:5], expected[:5])
    np.testing.assert_array_equal(decode(q[::-1, :1], k[::-1], v[::-1], at[::-1])[::-1], expected)
    short = decode(q[:, :1], k[:, :, :256], v[:, :, :256], at)
    np.testing.assert_array_equal(short[[0, 1, 3]], expected[[0, 1, 3]])
    at_once = run(attend_decode, q[:, :1], k, v, at, window=window)
    np.testing.assert_allclose(at_once, expected, atol=1e-6)


def test_decode_in_chunks_reads_no_further_than_the_longest_row() -> None:
    q, k, v = arrays(2, 64, 4, 2, 8)
    k, v = (x.transpose(0, 2, 1, 3).at[:, :, 32:].set(jnp.nan) for x in (k, v))
    at = jnp.asarray([20, 31])
    expected = run(attend_decode, q[:, :1], k[:, :, :32], v[:, :, :32], at, chunk=16)
    np.testing.assert_array_equal(run(attend_decode, q[:, :1], k, v, at, chunk=16), expected)
    assert np.isfinite(expected).all()


class Paged:
    """Rows of different lengths, their keys and values dense and in shuffled pages; unused memory holds NaN."""

    lengths = (0, 3, 17, 44, 40)

    def __init__(self, t: int, page: int = 8, max_pages: int = 6, spread: int = 0) -> None:
        rng = np.random.default_rng(spread)
        b, kv, hd = len(self.lengths), 2, 16
        fixed = np.random.default_rng(1)
        self.q = jnp.asarray(fixed.normal(size=(b, t, 4, hd)), jnp.float32)
        tokens = fixed.normal(size=(b, 48, kv, 2, hd)).astype(np.float32)
        self.k, self.v = (jnp.asarray(tokens[:, :, :, i]) for i in (0, 1))
        pages = np.full((b * max_pages + 1, page, 2 * kv, hd), np.nan, np.float32)
        self.table = np.full((b, max_pages), len(pages) - 1, np.int32)
        free = iter(rng.permutation(len(pages) - 1))
        for row, length in enumerate(self.lengths):
            for index in range(-(-length // page)):
                self.table[row, index] = number = next(free)
                part = tokens[row, index * page : min(length, (index + 1) * page)]
                pages[number, : len(part)] = part.reshape(len(part), 2 * kv, hd)
        self.pages, self.n = jnp.asarray(pages)[None], jnp.asarray(self.lengths, jnp.int32)

    def visibility(self) -> Visibility:
        """Of the last queries over the dense keys."""
        b, t = self.q.shape[:2]
        at = self.n[:, None] - t + jnp.arange(t)
        columns = jnp.broadcast_to(jnp.arange(48), (b, 48))
        return Visibility((at >= 0).astype(jnp.int32), (columns < self.n[:, None]).astype(jnp.int32), at, columns)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("t", [1, 4])
def test_pages_match_dense(t: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PAGED_TOKENS", 16)
    case = Paged(t)
    expected = dense(case.q, case.k, case.v, case.visibility(), 0.3, window)
    found = run(attend_paged, case.q, case.pages, case.table, case.n, window=window)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.asarray(found)[0].any()


def test_a_row_in_pages_depends_on_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: other pages, other rows, a table with more room."""
    monkeypatch.setattr(attention, "PAGED_TOKENS", 16)
    case = Paged(1)
    expected = np.asarray(run(attend_paged, case.q, case.pages, case.table, case.n))
    moved = Paged(1, max_pages=11, spread=5)
    np.testing.assert_array_equal(run(attend_paged, moved.q, moved.pages, moved.table, moved.n), expected)
    shorter = jnp.asarray([0, 3, 17, 9, 0], jnp.int32)
    np.testing.assert_array_equal(run(attend_paged, case.q, case.pages, case.table, shorter)[:3], expected[:3])


def test_pages_with_padded_columns() -> None:
    case = Paged(1)
    wide = jnp.pad(case.pages, ((0, 0),) * 4 + ((0, 112),), constant_values=jnp.nan)
    expected = run(attend_paged, case.q, case.pages, case.table, case.n)
    np.testing.assert_array_equal(run(attend_paged, case.q, wide, case.table, case.n), expected)


def sharded(case: Paged, shards: int) -> tuple[Array, Array, Array, Array]:
    """q, pages, table and lengths of the case's rows over and over, a shard of pages for each time."""
    moved = [Paged(1, spread=i) for i in range(shards)]
    parts = [(each.q, each.pages, each.table, each.n) for each in moved]
    return tuple(jnp.concatenate(part) for part in zip(*parts, strict=True))


def test_every_shard_has_pages_of_its_own() -> None:
    """Bit for bit what a shard alone gives."""
    case = Paged(1)
    q, pages, table, lengths = sharded(case, 3)
    assert pages.shape[0] == 3
    expected = run(attend_paged, case.q, case.pages, case.table, case.n)
    found = run(attend_paged, q, pages, table, lengths).reshape(3, *expected.shape)
    for part in found:
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("sizes, shards", [((1, 4, 2), 1), ((4, 1, 2), 4)])
def test_pages_on_a_mesh(sizes: tuple[int, int, int], shards: int) -> None:
    """Shards over data, heads over tensor."""
    mesh = make_mesh(MeshConfig(*sizes))
    q, pages, table, lengths = sharded(Paged(1), shards)
    expected = run(attend_paged, q, pages, table, lengths)
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    q, table, lengths = jax.device_put(q, split), *jax.device_put((table, lengths), split.update(spec=("data",)))
    pages = jax.device_put(pages, split.update(spec=("data", None, None, "tensor")))
    np.testing.assert_allclose(run(attend_paged, q, pages, table, lengths), expected, atol=1e-6)


def test_pages_of_int8_have_scales() -> None:
    """Each head of each token its own; what is read is their product, wherever it lies."""
    case, rng = Paged(1), np.random.default_rng(0)
    numbers = jnp.asarray(rng.integers(-127, 128, case.pages.shape), jnp.int8)
    scales = jnp.asarray(rng.uniform(0.001, 0.02, case.pages.shape[:-1]), jnp.float32)
    products = numbers.astype(jnp.float32) * scales[..., None]
    expected = run(attend_paged, case.q, products, case.table, case.n)
    found = run(lambda *x, **o: attend_paged(*x[:4], scales=x[4], **o), case.q, numbers, case.table, case.n, scales)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found[1:]).min() > 0
    unscaled = run(attend_paged, case.q, numbers.astype(jnp.float32), case.table, case.n)
    assert np.abs(unscaled - expected).max() > 1


def test_refusals() -> None:
    visibility, (q, k, v) = rows([[24]]), arrays(1, 24, 4, 2, 8)
    with pytest.raises(ValueError, match="unknown kind of attention 'flash'"):
        attend(q, k, v, visibility, scale=0.3, kind="flash")
    late = visibility._replace(q_segments=visibility.q_segments[:, 1:], q_positions=visibility.q_positions[:, 1:])
    with pytest.raises(ValueError, match="23 queries, 24 keys"):
        attend(q[:, 1:], k, v, late, scale=0.3, kind="splash")
