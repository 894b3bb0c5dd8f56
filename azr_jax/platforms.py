"""Which backends JAX should look for, decided before it is imported.

libtpu installed on a machine without a TPU (for planning, or by the test extra) makes JAX print several alarming lines
and fall back to the CPU. Here the CPU is chosen at once instead, in silence. A choice made by the user stands.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

GOOGLE = "0x1ae0"  # PCI vendor of TPU chips, and of Compute Engine's network cards and disks
NO_CHIPS = ("0x01", "0x02")  # PCI classes: storage, network
PCI = Path("/sys/bus/pci/devices")


def skip_absent_tpu(devices: Path = PCI, nvidia: Path = Path("/dev/nvidiactl")) -> None:
    """Set JAX_PLATFORMS=cpu where libtpu is installed and neither a TPU nor an NVIDIA GPU is there."""
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None or nvidia.exists():
        return
    if not has_tpu(devices):
        os.environ["JAX_PLATFORMS"] = "cpu"


def has_tpu(devices: Path = PCI) -> bool:
    """Whether this machine has TPU chips of its own."""
    for vendor in devices.glob("*/vendor"):
        if vendor.read_text().strip() == GOOGLE and not vendor.with_name("class").read_text().startswith(NO_CHIPS):
            return True
    return False
