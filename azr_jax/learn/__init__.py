"""The learner: rewards to advantages, trajectories to packed rows, packed rows to one exact optimizer step."""
