"""Command-line tools for checkpoints; the library code is in `megatron_oprd.weights`."""

import os

# Tensors are read into freshly allocated memory. With transparent huge pages the kernel provides it
# in a quarter of the time. torch checks this variable on its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
