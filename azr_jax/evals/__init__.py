"""Measuring the policy on tasks it never trained on."""
