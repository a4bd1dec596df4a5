"""The method: which layers and positions are compared, taps, losses and bridges."""
