"""The policy: model configuration, transformer, weights in and out, tokenizer, the embedded model."""
