"""config.json in and out: what is read, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Spec, param_specs

QWEN_3B = {  # the keys of Qwen2.5-3B's config.json that describe its shape
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "max_window_layers": 36,
    "vocab_size": 151936,
}


def test_reads_a_published_config():
    config = ModelConfig.from_hf(QWEN_3B, "config.json")
    assert config == ModelConfig(151936, 2048, 11008, 36, 16, 2, 128)
    assert config.num_params == 3_085_938_688  # as the checkpoint's index counts them


def test_rope_theta_where_newer_versions_write_it():
    fields = {key: value for key, value in QWEN_3B.items() if key != "rope_theta"}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert ModelConfig.from_hf(fields | rope, "").rope_theta == 5e5
    assert ModelConfig.from_hf(fields, "").rope_theta == 10000.0


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied):
    config = ModelConfig(64, 32, 48, 2, 4, 2, 10, rope_theta=123.0, rms_norm_eps=1e-5, tie_word_embeddings=tied)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())), "") == config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_num_params_counts_the_declared_weights(tied, bias):
    config = ModelConfig(64, 32, 48, 3, 4, 2, 10, tie_word_embeddings=tied, attention_bias=bias)
    total = 0

    def count(specs: dict) -> None:
        nonlocal total
        for spec in specs.values():
            if isinstance(spec, Spec):
                size = 1
                for n in spec.shape:
                    size *= n
                total += size
            else:
                count(spec)

    count(param_specs(config))
    assert config.num_params == total


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "RoPE scaling"),
        ({"rope_scaling": "linear"}, "RoPE scaling"),
        ({"vocab_size": "many"}, "many"),
        ({"hidden_size": None}, "number"),
        ({"num_attention_heads": 0}, "division"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim"),
    ],
)
def test_refused_by_name(changes, named):
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(QWEN_3B | changes, "here/config.json")
    message = str(error.value)
    assert named in message and message.startswith("here/config.json: ") and "\n" not in message


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_missing_key_is_named(key):
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        ModelConfig.from_hf({name: value for name, value in QWEN_3B.items() if name != key}, "config.json")


@pytest.mark.parametrize(
    ("text", "said"), [(None, "not found"), ("{torn", "cannot be read"), ("[]", "not a JSON object")]
)
def test_bad_file(tmp_path: Path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        ModelConfig.load(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
