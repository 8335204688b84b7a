"""Clips packed into ArrayRecord files that TFDS reads."""
