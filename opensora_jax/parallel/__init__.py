"""Meshes, sharding rules and global batches: all that knows more than one device."""
