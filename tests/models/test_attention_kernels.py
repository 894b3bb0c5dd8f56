"""Every kernel against the dense attention of test_attention.py.

TPU kernels run in Pallas interpret mode here, and are compiled for real chips where libtpu is installed. cuDNN is
lowered for CUDA, and what it is called with is run through a stand-in that does what JAX documents.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged_library
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.errors import ConfigError
from azr_jax.models import attention_choice, attention_kernels
from azr_jax.models.attention import Visibility, attend, attend_paged
from azr_jax.models.attention_choice import choose_attention
from tests.models.test_attention import arrays, assert_same, dense, rows, run, with_gradients

Array = Any
NAN = float("nan")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "layout, heads, kv_heads, hd, window",
    [
        ([[150, 20, 130], [-30, 1, 269]], 4, 2, 64, None),  # three blocks, the last one not full
        ([[-60, 140], [150, -50], [-200]], 8, 1, 128, 40),
    ],
)
def test_splash_matches_dense(layout: list[list[int]], heads: int, kv_heads: int, hd: int, window: int | None) -> None:
    visibility = rows(layout)
    inputs = arrays(*visibility.q_segments.shape, heads, kv_heads, hd)
    found = with_gradients(lambda *x: attend(*x, visibility, scale=0.1, window=window, kind="splash"), *inputs)
    assert_same(found, with_gradients(lambda *x: dense(*x, visibility, 0.1, window), *inputs), 2e-5)
    assert not found[0][np.asarray(visibility.q_segments) == 0].any()


@pytest.mark.usefixtures("interpreted")
def test_splash_in_bfloat16() -> None:
    """As near to the dense result as the reference is."""
    visibility, inputs = rows([[60, 40]]), arrays(1, 100, 2, 1, 64, jnp.bfloat16)
    expected = dense(*inputs, visibility, 0.125, None)
    found = {kind: jax.jit(partial(attend, scale=0.125, kind=kind))(*inputs, visibility) for kind in ("splash", "xla")}
    assert found["splash"].dtype == jnp.bfloat16
    errors = {kind: float(jnp.mean(jnp.abs(out - expected))) for kind, out in found.items()}
    assert errors["splash"] < 1.5 * errors["xla"], errors


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("layout, heads, kv_heads", [([[70, 30], [-40, 60]], 4, 2), ([[100]], 3, 1)])
def test_splash_sharded(layout: list[list[int]], heads: int, kv_heads: int) -> None:
    """Rows over (data, fsdp), heads over tensor: with fewer key heads than shards, and where nothing divides."""
    mesh = make_mesh(MeshConfig(1, 2, 4))
    visibility, inputs = rows(layout), arrays(len(layout), 100, heads, kv_heads, 16)
    expected = with_gradients(lambda *x: attend(*x, visibility, scale=0.3), *inputs)
    found = with_gradients(lambda *x: attend(*x, visibility, scale=0.3, kind="splash", mesh=mesh), *inputs)
    assert_same(found, expected, 3e-5)


@pytest.fixture
def ragged_interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ragged kernel on CPU. The interpreter cannot reshape a reference: it gets what it reads as an array."""
    wait = ragged_library.MultiPageAsyncCopyDescriptor.wait
    monkeypatch.setattr(ragged_library.MultiPageAsyncCopyDescriptor, "wait", lambda self: wait(self)[...])
    logging.disable(logging.ERROR)  # it takes copies that are waited for in another loop for forgotten ones
    with pltpu.force_tpu_interpret_mode():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("ragged_interpreted")
@pytest.mark.parametrize(
    "lengths, t, kv_heads, hd, window", [((0, 3, 17, 44), 1, 2, 64, 9), ((3, 21), 4, 1, 128, None)]
)
def test_ragged_matches_pages(
    lengths: tuple[int, ...], t: int, kv_heads: int, hd: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding and a block of new tokens, an empty slot, a row shorter than the block, narrow heads."""
    monkeypatch.setattr(attention_kernels, "RAGGED_TOKENS", 16)
    rng, b = np.random.default_rng(0), len(lengths)
    table = jnp.asarray(rng.permutation(b * 6).reshape(b, 6), jnp.int32)
    q = jnp.asarray(rng.normal(size=(b, t, 8 * kv_heads, hd)), jnp.float32)
    pages = jnp.asarray(rng.normal(size=(1, b * 6, 8, 2 * kv_heads, hd)), jnp.float32)
    pages = jnp.pad(pages, ((0, 0),) * 4 + ((0, 128 - hd),))
    arguments = q, pages, table, jnp.asarray(lengths, jnp.int32)
    expected = run(attend_paged, *arguments, window=window)
    np.testing.assert_allclose(run(attend_paged, *arguments, window=window, kind="splash"), expected, atol=2e-6)
    assert not expected[np.asarray(lengths) == 0].any()


def test_ragged_leaves_other_head_sizes_to_xla() -> None:
    pages = jnp.ones((1, 4, 8, 2, 256))
    assert not attention_kernels.ragged_can(pages)
    assert not attention_kernels.ragged_can(jnp.ones((1, 4, 8, 2, 128), jnp.int8)), "int8 is left to XLA as well"
    assert attention_kernels.ragged_can(jnp.ones((1, 4, 8, 2, 128)))
    arguments = jnp.ones((1, 1, 2, 256)), pages, jnp.arange(4)[None], jnp.asarray([9])
    np.testing.assert_array_equal(run(attend_paged, *arguments, kind="splash"), np.ones((1, 1, 2, 256)))


def test_ragged_shards_need_a_mesh() -> None:
    arguments = jnp.ones((2, 1, 2, 128)), jnp.ones((2, 4, 8, 2, 128)), jnp.zeros((2, 1), jnp.int32), jnp.asarray([1, 1])
    with pytest.raises(ValueError, match="2 shards of pages need the mesh they lie on"):
        attend_paged(*arguments, scale=0.3, kind="splash")


@pytest.fixture
def chips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """A mesh of TPU chips to compile for, no TPU needed: fsdp 2 x tensor 2."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may compile at the same time
    return make_mesh(MeshConfig(1, 2, 2), topologies.get_topology_desc(request.param, "tpu").devices)


def on(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


@pytest.mark.parametrize(
    "chips, heads, kv_heads, hd, dtype, window",
    [
        ("v5e:2x2", 28, 4, 128, jnp.bfloat16, None),
        ("v6e:2x2", 28, 4, 128, jnp.bfloat16, None),
        ("v6e:2x2", 14, 2, 64, jnp.float32, None),
        ("v5e:2x2", 4, 1, 256, jnp.bfloat16, 512),
    ],
    indirect=["chips"],
)
def test_splash_compiles_for_tpu(
    chips: Mesh, heads: int, kv_heads: int, hd: int, dtype: Any, window: int | None
) -> None:
    """Forward and backward, with the heads of Qwen2.5 7B and 0.5B and of Gemma 3 1B."""
    b, t = 2, 2000

    def loss(q: Array, k: Array, v: Array, segments: Array, positions: Array) -> Array:
        visibility = Visibility.within(segments, positions)
        return jnp.sum(attend(q, k, v, visibility, scale=hd**-0.5, window=window, kind="splash", mesh=chips))

    row = on(chips, (b, t), jnp.int32, "fsdp")
    shapes = [on(chips, (b, t, n, hd), dtype, "fsdp") for n in (heads, kv_heads, kv_heads)]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, row, row).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, dq, dkv
    assert "2048,2048" not in text


@pytest.mark.parametrize(
    "chips, heads, kv_heads, hd, t, window",
    [("v5e:2x2", 28, 4, 128, 1, None), ("v6e:2x2", 28, 4, 128, 1, None), ("v5e:2x2", 14, 2, 64, 64, 512)],
    indirect=["chips"],
)
def test_ragged_compiles_for_tpu(chips: Mesh, heads: int, kv_heads: int, hd: int, t: int, window: int | None) -> None:
    """On a mesh as the sampler makes it: heads over tensor as far as they divide, the rest are shards over data."""
    b, page, shards = 32, 64, 4 // kv_heads
    mesh = make_mesh(MeshConfig(shards, 1, kv_heads), chips.devices.flat)

    def step(*arguments: Array) -> Array:
        return attend_paged(*arguments, scale=hd**-0.5, window=window, kind="splash", mesh=mesh)

    compiled = jax.jit(step).lower(
        on(mesh, (b, t, heads, hd), jnp.bfloat16, "data", None, "tensor"),
        on(mesh, (shards, 256, page, 2 * kv_heads, 128), jnp.bfloat16, "data", None, None, "tensor"),
        on(mesh, (b, 128), jnp.int32, "data"),
        on(mesh, (b,), jnp.int32, "data"),
    )
    assert "tpu_custom_call" in compiled.compile().as_text()


def test_segment_table() -> None:
    segments = jnp.asarray([[0, 1, 1, 2, 3, 3], [0] * 6, [4] * 6])
    lengths, offsets = jax.jit(attention_kernels.segment_table, static_argnums=1)(segments, 4)
    assert lengths.tolist() == [[2, 1, 2, -1], [-1] * 4, [6, -1, -1, -1]]
    assert offsets.tolist() == [[1, 3, 4, -1, -1], [-1] * 5, [0, -1, -1, -1, -1]]


@jax.custom_vjp
def poison(x: Array, padding: Array) -> Array:
    """Itself, with a gradient that is NaN in padding."""
    return x


poison.defvjp(lambda x, padding: (x, padding), lambda padding, g: (jnp.where(padding, NAN, g), None))


def documented(q: Array, k: Array, v: Array, **arguments: Any) -> Array:
    """cuDNN's packed attention as JAX describes it: segments by first column and length, anything in between them."""
    lengths, offsets = arguments["q_seqlen"], arguments["q_offsets"]
    assert arguments["kv_seqlen"] is lengths and arguments["kv_offsets"] is offsets
    assert lengths.shape[1] + 1 == offsets.shape[1] and lengths.dtype == offsets.dtype == jnp.int32
    assert q.shape == k.shape == v.shape, "strides of keys are those of queries"
    column = jnp.arange(q.shape[1])[None, :, None]
    start, length = offsets[:, None, :-1], lengths[:, None]
    inside = (column >= start) & (column < start + length)  # [B, T, M]
    segments = jnp.max(jnp.where(inside, jnp.arange(1, lengths.shape[1] + 1), 0), axis=-1)
    padding = (segments == 0)[:, :, None, None]
    columns = jnp.broadcast_to(column[:, :, 0], segments.shape)
    q, k, v = (poison(x, padding) for x in (q, k, v))
    out = attend(q, k, v, Visibility.within(segments, columns), scale=arguments["scale"])
    return jnp.where(padding, NAN, out)


def test_cudnn_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "packed_cudnn", lambda: (documented, None))
    visibility, inputs = rows([[9, 6, 9], [1, 20, -3], [-7, 17], [-24]]), arrays(4, 24, 8, 2, 8)
    mesh = make_mesh(MeshConfig(1, 2, 4))
    found = with_gradients(lambda *x: attend(*x, visibility, scale=0.3, kind="cudnn", mesh=mesh), *inputs)
    assert_same(found, with_gradients(lambda *x: dense(*x, visibility, 0.3, None), *inputs), 1e-5)


@pytest.mark.parametrize("layout, window", [([[9, 6, 9]], 6), ([[1, 1, 1, 21]], None)])
def test_what_cudnn_cannot_do_goes_through_xla(
    layout: list[list[int]], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, and rows with too many segments (known only while running)."""
    monkeypatch.setattr(attention_kernels, "CUDNN_SEGMENTS", 3)
    monkeypatch.setattr(attention_kernels, "packed_cudnn", lambda: (lambda q, k, v, **_: q * NAN, None))
    visibility, inputs = rows(layout), arrays(1, 24, 4, 2, 8)
    found = with_gradients(lambda *x: attend(*x, visibility, scale=0.3, window=window, kind="cudnn"), *inputs)
    assert_same(found, with_gradients(lambda *x: dense(*x, visibility, 0.3, window), *inputs), 1e-5)


def test_cudnn_lowers_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be seen without a GPU: forward and backward become cuDNN calls of packed, causal rows."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda capability: False)

    def loss(q: Array, k: Array, v: Array, segments: Array, positions: Array) -> Array:
        return jnp.sum(attend(q, k, v, Visibility.within(segments, positions), scale=0.1, kind="cudnn"))

    shapes = [jax.ShapeDtypeStruct((2, 256, n, 128), jnp.bfloat16) for n in (8, 2, 2)]
    row = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, row, row)
    calls = [x for x in traced.lower(lowering_platforms=("cuda",)).as_text().splitlines() if "__cudnn$fmha" in x]
    assert len(calls) == 2 and "__cudnn$fmhaSoftmaxBackward" in calls[1]
    for call in calls:
        assert "PADDING_CAUSAL" in call
        assert f"max_seg_per_batch\\22: {attention_kernels.CUDNN_SEGMENTS}" in call


def device(platform: str, kind: str, **others: Any) -> Any:
    return SimpleNamespace(platform=platform, device_kind=kind, **others)


TPU, HOPPER = device("tpu", "TPU v6 lite"), device("gpu", "NVIDIA H200", compute_capability="9.0")
AMPERE, AMD = (
    device("gpu", "NVIDIA A100", compute_capability="8.0"),
    device("gpu", "AMD MI300X", compute_capability="gfx942"),
)


@pytest.mark.parametrize(
    "where, dtype, expected",
    [
        (TPU, "float32", "splash"),
        (HOPPER, "bfloat16", "cudnn"),
        (HOPPER, "float32", "xla"),
        (AMPERE, "bfloat16", "xla"),
        (AMD, "bfloat16", "xla"),
        (device("cpu", "cpu"), "float32", "xla"),
    ],
)
def test_auto(
    where: Any, dtype: str, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "azr_jax")
    monkeypatch.setattr(attention_choice, "_trial", lambda *_: None)
    assert choose_attention("auto", head_dim=128, dtype=dtype, device=where) == expected
    (record,) = caplog.records
    assert record.getMessage().startswith(f"attention: {expected}")
    monkeypatch.setattr(attention_choice, "_trial", lambda *_: "the trial says no")
    assert choose_attention("auto", head_dim=128, dtype=dtype, device=where) == "xla"
    assert ("the trial says no" in caplog.records[1].getMessage()) == (expected != "xla")


@pytest.mark.parametrize(
    "requested, where, dtype, problem",
    [
        ("splash", None, "float32", "it needs a TPU, and this is cpu"),
        ("cudnn", TPU, "bfloat16", "it needs an NVIDIA GPU, and this is TPU v6 lite"),
        ("cudnn", AMPERE, "bfloat16", "packed rows need an NVIDIA Hopper GPU or later, and this is NVIDIA A100"),
        ("cudnn", AMD, "bfloat16", "packed rows need an NVIDIA Hopper GPU or later, and this is AMD MI300X"),
        ("cudnn", HOPPER, "float32", "cuDNN computes in bfloat16, and this is float32"),
    ],
)
def test_a_kernel_asked_for_that_cannot_run(requested: str, where: Any, dtype: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"attention={requested} cannot run here: {problem}; use attention=auto"):
        choose_attention(requested, head_dim=128, dtype=dtype, device=where)


def test_xla_is_always_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "azr_jax")
    assert choose_attention("xla", head_dim=128, dtype="float32", device=TPU) == "xla"
    assert caplog.messages == ["attention: xla (as configured)"]


def test_sliding_layers_are_mentioned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "azr_jax")
    monkeypatch.setattr(attention_choice, "_trial", lambda *_: None)
    assert choose_attention("auto", head_dim=256, dtype="bfloat16", windows=True, device=HOPPER) == "cudnn"
    assert "sliding layers take xla" in caplog.text


@pytest.mark.usefixtures("interpreted")
def test_the_trial_accepts_a_right_kernel() -> None:
    assert attention_choice._trial("splash", jax.devices()[1], 64, "bfloat16") is None


def test_the_trial_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = attention_choice._trial("splash", jax.devices()[0], 64, "float32")  # not interpreted
    assert problem is not None and problem.startswith("a trial failed with ")

    def blind(q: Array, k: Array, v: Array, visibility: Visibility, **_: Any) -> Array:
        return attend(q, k, v, visibility._replace(k_positions=0 * visibility.k_positions), scale=0.125)

    for wrong in (blind, lambda q, *_, **__: q * NAN):
        monkeypatch.setattr(attention_kernels, "splash", wrong)
        problem = attention_choice._trial("splash", jax.devices()[0], 64, "float32")
        assert problem is not None and problem.startswith("a trial differs from the reference by")
