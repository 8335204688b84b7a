"""Text and video tokens on devices that share a sample: how many each has, and which of them are padding.

Every device has an equal part of the text and an equal part of the video, and concatenates its own: joining the two
then moves nothing, where a concatenation of split arrays would cost exchanges between all devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool


class SharedTokens(NamedTuple):
    """So many text and video tokens of a sample, over the `shards` devices along a mesh axis."""

    text: int
    video: int
    axis: str
    shards: int

    @property
    def real(self) -> Bool[np.ndarray, "shards L"] | None:
        """Returns which of every device's tokens, text first, are no padding; None when there is no padding."""
        if self.text % self.shards == 0 and self.video % self.shards == 0:
            return None
        parts = [np.arange(-(-count // self.shards) * self.shards) < count for count in (self.text, self.video)]
        return np.concatenate([part.reshape(self.shards, -1) for part in parts], axis=1)


def length(tokens: Any) -> int:
    """Returns how many tokens a tree of arrays `(B) L C` has."""
    return jax.tree.leaves(tokens)[0].shape[-2]


def pad(tokens: Any, shards: int) -> Any:
    """Returns a tree of arrays `(B) L C` with zeros at the end of each, so that L divides by the number of shards."""
    missing = -length(tokens) % shards
    if not missing:
        return tokens

    def padded(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, missing), (0, 0)])

    return jax.tree.map(padded, tokens)


def token_specs(tokens: Any, rows: tuple[str, ...], columns: str | None) -> Any:
    """Returns how arrays `(B) L C` are split: samples over the mesh axes `rows`, tokens over `columns`."""
    return jax.tree.map(lambda leaf: PartitionSpec(rows, columns) if leaf.ndim == 3 else PartitionSpec(columns), tokens)
