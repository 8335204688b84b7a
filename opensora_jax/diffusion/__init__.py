"""Rectified flow, guidance, conditions and the sampler, on arrays alone."""
