"""The table of clips: what there is, and what probing found of it."""
