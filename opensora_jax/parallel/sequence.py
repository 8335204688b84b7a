"""Samples and tokens over devices: the inside of a model runs on each device's part, and attention reaches all tokens.

`per_device` runs a function on what a device holds: its samples (axes `data`, `fsdp`), its part of their text and video
tokens (`seq`, or `ring`) and its part of the parameters, which layers gather as they go (gather.py). Only `tensor` is
left to the compiler. The joint sequence comes in another order than on one device, which attention does not notice,
because rotations follow positions; `attend` is where devices exchange tokens. Where the samples of a data shard divide
by the axis of tokens, it splits these samples instead, and nothing is exchanged.
The mesh is that of JAX's context (`jax.set_mesh`). Without one, or on one device, the function is called as it is.

Sources: Jacobs et al. 2023 (DeepSpeed Ulysses, arXiv:2309.14509); ring.py, gather.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec, get_abstract_mesh
from jaxtyping import Float

from opensora_jax.config.errors import UserError
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.choice import left_to_compiler
from opensora_jax.parallel.gather import is_split_along_tensor, split_module
from opensora_jax.parallel.mesh import BATCH_AXES, TOKEN_AXES, check_heads, data_shards, token_axis
from opensora_jax.parallel.ring import ring_attention
from opensora_jax.parallel.tokens import SharedTokens, length, pad, token_specs
from opensora_jax.parallel.warn import warn_once

Heads = Float[Array, "B L N K"]
ONE_BY_ONE = 4  # samples of a device; each is a program of its own, so not more


def per_device(function: Callable, module: nnx.Module, text: Any, video: Any, samples: Any) -> Float[Array, "B L C"]:
    """Returns `function(module, text, video, samples, shared)`, which are video tokens.

    `text` and `video` are trees of arrays `(B) L C`, `samples` is a tree of arrays whose first axis is the batch. On a
    mesh the function sees a device's part of each; `shared` is for `attend`, and None without a mesh.
    Raises: UserError for a batch that the mesh cannot split.
    """
    mesh = get_abstract_mesh()
    if mesh.empty or data_shards(mesh) * mesh.shape[token_axis(mesh)] == 1:
        return function(module, text, video, samples, None)
    batch, axis = len(jax.tree.leaves(samples)[0]), token_axis(mesh)
    _check_batch(batch, mesh)
    whole = batch // data_shards(mesh) % mesh.shape[axis] == 0  # samples for every device
    shared = SharedTokens(length(text), length(video), axis, 1 if whole else mesh.shape[axis])
    rows, columns = ((*BATCH_AXES, axis), None) if whole else (BATCH_AXES, axis)
    text, video = pad(text, shared.shards), pad(video, shared.shards)
    params, specs, rebuild = split_module(module, mesh)

    def local(params: list[Array], text: Any, video: Any, samples: Any) -> Array:
        return function(rebuild(params), text, video, samples, shared)

    by_token = [token_specs(tokens, rows, columns) for tokens in (text, video)]
    by_sample = jax.tree.map(lambda _: PartitionSpec(rows), samples)
    split = jax.shard_map(
        local,
        in_specs=(specs, *by_token, by_sample),
        out_specs=PartitionSpec(rows, columns),
        axis_names={*BATCH_AXES, axis} if mesh.shape["tensor"] > 1 else set(mesh.axis_names),
        check_vma=False,  # gradients are then summed over `data` and `seq` here, in float32 and for all layers at once
    )
    found = jax.lax.with_sharding_constraint(split(params, text, video, samples), PartitionSpec(BATCH_AXES))
    return found[:, : shared.video]


def attend(q: Heads, k: Heads, v: Heads, shared: SharedTokens | None) -> Heads:
    """Returns attention of a device's queries over the tokens of all devices that share their samples.

    Raises: UserError for heads that the mesh cannot split.
    """
    mesh, method = get_abstract_mesh(), attention
    if shared is not None and shared.shards > 1:
        check_heads(q.shape[2], mesh)
        method = partial(METHODS[shared.axis], shared=shared)
    if not is_split_along_tensor():
        return method(q, k, v)
    heads = PartitionSpec(None, None, "tensor")
    if q.shape[2] % mesh.shape["tensor"]:
        heads = PartitionSpec()
        text = "the %d devices along mesh.tensor all compute all %d heads of attention, which they do not divide"
        warn_once(text, mesh.shape["tensor"], q.shape[2])
    # kernels run where no axis is left to the compiler, not even one of a single device
    left = left_to_compiler(mesh)
    return jax.shard_map(method, in_specs=(heads,) * 3, out_specs=heads, axis_names=left, check_vma=False)(q, k, v)


def ulysses(q: Heads, k: Heads, v: Heads, shared: SharedTokens) -> Heads:
    """Returns attention over all tokens: every device trades its tokens of all heads for all tokens of some heads.

    A few samples go one after the other: between the parts of one sample that devices send would lie those of others,
    and putting them together takes longer than the trade.
    """
    if 1 < len(q) <= ONE_BY_ONE:
        samples = zip(jnp.split(q, len(q)), jnp.split(k, len(k)), jnp.split(v, len(v)), strict=True)
        return jnp.concatenate([ulysses(*sample, shared) for sample in samples])
    trade = partial(jax.lax.all_to_all, axis_name=shared.axis, tiled=True)
    q, k, v = (trade(part, split_axis=2, concat_axis=1) for part in (q, k, v))
    mask = None if shared.real is None else jnp.asarray(shared.real.reshape(1, 1, 1, -1))
    return trade(attention(q, k, v, mask=mask), split_axis=1, concat_axis=2)


METHODS: dict[str, Callable[..., Heads]] = {TOKEN_AXES["ulysses"]: ulysses, TOKEN_AXES["ring"]: ring_attention}


def _check_batch(batch: int, mesh: AbstractMesh) -> None:
    if batch % data_shards(mesh):
        raise UserError(
            f"a batch of {batch} samples does not divide by mesh.data x mesh.fsdp = {mesh.shape['data']} x "
            f"{mesh.shape['fsdp']}: use a multiple, or a mesh that splits less"
        )
