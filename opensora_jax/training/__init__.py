"""Losses, state, optimiser, loop and checkpoints."""
