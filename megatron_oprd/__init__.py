"""On-policy representation distillation (OPRD, arXiv:2606.06021) on Megatron-Core."""

__version__ = "0.1.0"
