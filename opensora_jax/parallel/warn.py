"""Warnings about what a mesh does not share out: once each, however often a function is traced."""

import functools
import logging


@functools.cache
def warn_once(text: str, *values: object) -> None:
    """Logs a warning, with values for its placeholders, unless the same was logged before."""
    logging.getLogger("absl").warning(text, *values)
