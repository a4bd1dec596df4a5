"""Command-line tools for checkpoints; the library code is in `megatron_oprd.weights`."""
