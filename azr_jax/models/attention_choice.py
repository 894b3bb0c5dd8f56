"""Which attention a run uses: what the config asks for, if it can run here, proved by a trial on the device.

`auto` never fails: a kernel that is missing, does not compile or computes something else than the reference costs a
warning and speed. A kernel asked for by name that cannot run is an error.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from azr_jax.errors import ConfigError
from azr_jax.models.attention import Visibility, attend

logger = logging.getLogger(__name__)

#: The kernel `auto` tries on a platform; XLA on all others.
KERNELS = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}

#: Largest accepted difference to the reference in a trial, relative to the largest value. bfloat16 has 8 bits, so
#: rounding alone makes about 0.01; a kernel that misreads a segment or a head is wrong by about 1.
TOLERANCE = 0.05


def choose_attention(
    requested: str, *, head_dim: int, dtype: str, windows: bool = False, device: jax.Device | None = None
) -> str:
    """The `kind` for `attend`: "xla", "splash" or "cudnn"; logs it, and why, in one line.

    requested: the config's `attention`; head_dim and dtype ("float32" or "bfloat16") of queries; windows: whether the
    model has sliding layers; device: any local device (default: the first).
    ConfigError: a kernel was asked for by name and cannot run here.
    """
    device = device or jax.local_devices()[0]
    kind = KERNELS.get(device.platform, "xla") if requested == "auto" else requested
    if kind == "xla":
        why = "as configured" if requested == "xla" else f"no kernel for {device.platform}"
        logger.info("attention: xla (%s)", why)
        return kind
    problem = _unfit(kind, device, dtype) or _trial(kind, device, head_dim, dtype)
    if problem and requested != "auto":
        raise ConfigError(f"attention={kind} cannot run here: {problem}; use attention=auto or attention=xla")
    if problem:
        logger.warning("attention: xla, which is slow on this device (%s cannot run: %s)", kind, problem)
        return "xla"
    note = "; sliding layers take xla, as cudnn has no windows in packed rows" if windows and kind == "cudnn" else ""
    logger.info("attention: %s on %s%s", kind, device.device_kind, note)
    return kind


def _unfit(kind: str, device: Any, dtype: str) -> str | None:
    """What is known beforehand to stand in the way, in words."""
    if KERNELS.get(device.platform) != kind:
        return f"it needs {'a TPU' if kind == 'splash' else 'an NVIDIA GPU'}, and this is {device.device_kind}"
    if kind == "splash":
        return None
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "").isdigit() or float(capability) < 9.0:
        return f"packed rows need an NVIDIA Hopper GPU or later, and this is {device.device_kind}"
    if dtype != "bfloat16":
        return f"cuDNN computes in bfloat16, and this is {dtype}"
    from azr_jax.models.attention_kernels import packed_cudnn

    try:
        packed_cudnn()
    except ImportError:
        return f"JAX {jax.__version__} offers no cuDNN attention with segment offsets"
    return None


def _trial(kind: str, device: jax.Device, head_dim: int, dtype: str) -> str | None:
    """Runs a small packed batch forward and backward; what went wrong, in words, or None."""
    rows, tokens, heads, kv_heads = 2, 128, 4, 2
    column = np.arange(tokens, dtype=np.int32)
    segments = np.stack([1 + column // 50, np.where(column < 100, 1, 0)])  # three segments; one and padding
    positions = np.where(segments == 0, 0, np.stack([column % 50, column]))
    visibility = Visibility.within(jnp.asarray(segments), jnp.asarray(positions))
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((rows, tokens, n, head_dim), np.float32) for n in (heads, kv_heads, kv_heads)]
    weights = rng.standard_normal(inputs[0].shape, np.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, visibility, scale=head_dim**-0.5, kind=kind)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    results = []
    try:
        with jax.default_device(device):
            arrays = [jnp.asarray(x, dtype) for x in inputs]
            for name in (kind, "xla"):
                run = jax.jit(jax.grad(partial(loss, kind=name), argnums=(0, 1, 2), has_aux=True))
                gradients, out = run(*arrays)
                results.append([np.asarray(x, np.float32) for x in (out, *gradients)])
    except Exception as error:  # whatever a compiler or driver may raise: the answer is the same
        return f"a trial failed with {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    worst = np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in zip(*results, strict=True)])  # NaN if any is
    return None if worst <= TOLERANCE else f"a trial differs from the reference by {worst:.2g}"
