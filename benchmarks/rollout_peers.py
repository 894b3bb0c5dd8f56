"""The other sides of benchmarks/rollout.py: `transformers` and google-tunix, each in an interpreter of its own.

    python benchmarks/rollout_peers.py SIDE FOLDER     # FOLDER: a Hugging Face folder with work.json

Needs nothing but the library it measures, so that a side may live in another virtual environment. Every side gets what
its interface allows:

- transformers: batches in order of arrival, padded on the left, growing cache (faster here than the static one), every
  row marked done at its own length. A batch runs until its longest row is done.
- transformers_continuous: its continuous batching, with the same number of rows and room for all of them to be longest.
- tunix: batches of one size, prompts padded to the next power of two, as it does by default; each shape is compiled
  before. Its loop ends with the longest row of the batch, as if that row had met its end-of-sequence token: the limit
  is an argument of the compiled program.

None is told the lengths in advance: they are only where a request ends. None is asked for log-probabilities, which the
engine gives with every token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: (prompts, response lengths) -> responses, in the same order.
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "google-tunix", "numpy")
PAD = 0  # prompts do without it
PAGE = 64  # tokens; of 16, 64 and 256 the fastest here
PATIENCE = 600  # seconds without any result that mean there will be none


def measure(load: Callable[[], tuple[Generate, Callable[[], dict[str, Any]]]], work: dict[str, Any]) -> dict[str, Any]:
    """Load, generate one token of each request, which compiles all that is compiled, and then everything.

    `load` gives the generator and a function for its own counters.
    """
    started = time.perf_counter()
    generate, counters = load()
    loaded = time.perf_counter()
    # Prompts as long as those that are measured, but not the same: some sides remember what they have seen.
    generate([prompt[::-1] for prompt in work["prompts"]], [1] * len(work["prompts"]))
    before = counters()
    begun, busy = time.perf_counter(), time.process_time()
    outputs = generate(work["prompts"], work["lengths"])
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    assert [len(output) for output in outputs] == work["lengths"]
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "load_seconds": loaded - started,
        "one_token_seconds": begun - loaded,
        "tokens_per_second": sum(work["lengths"]) / seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "counters": difference(counters(), before),
        "versions": installed(),
        "outputs": outputs,
    }


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What counters gained."""
    return {name: value - before.get(name, 0) for name, value in after.items()}


def installed() -> dict[str, str]:
    """Versions of the packages that this interpreter has."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def batches(work: dict[str, Any], prompts: list[list[int]], lengths: list[int]) -> Iterator[tuple[Any, Any]]:
    """As many requests at a time as there are slots, in order of arrival."""
    for first in range(0, len(prompts), work["slots"]):
        chosen = slice(first, first + work["slots"])
        yield prompts[chosen], lengths[chosen]


def torch_model(folder: Path, work: dict[str, Any]) -> Any:
    """The model with `transformers`, on the device and in the dtype of the workload."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, work["dtype"]))
    return model.to(work["device"]).eval()


def transformers(folder: Path, work: dict[str, Any]) -> tuple[Generate, Callable[[], dict[str, Any]]]:
    """`generate`, batch by batch."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model = torch_model(folder, work)
    steps = 0

    class OwnLength(StoppingCriteria):
        def __init__(self, ends: torch.Tensor) -> None:
            self.ends = ends

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.ends <= ids.shape[1]

    def run(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        ends = width + torch.tensor(lengths, device=model.device)
        settings = GenerationConfig(do_sample=False, max_new_tokens=work["longest"], pad_token_id=PAD)
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=(ids != PAD).long(),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([OwnLength(ends)]),
            )
        return [row[width : width + length] for row, length in zip(found.tolist(), lengths, strict=True)]

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        nonlocal steps
        outputs = []
        for some, ends in batches(work, prompts, lengths):
            outputs += run(some, ends)
            steps += max(ends)
        return outputs

    return generate, lambda: {"steps": steps}


def transformers_continuous(folder: Path, work: dict[str, Any]) -> tuple[Generate, Callable[[], dict[str, Any]]]:
    """Its continuous batching: a request joins as soon as another has left."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = torch_model(folder, work)
    settings = GenerationConfig(do_sample=False, max_new_tokens=work["longest"], eos_token_id=-1, pad_token_id=PAD)
    sizes = {"max_requests_per_batch": work["slots"]}
    if work["device"] == "cpu":  # on a GPU it looks for itself what fits
        pages = -(-(work["longest_prompt"] + work["longest"]) // PAGE) + 1
        sizes |= {
            "page_size": PAGE,
            "num_blocks": work["slots"] * pages,
            "max_batch_tokens": 2 * work["longest_prompt"],
        }
    batching = ContinuousBatchingConfig(**sizes)

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        done: dict[str, list[int]] = {}
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
        while len(done) < len(prompts):
            result = manager.get_result(timeout=PATIENCE)
            if result is None or result.error:
                raise RuntimeError(f"no result: {result and result.error}")
            if result.is_finished():
                done[result.request_id] = result.generated_tokens
        return [done[str(index)] for index in range(len(prompts))]

    manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=batching)
    manager.start()
    return generate, dict


def tunix(folder: Path, work: dict[str, Any]) -> tuple[Generate, Callable[[], dict[str, Any]]]:
    """google-tunix's own sampler (the "vanilla" rollout of its trainer)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.generate.utils import next_power_of_2
    from tunix.models.qwen2.model import ModelConfig
    from tunix.models.qwen2.params import create_model_from_safe_tensors

    fields = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=int(fields["rope_theta"]),
        norm_eps=fields["rms_norm_eps"],
        use_tied_embedding=fields["tie_word_embeddings"],
        dtype=jnp.dtype(work["dtype"]),
        param_dtype=jnp.dtype(work["dtype"]),
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        model = create_model_from_safe_tensors(str(folder), config, mesh, dtype=jnp.dtype(work["dtype"]))
    steps = 0

    class Ids:
        """Stands in for the tokenizer: a prompt is its ids in decimal, no token ends a response."""

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return ""

        def bos_id(self) -> int:
            return 0  # none is put in front

        def eos_id(self) -> int:
            return -1

        def pad_id(self) -> int:
            return PAD

    class UntilLongest(Sampler):
        """Stops where the longest row of the batch would have met its end-of-sequence token."""

        last = 0

        def init_sample_state(self, *args: Any, **kwargs: Any) -> Any:
            state = super().init_sample_state(*args, **kwargs)
            return dataclasses.replace(state, total_sampling_steps=jnp.int32(self.last))

    room = next_power_of_2(work["longest_prompt"]) + work["longest"]
    cache = CacheConfig(room, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = UntilLongest(model, Ids(), cache)

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        nonlocal steps
        outputs = []
        for some, ends in batches(work, prompts, lengths):
            rows = [" ".join(map(str, prompt)) for prompt in some]
            rows += rows[-1:] * (work["slots"] - len(rows))  # the last batch may be short, its shape may not
            width = next_power_of_2(max(map(len, some)))
            sampler.last = width + max(ends) - 1
            found = sampler(rows, work["longest"], max_prompt_length=width, eos_tokens=[-1])
            outputs += [row[:end].tolist() for row, end in zip(found.tokens, ends, strict=False)]
            steps += max(ends)
        return outputs

    return generate, lambda: {"steps": steps}


SIDES = {side.__name__: side for side in (transformers, transformers_continuous, tunix)}


def report(side: Callable[[Path, dict[str, Any]], tuple[Generate, Callable[[], dict[str, Any]]]], folder: Path) -> None:
    """Measure a side and print its figures as the last line; a package that is missing is said so."""
    work = json.loads((folder / "work.json").read_text())
    try:
        figures = measure(lambda: side(folder, work), work)
    except ModuleNotFoundError as error:
        figures = {"absent": str(error)}
    sys.stdout.write("\n" + json.dumps(figures) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a manager's threads would wait for more requests


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    report(SIDES[given.side], given.folder)
