"""Attention kernels behind one call; imports JAX only."""
