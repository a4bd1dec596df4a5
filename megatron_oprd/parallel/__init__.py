"""Process groups, the layout of a run, and megatron-core on machines without CUDA."""
