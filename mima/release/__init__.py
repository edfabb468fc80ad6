"""Results as ordinary models: diffusers folders, deltas, model cards, the hub."""
