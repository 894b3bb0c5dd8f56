"""Writes tests/golden/qwen2_tied and qwen2_untied: two tiny random Qwen2 models and their logits by `transformers`.

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    /tmp/torchenv/bin/python tests/golden/make_qwen2.py

Every weight is random, biases and norm gains too (their initial values 0 and 1 would hide a missing term). Attention
is grouped, and the untied model's heads are not hidden_size / num_heads wide. The logits are those of every sequence
alone, in float32 with eager attention; the tests compare them with separate, padded and packed rows of ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
LENGTHS = (5, 9, 1, 12)
MODELS = {
    "qwen2_tied": {"hidden_size": 32, "head_dim": 8, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2_untied": {"hidden_size": 24, "head_dim": 10, "rope_theta": 1e4, "tie_word_embeddings": False},
}


def random_model(seed: int, hidden_size: int, head_dim: int, rope_theta: float, tie_word_embeddings: bool):
    """A Qwen2 with activations of order 1."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tie_word_embeddings,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            weight.copy_(mean + 0.3 * torch.randn(weight.shape, generator=generator))
    return model


def main() -> None:
    for seed, (name, shape) in enumerate(MODELS.items()):
        model = random_model(seed, **shape)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        rng = np.random.default_rng(seed)
        arrays = {}
        for i, length in enumerate(LENGTHS):
            tokens = rng.integers(0, 64, length)
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens)[None]).logits[0]
            arrays |= {f"tokens_{i}": tokens.astype(np.int32), f"logits_{i}": logits.float().numpy()}
        save_file(arrays, HERE / name / "expected.safetensors")


if __name__ == "__main__":
    main()
