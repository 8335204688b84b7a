"""A function of a few entries of an axis at a time, where it knows each entry, or chunk of them, on its own.

Memory is then that of one chunk, and the result is the same.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

from opensora_jax.nn.convolve import on_several_devices

Function = Callable[[Array], Array]


def in_chunks(function: Function, x: Array, size: int | None, axis: int) -> Array:
    """Returns `function` of every `size` entries of an axis and of what is left, joined along it again.

    Whole chunks run one after the other in one loop, which is compiled once and needs the memory of one.
    """
    if size is None or x.shape[axis] <= size:
        return function(x)
    count = x.shape[axis] // size
    whole, rest = jnp.split(x, [count * size], axis)
    y = jnp.moveaxis(jax.lax.map(function, jnp.stack(jnp.split(whole, count, axis))), 0, axis)
    y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
    return jnp.concatenate([y, function(rest)], axis) if rest.shape[axis] else y


def cut(x: Array, size: int | None, axis: int) -> Iterator[Array]:
    """Yields the chunks of an axis, the last of which may be shorter."""
    length = x.shape[axis]
    for start in range(0, length, size or length):
        yield jax.lax.slice_in_dim(x, start, min(start + (size or length), length), axis=axis)


def of_images(function: Function, video: Float[Array, "B T H W C"], images: int | None) -> Float[Array, "B T _h _w _c"]:
    """Returns `function` of the frames of all videos as images, so many of them at a time (None: all).

    A chunk has frames of every video, which devices that share the videos have a part of each. Only on one device is
    it cut again where there are more videos than images.
    """
    batch = len(video)

    def of_frames(frames: Array) -> Array:
        flat = rearrange(frames, "B T H W C -> (B T) H W C")
        y = in_chunks(function, flat, None if on_several_devices(flat) else images, axis=0)
        return rearrange(y, "(B T) H W C -> B T H W C", B=batch)

    return in_chunks(of_frames, video, None if images is None else max(1, images // batch), axis=1)
