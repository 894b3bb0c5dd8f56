"""Memory and work of a run's three programs by arithmetic: from shapes, nothing compiled, no devices needed.

Serves GPUs, where nothing can be compiled without one, the search for a change that fits, and the flops and bytes of
every roofline (a compiler's own cost analysis counts the body of a loop once). docs/hardware.md says how far its bytes
are from the compiler's. Of arrays it counts those that matter: weights, moments, gradients, what a backward pass keeps,
one block's and one chunk of logits' worth of temporaries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from azr_jax.config import Config, RolloutConfig
from azr_jax.dist.mesh import AXES, mesh_sizes
from azr_jax.dist.sequence import token_sharding
from azr_jax.learn.logprobs import chunk_tokens
from azr_jax.learn.prepare import most_micro, most_trajectories, row_tokens
from azr_jax.learn.state import param_shardings
from azr_jax.learn.step import micro_rows
from azr_jax.learn.throughput import flops_a_token
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Params, Spec, param_specs
from azr_jax.plan_hardware import Target
from azr_jax.rollout import sizing
from azr_jax.rollout.cache import Layout
from azr_jax.rollout.weights import copy_shapes, decode_sizes
from azr_jax.tasks.kinds import KINDS

PROGRAMS = ("prefill", "decode", "update")

#: Of the longest prompt and response: the mean one. Runs of the paper's sizes start near 1,000 of 8,096 tokens.
MEAN_SHARE = 1 / 8
VALID_SHARE = 0.5  # of proposals
PADDING = 0.05  # of packed rows
REACHED = 0.5  # of a roofline, by a real program; not measured yet


@dataclass(frozen=True)
class Bytes:
    """Of one chip, as XLA's memory analysis counts them: outputs that take over an argument's memory are `alias`."""

    argument: float
    temp: float
    output: float
    alias: float

    @property
    def total(self) -> float:
        """What the program needs while it runs."""
        return self.argument + self.temp + self.output - self.alias


class Setup:
    """A config on a target: meshes, what lies where, how large the cache is. ConfigError: the mesh does not fit."""

    def __init__(self, config: Config, model: ModelConfig, target: Target) -> None:
        self.config, self.model, self.target = config, model, target
        self.dtype = config.learn.dtype
        self.mesh = _abstract(mesh_sizes(config.mesh, target.chips))
        self.host_mesh = _abstract(decode_sizes(model, target.host_chips))
        self.shards = int(self.host_mesh.shape["data"])
        self.slots = sizing.slots(config.rollout, self.shards)  # of a host
        self.row_tokens = row_tokens(config)
        self.rows = micro_rows(config, self.mesh)

    @property
    def attention(self) -> str:
        """The kernel of training and prefill that the target would run."""
        kernel = {"tpu": "splash", "gpu": "cudnn" if self.dtype == "bfloat16" else "xla", "cpu": "xla"}
        return kernel[self.target.chip.platform] if self.config.attention == "auto" else self.config.attention

    @cached_property
    def weights(self) -> float:
        """Bytes a chip of one float32 copy of the weights as the learner lays them out."""
        return 4.0 * _shard_sizes(param_specs(self.model), param_shardings(self.model, self.mesh))

    @property
    def moments(self) -> float:
        """Bytes a chip of both of Adam's."""
        return 2 * self.weights * jnp.dtype(self.config.learn.moments_dtype).itemsize / 4

    @property
    def resident(self) -> float:
        """Bytes a chip that the learner holds while the sampler works."""
        reference = self.compute_copy if self.config.learn.kl != "none" else 0
        return self.weights + reference + (0 if self.config.learn.offload else self.moments)

    @property
    def compute_copy(self) -> float:
        """Bytes a chip of the learner's weights in the type of its products, if that is another than the master's."""
        return 0 if self.dtype == "float32" else self.weights / 2

    @cached_property
    def copy(self) -> float:
        """Bytes a chip of the sampler's weights."""
        leaves = jax.tree.leaves(copy_shapes(self.model, self.host_mesh, self.dtype))
        return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))

    @cached_property
    def room(self) -> float:
        """Bytes a chip that the cache may take: `rollout.cache_gb`, or the engine's share of what is free by then."""
        if self.target.chip.platform == "cpu":
            free = sizing.HOST_SHARE * self.target.chip.usable
        else:
            free = sizing.DEVICE_SHARE * max(self.target.chip.usable - self.resident - self.copy, 0.0)
        return sizing.cache_room(*self._cache_sizes, free)

    @cached_property
    def layout(self) -> Layout:
        """Of a host's cache. Where there is no room for the longest sequence it gets that nevertheless."""
        least = sizing.least_pages(self.config.rollout) * self._page_bytes
        pages = sizing.page_count(*self._cache_sizes, max(self.room, least))
        return self._empty._replace(pages=pages)

    @property
    def starved(self) -> bool:
        """Whether there is no room for one sequence of the greatest length."""
        return self.cache > self.room

    @property
    def cache(self) -> float:
        """Bytes a chip of the cache."""
        return self.layout.pages * self._page_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that a host's cache holds."""
        return self.layout.pages * self.layout.page * self.shards

    @property
    def _empty(self) -> Layout:
        """The cache's layout before it has pages."""
        kind = sizing.cache_kind(self.attention, self.target.chip.platform)
        return sizing.cache_layout(self.config.rollout, kind, self.shards, self.dtype)

    @property
    def _cache_sizes(self) -> tuple[RolloutConfig, ModelConfig, Layout, Any, int]:
        """What the rules of rollout.sizing go by; slots are those of a shard."""
        return self.config.rollout, self.model, self._empty, self.host_mesh, self.slots // self.shards

    @property
    def _page_bytes(self) -> float:
        return sizing.page_bytes(self.model, self._empty, self.host_mesh)

    def bytes_of(self, program: str) -> Bytes:
        """What a program needs on a chip, besides what the learner holds."""
        return {"prefill": self._prefill, "decode": self._decode, "update": self._update}[program]()

    def _prefill(self) -> Bytes:
        tokens = self.prefill_rows // self.shards * sizing.prompt_buckets(self.config.rollout)[-1]
        temp = tokens * self._block_bytes(self.host_mesh.shape["tensor"])
        return Bytes(self.copy + self.cache, temp, self.cache, self.cache)

    def _decode(self) -> Bytes:
        tensor = self.host_mesh.shape["tensor"]
        rows = self.slots // self.shards
        temp = rows * (self._block_bytes(tensor) + 3 * 4 * self.model.vocab_size / tensor)
        temp += sizing.working_bytes(*self._cache_sizes)
        return Bytes(self.copy + self.cache, temp, self.cache, self.cache)

    def _update(self) -> Bytes:
        """State; float32 gradient; then either the backward pass of a micro-batch or the optimizer's step."""
        learn, model = self.config.learn, self.model
        size, tensor = jnp.dtype(self.dtype).itemsize, self.mesh.shape["tensor"]
        tokens = self.rows // (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) * self.row_tokens
        inputs = token_sharding(self.mesh, self.row_tokens).shard_shape((self.rows, self.row_tokens, model.hidden_size))
        kept = {"block": 0.0, "dots": 0.6, "none": 1.0}[learn.remat]  # of a block's arrays, besides its input
        activations = model.num_layers * (math.prod(inputs) * size + kept * tokens * self._block_bytes(tensor))
        table = model.vocab_size * model.hidden_size * size / tensor  # of embeddings, whole rows of it
        logits = 3 * 4 * chunk_tokens(model) * model.vocab_size / tensor
        backward = self.compute_copy * 2 if self.compute_copy else self.weights  # the weights and their gradient
        backward += activations + tokens * self._block_bytes(tensor) + logits
        backward += table if self.mesh.shape["fsdp"] > 1 else 0.0
        state = self.weights + (0 if learn.offload else self.moments)
        optimizer = self.moments if learn.offload else 0.0  # they visit
        rows = 8 * 4 * self.micro_batches_at_most * tokens  # eight arrays of a packed batch
        reference = self.compute_copy if learn.kl != "none" else 0
        return Bytes(state + rows + reference, self.weights + max(backward, optimizer), state, state)

    def _block_bytes(self, tensor: int) -> float:
        """What one token's way through a block holds at once."""
        model, size = self.model, jnp.dtype(self.dtype).itemsize
        heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim / tensor
        return size * (4 * model.hidden_size + heads + 3 * model.intermediate_size / tensor)

    @property
    def prefill_rows(self) -> int:
        """Prompts of the longest prefill."""
        rollout = self.config.rollout
        bucket = sizing.prompt_buckets(rollout)[-1]
        return sizing.prefill_rows(rollout, bucket, self.slots, self.shards, self.target.chip.platform)

    @property
    def micro_batches_at_most(self) -> int:
        """The static number of micro-batches."""
        return most_micro(self.config, self.rows)

    # Work: flops and bytes of memory traffic, a chip and call.

    @property
    def mean_prompt(self) -> float:
        """Assumed tokens of a prompt."""
        return max(1.0, self.config.rollout.max_prompt * MEAN_SHARE)

    @property
    def mean_response(self) -> float:
        """Assumed tokens of a response."""
        return max(1.0, self.config.rollout.max_response * MEAN_SHARE)

    @property
    def active(self) -> float:
        """Sequences decoding at once on a host, if there are so many: the slots, or what the cache has room for."""
        return min(float(self.slots), self.kv_tokens / (self.mean_prompt + self.mean_response))

    @property
    def update_tokens(self) -> float:
        """Prompt and response tokens that a step trains on."""
        return most_trajectories(self.config) * (self.mean_prompt + self.mean_response)

    def work_of(self, program: str) -> tuple[float, float]:
        """(flops, bytes) on a chip of one prefill, one block of decoding, or a step's whole update.

        Products with weights are 2 a weight and token forward, 4 backward, 2 again where blocks are recomputed;
        attention is 4 a head column, query and key seen. Bytes: weights once a pass, the cache that is read or written,
        the optimizer's state twice; activations that stay on the chip are not counted.
        """
        model, rollout = self.model, self.config.rollout
        products, scores = self._flops
        head = 2.0 * model.vocab_size * model.hidden_size
        tensor = self.host_mesh.shape["tensor"]
        if program == "prefill":
            each = sizing.prompt_buckets(rollout)[-1]
            padded = self.prefill_rows // self.shards * each
            whole = (model.num_layers - 1) / model.num_layers  # of the last layer only keys and values are wanted
            flops = padded * (products - head + scores * each / 2) * whole
            return flops / tensor, self.copy + padded * self._kv_bytes
        if program == "decode":
            flops, traffic = self._token_work(self.active)
            return rollout.block * flops, rollout.block * traffic
        passes = 4 if self.config.learn.remat == "block" else 3
        tokens = self.update_tokens / (1 - PADDING)
        mean = self.mean_prompt + self.mean_response
        flops = passes * tokens * (products + scores * mean / 2) / self.target.chips
        micro = math.ceil(tokens / (self.row_tokens * self.rows))
        gathered = (self.compute_copy or self.weights) * self.mesh.shape["fsdp"]
        traffic = micro * (passes * gathered + 2 * self.weights) + 2 * (self.weights + self.moments)
        return flops, traffic

    @property
    def _flops(self) -> tuple[float, float]:
        """Of a token forward: of products with weights, and of attention for each key that it sees."""
        model = self.model
        return flops_a_token(model) / 3, 4.0 * model.num_heads * model.head_dim * model.num_layers

    @property
    def _kv_bytes(self) -> float:
        """Bytes a chip of one token's keys and values."""
        return self._page_bytes / self.layout.page

    def _token_work(self, sequences: float) -> tuple[float, float]:
        """(flops, bytes) on a chip of one token for each of so many sequences of a host."""
        products, scores = self._flops
        rows, seen = sequences / self.shards, self.mean_prompt + self.mean_response / 2
        flops = rows * (products + scores * seen) / self.host_mesh.shape["tensor"]
        return flops, self.copy + rows * seen * self._kv_bytes

    def roofline(self, program: str) -> float:
        """Least seconds of a program: its flops or its bytes at the chip's peak rates, whichever takes longer."""
        return self._least_seconds(*self.work_of(program))

    def _least_seconds(self, flops: float, traffic: float) -> float:
        return max(flops / self.target.chip.flops, traffic / self.target.chip.bandwidth)

    def _token_seconds(self, sequences: float) -> float:
        """Expected between two tokens of a sequence, where so many decode at once on a host."""
        return self._least_seconds(*self._token_work(sequences)) / REACHED

    def expected(self) -> dict[str, Any]:
        """Tokens a second and seconds of a step, with what was assumed.

        Decoding waits twice, for proposals and then for solutions, of which a host has a share that may leave slots
        empty. No step is shorter than its longest response takes alone.
        """
        tasks, rollout, hosts = self.config.tasks, self.config.rollout, self.target.hosts
        proposals = len(KINDS) * tasks.batch
        prompts = 2 * proposals + VALID_SHARE * proposals  # the samples of a task share its prompt
        solutions = proposals + VALID_SHARE * proposals * tasks.samples
        shares = (proposals / hosts, solutions / hosts)
        at_once = [min(self.active, share) for share in shares]
        bucket = self.prefill_rows * sizing.prompt_buckets(rollout)[-1]
        prefill = prompts * self.mean_prompt / bucket * self.roofline("prefill") / REACHED / hosts
        decode = self.mean_response * sum(
            share / live * self._token_seconds(live) for share, live in zip(shares, at_once)
        )
        update = self.roofline("update") / REACHED
        return {
            "decode_tokens_per_second": (proposals + solutions) * self.mean_response / decode,
            "update_tokens_per_second": self.update_tokens / update,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "update_seconds": update,
            "step_seconds": prefill + decode + update,
            "longest_response_seconds": rollout.max_response * self._token_seconds(1),
            "assumptions": {
                "mean_prompt_tokens": self.mean_prompt,
                "mean_response_tokens": self.mean_response,
                "valid_share_of_proposals": VALID_SHARE,
                "padding_share_of_rows": PADDING,
                "share_of_roofline_reached": REACHED,
                "proposals_at_once_on_a_host": at_once[0],
                "solutions_at_once_on_a_host": at_once[1],
            },
        }


def _abstract(sizes: dict[str, int]) -> Any:
    """A mesh without devices; annotated Any, since functions that only read shapes are typed for real ones."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _shard_sizes(specs: Params, shardings: Params) -> int:
    """Weights that lie on one chip."""
    leaves: list[Spec] = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, Spec))
    places: list[NamedSharding] = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, NamedSharding))
    return sum(math.prod(place.shard_shape(spec.shape)) for spec, place in zip(leaves, places, strict=True))
