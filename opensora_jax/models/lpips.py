"""LPIPS: how different two images look, as weighted distances between VGG16 features (Zhang et al. 2018).

Source: hpcaitech/Open-Sora, `opensora/models/vae/lpips.py`, after richzhang/PerceptualSimilarity (arXiv:1801.03924).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.nn.conv import Conv

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of colours in [-1, 1], to what VGG was trained on
EPS = 1e-10
SMALLEST = 16  # pixels: four times halved, one position is left
PLACES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # of the convolutions in VGG16's sequence
he = nnx.initializers.he_normal()


@dataclass(frozen=True)
class LPIPSConfig:
    """Channels of the five stages; those of VGG16 unless it is a small one for tests."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)

    def __post_init__(self):
        """Check what the layers rely on."""
        if len(self.widths) != len(PLACES):
            raise ValueError(f"widths has {len(PLACES)} numbers, one a stage: got {len(self.widths)}.")


class VGG16(nnx.Module):
    """The convolutions of VGG16 in five slices, named by their places in its published sequence."""

    def __init__(self, widths: tuple[int, ...], *, dtype: DTypeLike, rngs: nnx.Rngs):
        for i, (c_in, c_out, places) in enumerate(zip((3, *widths), widths, PLACES, strict=False)):
            convs = {
                f"{place}": Conv(c_in if n == 0 else c_out, c_out, (3, 3), kernel_init=he, dtype=dtype, rngs=rngs)
                for n, place in enumerate(places)
            }
            setattr(self, f"slice{i + 1}", nnx.Dict(convs))

    def slice(self, index: int, x: Float[Array, "B T H W C"]) -> Float[Array, "B T h w D"]:
        """Returns the features of a slice from those of the one before it; frames are images."""
        if index > 0:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2, 1), (1, 1, 2, 2, 1), "VALID")
        for place in PLACES[index]:
            x = jax.nn.relu(getattr(self, f"slice{index + 1}")[f"{place}"](x))
        return x


class LPIPS(nnx.Module):
    """Distance of two images, the sum of five; features are made again in the backward pass, not kept."""

    def __init__(self, config: LPIPSConfig = LPIPSConfig(), *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.net = VGG16(config.widths, dtype=dtype, rngs=rngs)
        weigh = partial(Conv, kernel_size=(1, 1), bias=False, kernel_init=equal_weights, dtype=jnp.float32, rngs=rngs)
        self.lins = nnx.List([weigh(width, 1) for width in config.widths])

    def __call__(self, a: Float[Array, "B T H W 3"], b: Float[Array, "B T H W 3"]) -> Float[Array, "B T"]:
        """Returns the distance of each frame of `a` to that of `b`; pixels are in [-1, 1].

        Raises: ValueError for images that are too small.
        """
        return jnp.sum(jnp.stack(self.distances(a, b)), axis=0)

    def distances(self, a: Float[Array, "B T H W 3"], b: Float[Array, "B T H W 3"]) -> list[Float[Array, "B T"]]:
        """Returns what each slice adds to the distance."""
        height, width = a.shape[2:4]
        if min(height, width) < SMALLEST:
            raise ValueError(
                f"LPIPS takes frames of {SMALLEST}x{SMALLEST} or more: got {height}x{width}; use larger ones."
            )
        found, a, b = [], to_vgg(a), to_vgg(b)
        for i in range(len(PLACES)):
            distance, a, b = jax.checkpoint(partial(self._slice, i))(a, b)
            found.append(distance)
        return found

    def _slice(self, index: int, a: Array, b: Array) -> tuple[Array, Array, Array]:
        """Returns the distance at a slice, and its features of both."""
        a, b = self.net.slice(index, a), self.net.slice(index, b)
        return self.lins[index]((unit(a) - unit(b)) ** 2).mean((-3, -2, -1)), a, b


def to_vgg(pixels: Float[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
    """Returns pixels in [-1, 1] on the scale of VGG's training."""
    return (pixels - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)


def unit(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Returns vectors of length 1 in float32; those of length 0 stay so, and their gradient stays finite."""
    x = x.astype(jnp.float32)
    squares = (x * x).sum(-1, keepdims=True)
    return x / (jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) + EPS)


def equal_weights(rng: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Returns equal weights whose sum is 1, for a distance that nothing is known about."""
    return jnp.full(shape, 1 / shape[-2], dtype)
