"""Writing, reading and validating checkpoints; pretrained weights."""
