"""Tokens a second of the policy-gradient update, against the same step in PyTorch, in one run on this machine.

    pip install torch==2.13.0                                  # the CPU build, for the peer
    python benchmarks/train.py --out benchmarks/results/train.json

Both make the same optimizer step on the same model and the same trajectories (lengths from a heavy tail): clipped loss
with an exact entropy bonus, averaged over response tokens, AdamW in float32. We pack rows of 1,024 tokens, one a
micro-batch. The peer is what one writes with `transformers`: sequences sorted by length, padded micro-batches,
scaled-dot-product attention, logits of the responses only; it runs with micro-batches of several sizes, and the fastest
counts. Each runs in a process of its own, so that the peak memory is its own; the first step (compilation) is not
counted. Logits start from different random weights, so the losses are close, not equal; that the step is the same is
what tests/learn/test_torch.py shows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 16384, "max_position_embeddings": 2048}
LONGEST, COUNT, ROWS = 1024, 48, 1
PEER_MICRO_TOKENS = (512, 1024)  # padding included; a longer sequence is alone. 2,048 is slower by 0.15, 8,192 by 0.6
STEPS, WARM = 3, 1
CLIP, ENTROPY, LR, DECAY, NORM = 0.2, 0.001, 1e-6, 0.01, 1.0


def trajectories() -> list[tuple[np.ndarray, int, np.ndarray, float]]:
    """(token ids, prompt length, old log-probs of the response, advantage); log-normal lengths, as rollouts have."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(COUNT):
        prompt = int(np.clip(rng.lognormal(4.5, 0.5), 16, LONGEST // 2))
        response = int(np.clip(rng.lognormal(4.8, 0.9), 8, LONGEST - prompt))
        ids = rng.integers(0, SHAPE["vocab_size"], prompt + response).astype(np.int32)
        old = np.full(response, -np.log(SHAPE["vocab_size"]), np.float32)
        made.append((ids, prompt, old, float(rng.normal())))
    return made


def ours() -> dict[str, float]:
    """Seconds a step, loss of the first step."""

    from azr_jax.config import Config, LearnConfig, MeshConfig, RolloutConfig
    from azr_jax.dist.mesh import make_mesh
    from azr_jax.learn.packing import Trajectory, micro_bound, pack
    from azr_jax.learn.state import init_state
    from azr_jax.learn.step import make_update
    from azr_jax.models.config import ModelConfig
    from azr_jax.models.transformer import init_params

    model = ModelConfig.from_hf({"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e4} | SHAPE, "here")
    learn = LearnConfig(lr=LR, weight_decay=DECAY, grad_clip=NORM, entropy_coef=ENTROPY, remat="none")
    config = Config(learn=learn, rollout=RolloutConfig(max_prompt=LONGEST // 2, max_response=LONGEST // 2))
    mesh = make_mesh(MeshConfig())
    made = trajectories()
    batch = pack(
        [Trajectory(ids[:p], ids[p:], old, 0.0, 0) for ids, p, old, _ in made],
        [advantage for *_, advantage in made],
        LONGEST,
        ROWS,
        micro_bound(COUNT, LONGEST, LONGEST, ROWS),
    )
    state = init_state(init_params(model, 0), config, model, mesh)
    update = make_update(config, model, mesh)
    times, first = [], 0.0
    for step in range(WARM + STEPS):
        start = time.perf_counter()
        state, metrics = update(state, batch)
        times.append(time.perf_counter() - start)
        first = metrics["learner/loss"] if step == 0 else first
    return {"seconds": float(np.median(times[WARM:])), "loss": first, "padding": batch.padding_share}


def torch_peer(micro_tokens: int) -> dict[str, float]:
    """The same with PyTorch and `transformers`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_parameters=rope)).train()
    decayed = [w for w in model.parameters() if w.ndim > 1]
    rest = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    made = sorted(trajectories(), key=lambda item: -len(item[0]))
    batches: list[list[Any]] = [[]]
    for item in made:  # as many of like length as fit
        if batches[-1] and len(batches[-1][0][0]) * (len(batches[-1]) + 1) > micro_tokens:
            batches.append([])
        batches[-1].append(item)
    total = sum(len(old) for *_, old, _ in made)
    times, first = [], 0.0
    for step in range(WARM + STEPS):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for batch in batches:
            width = len(batch[0][0])
            ids, seen = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(2))
            for row, (tokens, *_) in enumerate(batch):
                ids[row, : len(tokens)], seen[row, : len(tokens)] = torch.from_numpy(tokens), 1
            hidden = model.model(ids, attention_mask=seen).last_hidden_state
            state = torch.cat([hidden[row, p - 1 : len(t) - 1] for row, (t, p, *_) in enumerate(batch)])
            target = torch.cat([torch.from_numpy(t[p:]).long() for t, p, *_ in batch])
            old = torch.cat([torch.from_numpy(o) for *_, o, _ in batch])
            advantage = torch.cat([torch.full((len(o),), a) for *_, o, a in batch])
            logp = torch.log_softmax(model.lm_head(state).float(), dim=-1)
            ratio = torch.exp(logp.gather(1, target[:, None])[:, 0] - old)
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            loss = -(surrogate - ENTROPY * (logp.exp() * logp).sum(dim=-1)).sum() / total
            loss.backward()
            value += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
        times.append(time.perf_counter() - start)
        first = value if step == 0 else first
    return {"seconds": float(np.median(times[WARM:])), "loss": first, "micro_tokens": micro_tokens}


def in_a_process(*side: str) -> dict[str, float]:
    """Figures of one side, with its peak resident memory in MB."""
    command = [sys.executable, __file__, "--side", *side]
    environment = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if args.side:
        found = ours() if args.side == ["ours"] else torch_peer(int(args.side[1]))
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sys.stdout.write(json.dumps(found) + "\n")
        return
    mines, peers = [], []
    for _ in range(2):  # taken in turns: the machine drifts
        mines.append(in_a_process("ours"))
        peers += [in_a_process("torch", str(size)) for size in PEER_MICRO_TOKENS]
    tokens = sum(len(ids) for ids, *_ in trajectories())
    mine, theirs = (min(sides, key=lambda side: side["seconds"]) for sides in (mines, peers))
    record = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/train.py",
        "machine": f"{os.cpu_count()} cores {platform.machine()}, {platform.processor() or 'CPU'}",
        "versions": {"python": platform.python_version()} | _versions(),
        "tokens": tokens,
        "ours": mine | {"tokens_per_second": tokens / mine["seconds"]},
        "torch": theirs | {"tokens_per_second": tokens / theirs["seconds"]},
        "all_of_torch": peers,
        "speed_ratio": theirs["seconds"] / mine["seconds"],
        "memory_ratio": theirs["peak_mb"] / mine["peak_mb"],
    }
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "torch", "transformers")}


if __name__ == "__main__":
    main()
