"""A scanned stack of equal blocks: one compiled layer whatever the depth, with rematerialisation for the first layers.

Unrolled layers take two to three times longer to compile. The parameters of all layers lie stacked on a leading axis;
where devices hold parts of them, the layers gather theirs one at a time, forwards and again backwards.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from opensora_jax.parallel.ring import ATTENTION, STATISTICS

BLOCK = "block"  # the name of what goes into a block

RESULTS = jax.checkpoint_policies.save_only_these_names(ATTENTION, STATISTICS)

# Of blocks that do not recompute: results of products and of attention. What lies between them is made again, which
# takes less time than reading it back; gathered weights are gathered again.
PRODUCTS = jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.dots_saveable, RESULTS)

RematPolicy = Literal["full", "save_attention", "offload"]
POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "save_attention": RESULTS,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[STATISTICS],  # small, and TPUs cannot fetch those of one sample
        names_which_can_be_offloaded=[BLOCK, ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Stack(nnx.Module):
    """`depth` blocks made by `make_block(rngs)`; the first `remat` of them recompute their activations backwards.

    Every block's input is kept for that. `policy` says what else is: nothing (`full`), the result of attention
    (`save_attention`), or that too, and all of it in the host's memory (`offload`). The other blocks keep the results
    of their products. Raises: ValueError for a negative `remat`.
    Source: `grad_ckpt_settings` in Open-Sora 2.0 counts the checkpointed blocks in the same way.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        *,
        remat: int = 0,
        policy: RematPolicy = "full",
        rngs: nnx.Rngs,
    ):
        if remat < 0:
            raise ValueError(f"remat counts the blocks that recompute, from 0 on: got {remat}.")
        self.depth, self.remat, self.policy = depth, min(remat, depth), policy
        build = nnx.split_rngs(splits=depth)(nnx.vmap(make_block, axis_size=depth))
        self.blocks = build(rngs)

    def __call__(self, x: Any, *shared: Any) -> Any:
        """Returns `x` after every block in turn; `block(x, *shared)` maps a pytree to one of the same shapes."""
        graphdef, layers = nnx.split(self.blocks)

        def body(carry, layer):
            named = jax.tree.map(partial(checkpoint_name, name=BLOCK), carry)
            return nnx.merge(graphdef, layer)(named, *shared), None

        for policy, part in (
            (POLICIES[self.policy], slice(0, self.remat)),
            (PRODUCTS, slice(self.remat, self.depth)),
        ):
            if part.start < part.stop:
                step = jax.checkpoint(body, policy=policy, prevent_cse=False)
                x, _ = jax.lax.scan(step, x, jax.tree.map(lambda leaf, part=part: leaf[part], layers))
        return x
