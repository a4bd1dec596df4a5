"""Prompts, tokenizers and micro-batches."""
