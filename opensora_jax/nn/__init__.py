"""Layers from which the models are built; they know no mesh."""
