"""The training loop, one step of it, checkpoints, metrics."""
