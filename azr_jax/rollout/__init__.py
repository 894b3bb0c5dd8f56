"""Sampling from the policy: requests in, completions with their log-probabilities out."""
