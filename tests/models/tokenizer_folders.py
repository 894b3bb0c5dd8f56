"""Tiny tokenizers as Hugging Face folders hold them, one for each kind of model, made without any download."""

from __future__ import annotations

import io
import json
from pathlib import Path

CORPUS = [
    "def f(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i)\n",
    "</answer> and <answer>, a user gives an assistant a task.\n",
    "The quick brown fox jumps over the lazy dog.\n",
] * 20

QWEN_CHAT = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
<think>

</think>

{%- endif %}
{% endif %}"""
LLAMA_CHAT = """\
{{- bos_token }}{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
GEMMA_CHAT = """\
{{- bos_token }}{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def byte_level(special: list[str], plain: list[str], vocab_size: int = 330):  # noqa: ANN202
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    fast.add_tokens([AddedToken(name, normalized=False) for name in plain])
    return fast


def save(folder: Path, fast, eos: object = None, **settings: object) -> None:  # noqa: ANN001
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=fast, **settings).save_pretrained(folder)
    if eos is not None:
        names = eos if isinstance(eos, list) else [eos]
        ids = [fast.token_to_id(name) for name in names]
        value = ids if isinstance(eos, list) else ids[0]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))


def qwen(folder: Path, chats: bool) -> None:
    """As Qwen2.5 and Qwen3: no BOS; base folders have a chat template too, but end with <|endoftext|>."""
    fast = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|fim_prefix|>", "<think>", "</think>"])
    eos: object = ["<|im_end|>", "<|endoftext|>"] if chats else "<|endoftext|>"
    own = "<|im_end|>" if chats else "<|endoftext|>"
    save(folder, fast, eos, eos_token=own, pad_token="<|endoftext|>", chat_template=QWEN_CHAT)


def llama3(folder: Path, chats: bool) -> None:
    """As Llama 3: the post-processor of tokenizer.json puts a BOS in front."""
    from tokenizers import processors

    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = byte_level(names, [])
    begin = fast.token_to_id(names[0])
    fast.post_processor = processors.TemplateProcessing(f"{names[0]} $A", special_tokens=[(names[0], begin)])
    eos = ["<|end_of_text|>", "<|eot_id|>"] if chats else "<|end_of_text|>"
    extra = {"chat_template": LLAMA_CHAT} if chats else {}
    save(folder, fast, eos, bos_token=names[0], eos_token=names[1], **extra)


def gemma(folder: Path) -> None:
    """As Gemma with only its `tokenizer.model`: byte fallback, no leading space, BOS, turns as user-defined pieces."""
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    _sentencepiece(folder, add_dummy_prefix=False, user_defined_symbols=[*turns, "\n\n", "<table>"], **ids, **pieces)
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"add_bos_token": True, "chat_template": GEMMA_CHAT})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))


def llama2(folder: Path, **settings: object) -> None:
    """As Llama 2 with only its `tokenizer.model`: byte fallback, a space in front of the text, BOS."""
    _sentencepiece(folder, add_dummy_prefix=True)
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))


def _sentencepiece(folder: Path, **options: object) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
