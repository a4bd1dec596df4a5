"""Cost of a run from configurations alone: memory, communication, FLOPs and time."""
