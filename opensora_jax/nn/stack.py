"""A scanned stack of equal blocks: one compiled layer whatever the depth, with rematerialisation for the first layers.

Unrolled layers take two to three times longer to compile. The parameters of all layers lie stacked on a leading axis.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class Stack(nnx.Module):
    """`depth` blocks made by `make_block(rngs)`; the first `remat` of them recompute their activations backwards.

    Source: `grad_ckpt_settings` in Open-Sora 2.0 counts the checkpointed blocks in the same way.
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, *, remat: int = 0, rngs: nnx.Rngs):
        self.depth, self.remat = depth, min(remat, depth)
        build = nnx.split_rngs(splits=depth)(nnx.vmap(make_block, axis_size=depth))
        self.blocks = build(rngs)

    def __call__(self, x: Any, *shared: Any) -> Any:
        """Returns `x` after every block in turn; `block(x, *shared)` maps a pytree to one of the same shapes."""
        graphdef, layers = nnx.split(self.blocks)

        def body(carry, layer):
            return nnx.merge(graphdef, layer)(carry, *shared), None

        for step, part in (
            (jax.checkpoint(body, prevent_cse=False), slice(0, self.remat)),
            (body, slice(self.remat, self.depth)),
        ):
            if part.start < part.stop:
                x, _ = jax.lax.scan(step, x, jax.tree.map(lambda leaf, part=part: leaf[part], layers))
        return x
