"""Floor 1: the mathematics of flow-matching policies. Pure functions of tensors, no models, no I/O."""
