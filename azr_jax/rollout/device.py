"""The device's side of the engine: weights, cache and compiled programs; numpy arrays in, unawaited arrays out."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from azr_jax.config import RolloutConfig
from azr_jax.dist.mesh import replicated
from azr_jax.models.attention import attend
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Params
from azr_jax.rollout import programs, sizing
from azr_jax.rollout.cache import Layer, Layout, allocate, copy_pages, shapes
from azr_jax.rollout.programs import Block, Slots
from azr_jax.rollout.sampling import Filtering
from azr_jax.rollout.scheduler import Prefill
from azr_jax.rollout.weights import copy_shapes, decode_copy

log = logging.getLogger(__name__)


class Device:
    """Programs over one mesh of one host: its data axis are the shards, each with slots and pages of its own.

    slots: of all shards. attention: "xla", "splash" or "cudnn", as models/attention_choice.py says it. dtype: of the
    weights kept here.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: RolloutConfig,
        mesh: Mesh,
        slots: int,
        eos: frozenset[int],
        attention: str,
        dtype: str,
    ) -> None:
        self.model, self.config, self.mesh, self.slots, self.dtype = model, config, mesh, slots, dtype
        self.shards = int(mesh.shape["data"])
        self._attend = partial(attend, kind=attention, mesh=mesh)
        self.kind = sizing.cache_kind(attention, mesh.devices.flat[0].platform)
        self.buckets = sizing.prompt_buckets(config)
        self.widths = sizing.table_widths(config, self.kind)
        self._eos: Any = np.asarray(sorted(eos), np.int32)
        self._programs: dict[tuple[str, int, bool], Callable[..., Any]] = {}
        self._weights: Params | None = None
        # What the copy was made from, by its first weight: held weakly, or the caller's weights would stay in memory.
        self._source: weakref.ref[jax.Array] | None = None
        self._cache: tuple[Layer, ...] | None = None
        self._layout: Layout | None = None
        self._banned: jax.Array | None = None  # bool [V]

    @property
    def loaded(self) -> bool:
        """Whether there are weights."""
        return self._weights is not None

    def ban(self, tokens: np.ndarray) -> None:
        """Tokens never sampled, bool [V]; before a program is compiled."""
        self._banned = jax.device_put(tokens, replicated(self.mesh))

    def holds(self, params: Params) -> bool:
        """Whether `params` are what is loaded."""
        return self._source is not None and self._source() is jax.tree.leaves(params)[0]

    def load(self, params: Params) -> None:
        """Copy weights and make an empty cache."""
        self._weights = jax.block_until_ready(decode_copy(params, self.model, self.mesh, self.dtype))
        self._source = weakref.ref(jax.tree.leaves(params)[0])
        self._cache = allocate(self.layout, self.model, self.mesh)

    def release(self) -> None:
        """Give up both."""
        self._weights = self._source = self._cache = None

    @property
    def layout(self) -> Layout:
        """Of the cache; its size is settled when this is first asked for, by the memory that is free then."""
        if self._layout is None:
            layout = sizing.cache_layout(self.config, self.kind, self.shards, self.dtype)
            free = 0.0 if self.config.cache_gb else sizing.free_bytes(self.mesh)
            sizes = self.config, self.model, layout, self.mesh, self.slots // self.shards
            pages = sizing.page_count(*sizes, sizing.cache_room(*sizes, free))
            self._layout = layout._replace(pages=pages)
        return self._layout

    def warm_up(self) -> None:
        """Compile every program there is, saying so, since it may take minutes."""
        started = time.monotonic()
        wanted = [("prefill", size, False) for size in self.buckets] + [("decode", size, False) for size in self.widths]
        missing = [key for key in wanted if key not in self._programs]
        for i, (kind, size, _) in enumerate(missing, 1):
            tokens = size * (self.config.page if kind == "decode" else 1)
            log.info("compiling the sampler, %d of %d: %s, up to %d tokens", i, len(missing), kind, tokens)
            self.program(kind, size)
        if missing:
            none = np.zeros((self.shards, self.slots // self.shards), np.int32)
            self._cache = copy_pages(self._cache, none, none)
            log.info("compiled the sampler in %.0f s", time.monotonic() - started)

    def rows(self, bucket: int) -> int:
        """Prompts of a prefill of this length."""
        platform = self.mesh.devices.flat[0].platform
        return sizing.prefill_rows(self.config, bucket, self.slots, self.shards, platform)

    def prefill(self, prefills: Iterable[Prefill]) -> None:
        """Keys and values of prompts into their pages, as many programs as it takes."""
        waiting = list(prefills)
        while waiting:
            bucket = self._bucket(waiting[0])
            each = self.rows(bucket) // self.shards
            tokens, lengths = np.zeros((self.shards, each, bucket), np.int32), np.zeros((self.shards, each), np.int32)
            pages = np.zeros((self.shards, each, bucket // self.config.page), np.int32)
            used, rest = [0] * self.shards, []
            for prefill in waiting:
                shard, n = prefill.shard, len(prefill.prompt) - 1
                if self._bucket(prefill) != bucket or used[shard] == each:
                    rest.append(prefill)
                    continue
                at = shard, used[shard]
                tokens[at][:n], lengths[at] = prefill.prompt[:-1], n
                pages[at][: len(prefill.pages)] = prefill.pages
                used[shard] += 1
            waiting = rest
            rows = (x.reshape(-1, *x.shape[2:]) for x in (tokens, lengths, pages))
            self._cache = self.program("prefill", bucket)(self._weights, self._cache, *rows)

    def copy(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy pages: (shard, from, to). At most as many in a shard as it has slots."""
        index = np.zeros((2, self.shards, self.slots // self.shards), np.int32)
        used = [0] * self.shards
        for shard, source, target in copies:
            index[:, shard, used[shard]] = source, target
            used[shard] += 1
        self._cache = copy_pages(self._cache, index[0], index[1])

    def decode(self, slots: Slots, enough: int, filtering: Filtering | None = None) -> Block:
        """A block of decoding for slots whose tables have one of `widths`."""
        program = self.program("decode", slots.table.shape[1], filtering is not None)
        block, self._cache = program(self._weights, self._cache, slots, np.int32(enough), self._banned, filtering)
        return block

    def _bucket(self, prefill: Prefill) -> int:
        return min(size for size in self.buckets if size >= len(prefill.prompt) - 1)

    def program(self, kind: str, size: int, filtered: bool = False) -> Callable[..., Any]:
        """The compiled program: prefill of a padded length, or decode of a table width. Compiled once."""
        key = kind, size, filtered
        if key not in self._programs:
            self._programs[key] = self.lower(kind, size, filtered).compile()
        return self._programs[key]

    def lower(self, kind: str, size: int, filtered: bool = False) -> Any:
        """Trace a program for the shapes and places of its arguments; needs no weights, and no devices but the mesh."""
        weights = copy_shapes(self.model, self.mesh, self.dtype)
        cache = shapes(self.layout, self.model, self.mesh)

        def array(dtype: Any, *shape: int, split: bool = True) -> jax.ShapeDtypeStruct:
            spec = PartitionSpec("data") if split else PartitionSpec()
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

        i32, f32, b, v = jnp.int32, jnp.float32, self.slots, self.model.vocab_size
        where = jax.tree.map(lambda x: x.sharding, cache)
        if kind == "prefill":
            r = self.rows(size)
            rows = array(i32, r, size), array(i32, r), array(i32, r, size // self.config.page)
            run = partial(programs.prefill, config=self.model, attend=self._attend)
            return jax.jit(run, donate_argnums=1, out_shardings=where).lower(weights, cache, *rows)
        ints: list[Any] = [array(i32, b) for _ in range(4)]
        rest: list[Any] = [array(jnp.uint32, b, 2), array(f32, b), array(i32, b, size)]
        slots = Slots(*ints, *rest)
        filtering = None
        if filtered:
            parts: list[Any] = [array(i32, b), *(array(f32, b) for _ in range(5)), array(bool, b, v), array(i32, b, v)]
            filtering = Filtering(*parts)
        banned = None if self._banned is None else array(bool, v, split=False)
        steps = self.config.block
        block = partial(
            programs.decode, eos=self._eos, config=self.model, layout=self.layout, steps=steps, mesh=self.mesh
        )
        enough = array(i32, split=False)
        return jax.jit(block, donate_argnums=1, out_shardings=(None, where)).lower(
            weights, cache, slots, enough, banned, filtering
        )
