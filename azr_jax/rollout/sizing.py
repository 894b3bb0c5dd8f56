"""Shapes of the sampler's programs, and how many pages its cache gets."""

from __future__ import annotations

import os

from jax.sharding import Mesh

from azr_jax.config import RolloutConfig
from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig
from azr_jax.rollout.cache import CHUNK, Layout
from azr_jax.rollout.scheduler import Scheduler

#: Prompt tokens computed at once: an accelerator is idle with fewer, a CPU pays for every row that is not used.
PREFILL_TOKENS, PREFILL_TOKENS_CPU = 4096, 512
PROMPT_BUCKETS = 3  # prompts are padded to max_prompt, a half or a quarter of it
DEVICE_SHARE = 0.8  # of what is free on an accelerator; the rest is for the programs' own arrays
HOST_SHARE = 0.25  # of a CPU machine's memory


def prompt_buckets(config: RolloutConfig) -> list[int]:
    """Padded lengths of prompts, shortest first: multiples of the page."""
    parts = (2**i for i in range(PROMPT_BUCKETS))
    return sorted({-(-config.max_prompt // (part * config.page)) * config.page for part in parts})


def prefill_rows(config: RolloutConfig, bucket: int, slots: int, shards: int, platform: str) -> int:
    """Prompts of a prefill padded to `bucket`, all shards together, on a platform as JAX calls it."""
    tokens = config.prefill_tokens or (PREFILL_TOKENS_CPU if platform == "cpu" else PREFILL_TOKENS)
    return shards * min(max(1, tokens // (bucket * shards)), slots // shards)


def longest(config: RolloutConfig) -> int:
    """Most tokens of a sequence in the cache: the last one sampled is never fed."""
    return config.max_prompt + config.max_response - 1


def chunk(config: RolloutConfig, kind: str) -> int:
    """Columns of a working copy that are read at once; 0: all there can be."""
    return CHUNK if kind == "working" and longest(config) > 2 * CHUNK else 0


def table_widths(config: RolloutConfig, kind: str) -> list[int]:
    """Pages a row that decode programs are compiled for. Where pages are read in place, one width serves all."""
    most = -(-longest(config) // config.page)
    if not chunk(config, kind):
        return [most]
    step = 2 * CHUNK // config.page
    widths = [step]
    while widths[-1] < most:
        widths.append(2 * widths[-1])
    widths[-1] = -(-most // step) * step
    return widths


def page_count(config: RolloutConfig, model: ModelConfig, layout: Layout, mesh: Mesh, slots: int) -> int:
    """Pages of a shard with `slots` slots: what they could all fill, or what the memory of its devices holds.

    The memory is `rollout.cache_gb` for each device, or else what is free by now, less the working copies of a CPU.
    UserError: it is not enough for one sequence.
    """
    least = Scheduler.pages_for(longest(config), config.page)
    wanted = slots * -(-longest(config) // config.page) + least
    split = mesh.shape["tensor"] if model.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    each = layout.bytes_per_page(model) / split  # on one device
    room = config.cache_gb * 2**30 if config.cache_gb else _free_bytes(mesh)
    copies = 0.0
    if layout.kind == "working" and not config.cache_gb:
        full = layout._replace(dtype=layout.compute_dtype).bytes_per_page(model) / split
        copies = slots * table_widths(config, layout.kind)[-1] * full
        room -= copies
    held = int(room / each)
    if held < least:
        raise UserError(
            f"the KV cache gets {max(0, room) / 2**30:.2f} GiB a device"
            + (f", besides {copies / 2**30:.2f} GiB of working copies for {slots} rollout.slots" if copies else "")
            + f", room for {max(0, held) * config.page} tokens, but one sequence has up to {longest(config)}: lower "
            "rollout.max_prompt, rollout.max_response or rollout.slots, take rollout.cache_dtype=int8, or raise "
            "rollout.cache_gb if there is memory to give"
        )
    return min(wanted, held)


def _free_bytes(mesh: Mesh) -> float:
    """What the cache may take of one device's memory."""
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    if all("bytes_limit" in each for each in stats):
        return DEVICE_SHARE * min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return HOST_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / mesh.size
