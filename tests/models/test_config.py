"""config.json in and out: what is read, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig
from azr_jax.models.rope import Rope
from azr_jax.models.sizes import published_size
from azr_jax.models.transformer import Spec, param_specs

GOLDEN = Path(__file__).parents[1] / "golden"

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
    assert ModelConfig.from_hf(fields | rope, "").rope == Rope(5e5)
    assert ModelConfig.from_hf(fields, "").rope == Rope(10000.0)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_round_trip(name):
    """What we write is what we read, from the file `transformers` wrote and from ours."""
    config = ModelConfig.load(GOLDEN / name)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())), "") == config


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_transformers_reads_what_we_write(name):
    config = ModelConfig.load(GOLDEN / name)
    fields = config.to_hf()
    theirs = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert ModelConfig.from_hf(theirs.to_dict(), "") == config, "in its new form: nested rope_parameters, layer_types"


def test_older_forms_of_gemma():
    """Before transformers 5: separate bases, a pattern instead of a list; with vision: a sparse text_config."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = ModelConfig.from_hf({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "")
    assert config == ModelConfig.from_hf(text, "") == published_size("gemma-3-4b")
    assert config.rope == Rope(1e6, "linear", 8.0) and config.local_rope == Rope(1e4)
    assert [i for i, slides in enumerate(config.sliding_layers) if not slides] == [5, 11, 17, 23, 29]
    assert config.query_scale == 1 / 16 and config.embed_scale == 2560**0.5 and config.tie_word_embeddings


def test_qwen_windows_start_at_max_window_layers():
    fields = QWEN_3B | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 30}
    config = ModelConfig.from_hf(fields, "")
    assert config.sliding_layers == (False,) * 30 + (True,) * 6 and config.sliding_window == 8
    assert ModelConfig.from_hf(fields | {"max_window_layers": 36}, "").sliding_layers == ()


PUBLISHED = {  # numbers of weights in the published checkpoints
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-coder-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert published_size(name).num_params == PUBLISHED[name]


def test_unknown_size_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match="qwen2.5-7b"):
        published_size("gpt-7")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_num_params_counts_the_declared_weights(name):
    config = ModelConfig.load(GOLDEN / name)
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
        ({"use_sliding_window": True}, "sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["chunked_attention"]}, "layer_types"),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"]}, "one entry a layer"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "at least 1"),
        ({"rope_scaling": {"type": "yarn"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "RoPE scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8}}, "lacks 'low_freq_factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "much"}}, "no number"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": "linear"}, "RoPE scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "impossible values"),
        ({"rope_theta": -1}, "impossible values"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"vocab_size": float("inf")}, "impossible one"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear"}}, "full_attention"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is not supported in llama"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is not supported in qwen3"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0, "sliding_window": 4}, "attn_logit_softcapping"),
        ({"model_type": "gemma3_text", "hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ({"vocab_size": "many"}, "many"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
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
