"""Bridges between the hidden states of two models: how they are fitted, and their file."""
