"""Writes tests/golden/update: one policy-gradient step on a golden model, in plain PyTorch.

    /tmp/torchenv/bin/python tests/golden/make_update.py     # the environment of make_models.py

Nothing is packed, chunked, accumulated or sharded here: one sequence after the other through `transformers`, the
clipped loss with its entropy bonus averaged over response tokens as the formulas have it, the gradient clipped by its
global norm, one step of torch.optim.AdamW that decays matrices only. The test makes the same step with ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
TEMPERATURE, CLIP_LOW, CLIP_HIGH, ENTROPY = 0.8, 0.2, 0.28, 0.01
LR, BETAS, DECAY, NORM = 1e-3, (0.9, 0.95), 0.1, 0.5
SIZES = [(5, 9), (3, 12), (8, 1), (2, 6), (11, 7)]  # prompt and response tokens


def main() -> None:
    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(HERE / "qwen2_untied", dtype=torch.float32).eval()
    decayed = [w for w in model.parameters() if w.ndim > 1]
    rest = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8)
    arrays: dict[str, np.ndarray] = {"advantages": rng.normal(size=len(SIZES)).astype(np.float32)}
    total, tokens = torch.zeros(()), 0
    for i, (prompt, response) in enumerate(SIZES):
        ids = torch.from_numpy(rng.integers(0, 64, prompt + response))
        logp = torch.log_softmax(model(ids[None]).logits[0, prompt - 1 : -1] / TEMPERATURE, dim=-1)  # [R, V]
        chosen = logp[torch.arange(response), ids[prompt:]]
        old = (chosen.detach() + torch.from_numpy(rng.normal(0, 0.2, response))).float()
        ratio, advantage = torch.exp(chosen - old), float(arrays["advantages"][i])
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
        entropy = -(logp.exp() * logp).sum(dim=-1)
        total = total - (surrogate + ENTROPY * entropy).sum()
        tokens += response
        arrays |= {f"tokens_{i}": ids.numpy().astype(np.int32), f"old_{i}": old.numpy()}
    loss = total / tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
    assert norm > NORM, "a gradient that is not clipped would not test the clip"
    optimizer.step()
    arrays |= {"loss": loss.detach().numpy(), "norm": norm.numpy()}
    arrays |= {f"after/{name}": weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    (HERE / "update").mkdir(exist_ok=True)
    save_file(arrays, HERE / "update" / "step.safetensors")


if __name__ == "__main__":
    main()
