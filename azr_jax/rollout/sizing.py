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


def slots(config: RolloutConfig, shards: int) -> int:
    """Of a host: `rollout.slots`, rounded up to a multiple of the shards."""
    return -(-config.slots // shards) * shards


def prompt_buckets(config: RolloutConfig) -> list[int]:
    """Padded lengths of prompts, shortest first: multiples of the page."""
    parts = (2**i for i in range(PROMPT_BUCKETS))
    return sorted({-(-config.max_prompt // (part * config.page)) * config.page for part in parts})


def prefill_rows(config: RolloutConfig, bucket: int, slots: int, shards: int, platform: str) -> int:
    """Prompts of a prefill padded to `bucket`, all shards together, on a platform as JAX calls it."""
    tokens = config.prefill_tokens or (PREFILL_TOKENS_CPU if platform == "cpu" else PREFILL_TOKENS)
    return shards * min(max(1, tokens // (bucket * shards)), slots // shards)


def cache_kind(attention: str, platform: str) -> str:
    """`Layout.kind` where the learner attends by `attention`, on a platform as JAX calls it."""
    if platform == "cpu":
        return "working"
    return "splash" if attention == "splash" else "xla"


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


def cache_layout(config: RolloutConfig, kind: str, shards: int, dtype: str) -> Layout:
    """Of a cache for weights of this dtype; it has no pages yet."""
    stored = "int8" if config.cache_dtype == "int8" else dtype
    return Layout(shards, 0, config.page, stored, dtype, kind, chunk(config, kind))


def page_bytes(model: ModelConfig, layout: Layout, mesh: Mesh) -> float:
    """Of one page, on one device."""
    split = mesh.shape["tensor"] if model.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    return layout.bytes_per_page(model) / split


def working_bytes(config: RolloutConfig, model: ModelConfig, layout: Layout, mesh: Mesh, slots: int) -> float:
    """On one device, of the working copies that a CPU makes of the pages of `slots` rows; 0 for another kind."""
    if layout.kind != "working":
        return 0.0
    full = page_bytes(model, layout._replace(dtype=layout.compute_dtype), mesh)
    return slots * table_widths(config, layout.kind)[-1] * full


def cache_room(config: RolloutConfig, model: ModelConfig, layout: Layout, mesh: Mesh, slots: int, free: float) -> float:
    """Bytes of one device for a cache of shards with `slots` slots.

    `rollout.cache_gb`, or else what is free, less the working copies of a CPU.
    """
    if config.cache_gb:
        return config.cache_gb * 2**30
    return free - working_bytes(config, model, layout, mesh, slots)


def least_pages(config: RolloutConfig) -> int:
    """Of a shard: with fewer the longest sequence does not fit."""
    return Scheduler.pages_for(longest(config), config.page)


def page_count(config: RolloutConfig, model: ModelConfig, layout: Layout, mesh: Mesh, slots: int, room: float) -> int:
    """Pages of a shard with `slots` slots: what they could all fill, or what `room` bytes of its devices each hold.

    UserError: it is not enough for one sequence.
    """
    least = least_pages(config)
    wanted = slots * -(-longest(config) // config.page) + least
    held = int(room / page_bytes(model, layout, mesh))
    if held < least:
        copies = 0.0 if config.cache_gb else working_bytes(config, model, layout, mesh, slots)
        raise UserError(
            f"the KV cache gets {max(0, room) / 2**30:.2f} GiB a device"
            + (f", besides {copies / 2**30:.2f} GiB of working copies for {slots} rollout.slots" if copies else "")
            + f", room for {max(0, held) * config.page} tokens, but one sequence has up to {longest(config)}: lower "
            "rollout.max_prompt, rollout.max_response or rollout.slots, take rollout.cache_dtype=int8, or raise "
            "rollout.cache_gb if there is memory to give"
        )
    return min(wanted, held)


def free_bytes(mesh: Mesh) -> float:
    """What the cache may take of one device's memory."""
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    if all("bytes_limit" in each for each in stats):
        return DEVICE_SHARE * min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return HOST_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / mesh.size
