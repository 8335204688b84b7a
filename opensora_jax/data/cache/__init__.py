"""Latents and text embeddings on disk, keyed by what they were made of."""
