"""Hidden-state taps: which layers, which positions, and the modules that collect and compare."""
