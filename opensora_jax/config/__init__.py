"""Errors, checked config sections and the frame around every command; imports no JAX."""
