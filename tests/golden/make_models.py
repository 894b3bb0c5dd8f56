"""Writes tests/golden/<name>: tiny random models of every family, their logits and greedy texts by `transformers`.

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    /tmp/torchenv/bin/python tests/golden/make_models.py

Every weight is random, biases and norm gains too (their initial values 0 and 1 would hide a missing term). Attention
is grouped, heads are not always hidden_size / num_heads wide, windows are shorter than the sequences, scaled RoPE has
an original context shorter than they are. The logits are those of every sequence alone, in float32 with eager
attention; the tests compare them with separate, padded and packed rows of ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).parent
LENGTHS = (5, 9, 1, 12)
GREEDY = 64
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]

COMMON = {
    "vocab_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
WINDOWS = {"num_hidden_layers": 3, "layer_types": SLIDING_AND_FULL, "sliding_window": 4}


def configs() -> dict[str, PreTrainedConfig]:
    """Name of a golden folder -> its configuration."""
    tied, untied = COMMON | {"tie_word_embeddings": True}, COMMON | {"tie_word_embeddings": False}
    gemma_rope = {"full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": PLAIN}
    return {
        "qwen2_tied": Qwen2Config(**tied, hidden_size=32, head_dim=8, rope_parameters=PLAIN | {"rope_theta": 1e6}),
        "qwen2_untied": Qwen2Config(**untied, hidden_size=24, head_dim=10, rope_parameters=PLAIN),
        "qwen2_yarn_window": Qwen2Config(
            **(untied | WINDOWS), hidden_size=32, head_dim=8, rope_parameters=YARN, use_sliding_window=True
        ),
        "qwen3": Qwen3Config(**untied, hidden_size=24, head_dim=12, rope_parameters=LINEAR),
        "qwen3_tied": Qwen3Config(**tied, hidden_size=32, head_dim=16, rope_parameters=PLAIN),
        "llama": LlamaConfig(**untied, hidden_size=32, head_dim=8, rope_parameters=LLAMA3),
        "llama_tied": LlamaConfig(**tied, hidden_size=24, head_dim=6, rope_parameters=LLAMA3),
        "gemma3": Gemma3TextConfig(
            **(tied | WINDOWS), hidden_size=32, head_dim=12, rope_parameters=gemma_rope, query_pre_attn_scalar=10
        ),
    }


def random_model(name: str, seed: int):
    """The model called `name`, with activations of order 1."""
    model = AutoModelForCausalLM.from_config(configs()[name]).eval()
    generator = torch.Generator().manual_seed(seed)
    offset = 0.0 if name.startswith("gemma") else 1.0  # Gemma's gains are stored without the 1
    with torch.no_grad():
        for key, weight in model.named_parameters():
            mean = offset if "norm" in key else 0.0
            weight.copy_(mean + 0.3 * torch.randn(weight.shape, generator=generator))
    return model


def main() -> None:
    for seed, name in enumerate(configs()):
        model = random_model(name, seed)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        rng = np.random.default_rng(seed)
        arrays = {}
        for i, length in enumerate(LENGTHS):
            tokens = torch.from_numpy(rng.integers(0, 64, length))[None]
            with torch.no_grad():
                logits = model(tokens).logits[0]
                text = model.generate(
                    tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=GREEDY, do_sample=False
                )[0, length:]
            assert len(text) == GREEDY
            arrays |= {
                f"tokens_{i}": tokens[0].numpy().astype(np.int32),
                f"logits_{i}": logits.float().numpy(),
                f"greedy_{i}": text.numpy().astype(np.int32),
            }
        save_file(arrays, HERE / name / "expected.safetensors")


if __name__ == "__main__":
    main()
