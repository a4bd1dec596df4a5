"""Stages 0 and 1 of OPRD-Bridge: rollouts, both models on them, the fit, and its report."""
