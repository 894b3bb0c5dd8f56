"""Tasks of Absolute Zero: kinds, prompts, parsing, validation, rewards, buffers. Pure Python, never imports jax."""
