"""azr_jax: Absolute Zero Reasoner (self-play without data, arXiv 2505.03335) on JAX."""

__version__ = "0.1.0"
