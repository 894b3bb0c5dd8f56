"""What is known of accelerators: memory and peak rates. Never imports JAX.

Figures are the makers': cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and NVIDIA's A100, H100 and H200 data sheets
(SXM unless said otherwise, dense bfloat16). `usable` is what a program may have of the memory: on a TPU what its
compiler says is available; on a GPU 92 %, which a run gets with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 (JAX takes three
quarters otherwise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
Platform = Literal["tpu", "gpu", "cpu"]


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    name: str
    platform: Platform
    hbm: float  # bytes
    usable: float  # bytes
    flops: float  # bfloat16, a second
    bandwidth: float  # of its memory, bytes a second
    kinds: tuple[str, ...] = ()  # parts of JAX's `device_kind` that tell it from those after it in CHIPS


def _tpu(name: str, gib: float, usable: float, flops: float, bandwidth: float, *kinds: str) -> Chip:
    return Chip(name, "tpu", gib * GIB, usable * GIB, flops, bandwidth, kinds)


def _gpu(name: str, gib: float, flops: float, bandwidth: float, *kinds: str) -> Chip:
    return Chip(name, "gpu", gib * GIB, 0.92 * gib * GIB, flops, bandwidth, kinds)


#: By name. A device's kind is looked up in this order: some versions of JAX call v5p "TPU v5".
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 32, 30.5, 275e12, 1228e9, "TPU v4"),
        _tpu("v5e", 16, 15.75, 197e12, 819e9, "TPU v5 lite", "TPU v5e"),
        _tpu("v5p", 95, 95, 459e12, 2765e9, "TPU v5p", "TPU v5"),
        _tpu("v6e", 32, 31.24, 918e12, 1640e9, "TPU v6 lite", "TPU v6e"),
        _gpu("a100", 80, 312e12, 2039e9, "A100"),  # of the two sizes the larger
        _gpu("h100-pcie", 79.6, 756e12, 2000e9, "H100 PCIe"),
        _gpu("h100", 79.6, 989e12, 3350e9, "H100"),  # 81,559 MiB by nvidia-smi
        _gpu("h200", 140.4, 989e12, 4800e9, "H200"),  # 143,771 MiB
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None if it is not known."""
    return next((chip for chip in CHIPS.values() if any(kind in device_kind for kind in chip.kinds)), None)
