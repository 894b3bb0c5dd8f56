"""Set before anything imports JAX: CPU only, eight fake devices, nothing fetched; Hypothesis without deadlines."""

from __future__ import annotations

import os

from hypothesis import settings

FAKE_DEVICES = "--xla_force_host_platform_device_count=8"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if FAKE_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE_DEVICES}".strip()

# A shared machine is slow at times: no deadlines. The same examples on every run: a failure can be run again.
settings.register_profile("azr_jax", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("azr_jax")
