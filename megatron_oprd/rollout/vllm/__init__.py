"""Rollouts by vLLM: engine, server and client, and the weight transfer to vLLM's workers."""
