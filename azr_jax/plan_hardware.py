"""The machines and slices `azr-jax plan` can plan for, by every name they have. Never imports JAX.

Which slices exist, and how many chips are on a host: cloud.google.com/tpu/docs/v5e, /v5p, /v6e. The CPU's two rates are
nominal, a few cores of a server: there the memory is the point.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from azr_jax.chips import CHIPS, Chip
from azr_jax.errors import ConfigError

#: Slices by the number in their accelerator type: chips of v5e and v6e, cores (two a chip) of v5p.
SLICES = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
}
GPUS = (1, 2, 4, 8)  # of one machine

#: Up to eight v5e or v6e chips are one host (machine types ct5lp-hightpu-8t, ct6e-standard-8t); larger slices are made
#: of hosts with four. A v5p host always has four.
ONE_HOST = 8
HOST_CHIPS = 4
HOSTS = {("v5e", 4): "2x2", ("v5e", 8): "2x4", ("v6e", 4): "2x2", ("v6e", 8): "2x4", ("v5p", 4): "2x2x1"}


@dataclass(frozen=True)
class Target:
    """A machine or slice to plan for: `chips` of one kind, `host_chips` of them on a host."""

    name: str
    chip: Chip
    chips: int
    host_chips: int

    @property
    def hosts(self) -> int:
        """How many machines."""
        return self.chips // self.host_chips

    @property
    def host_name(self) -> str:
        """The topology of one host of a TPU slice, whose chips the sampler uses."""
        return f"{self.chip.name}:{HOSTS[self.chip.name, self.host_chips]}"


def parse_target(text: str) -> Target:
    """From `v5e:4x4`, `v5e-16`, `v5litepod-16`, `h200:1` or `cpu`. ConfigError with the list for anything else."""
    if text == "cpu":
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        return Target("cpu", Chip("cpu", "cpu", memory, memory, 2e11, 2e10), 1, 1)
    for target in known_targets():
        kind = accelerator_type(target)
        if text.lower() in (target.name, kind, kind.replace("v5litepod", "v5e")):
            return target
    names = ", ".join(target.name for target in known_targets())
    raise ConfigError(f"topology {text!r} is not known; there are {names}, cpu, and accelerator types such as v6e-8")


def known_targets(chip: str | None = None) -> list[Target]:
    """Every slice and machine there is (of one chip), smallest first."""
    found = []
    for name, sizes in SLICES.items():
        for shape in sizes.values():
            chips = _product(shape)
            one_host = name != "v5p" and chips <= ONE_HOST
            found.append(Target(f"{name}:{shape}", CHIPS[name], chips, chips if one_host else HOST_CHIPS))
    found += [Target(f"{name}:{n}", CHIPS[name], n, n) for name in ("h100", "h200") for n in GPUS]
    return [target for target in found if chip in (None, target.chip.name)]


def accelerator_type(target: Target) -> str:
    """The name gcloud knows a slice by (`v5litepod-16`); of a GPU machine or CPU its own."""
    shape = target.name.partition(":")[2]
    numbers = SLICES.get(target.chip.name, {})
    kind = "v5litepod" if target.chip.name == "v5e" else target.chip.name
    return next((f"{kind}-{n}" for n, known in numbers.items() if known == shape), target.name)


def _product(shape: str) -> int:
    result = 1
    for size in shape.split("x"):
        result *= int(size)
    return result
