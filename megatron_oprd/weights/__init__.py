"""Weights between Hugging Face folders and Megatron-Core models: one table, both directions."""
