"""Reading and writing published checkpoints."""
