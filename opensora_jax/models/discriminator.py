"""The critic of adversarial training: a patch discriminator over space and time, as in pix2pix but three-dimensional.

Source: hpcaitech/Open-Sora, `opensora/models/vae/discriminator.py`; Isola et al. 2017 (arXiv:1611.07004).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from opensora_jax.models.sizes import check_least
from opensora_jax.nn.conv import Conv
from opensora_jax.nn.conv3d import Triple
from opensora_jax.nn.norm import BatchNorm

LEAK = 0.2  # slope below zero
GROWTH = 8  # the widest layers have so many times `ndf` channels
Normalise = Callable[[str, BatchNorm, Array], Array]  # (place, norm, x) -> x
normal = nnx.initializers.normal(0.02)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Channels of the video, channels of the first layer, how many layers shrink the clip, rate of dropout."""

    input_nc: int
    ndf: int
    n_layers: int
    dropout: float

    def __post_init__(self):
        """Check what the layers rely on."""
        check_least(self, 1, "input_nc", "ndf", "n_layers")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is at least 0 and below 1: got {self.dropout}.")

    @property
    def strides(self) -> tuple[Triple, ...]:
        """(time, height, width) stride of every convolution but the last, which has none."""
        return (*[(2, 2, 2) if i < 2 else (1, 2, 2) for i in range(self.n_layers)], (1, 1, 1))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after every convolution but the last, which gives one."""
        return tuple(self.ndf * min(2**i, GROWTH) for i in range(self.n_layers + 1))


class Discriminator(nnx.Module):
    """Logits of patches, high for real video: convolutions with batch norm and dropout behind all but first and last.

    `main` has the published places of the layers in their sequence. The norms have running statistics: `__call__`
    uses them, `in_training` uses those of the batch and returns what the running ones become.
    """

    def __init__(self, config: DiscriminatorConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        conv = partial(Conv, kernel_size=(3, 3, 3), kernel_init=normal, dtype=dtype, rngs=rngs)
        widths, strides = config.widths, config.strides
        layers: dict[str, nnx.Module] = {"0": conv(config.input_nc, widths[0], strides=strides[0])}
        for i in range(1, len(widths)):  # between them lie activations and dropouts
            layers[f"{4 * i - 2}"] = conv(widths[i - 1], widths[i], strides=strides[i], bias=False)
            layers[f"{4 * i - 1}"] = BatchNorm(widths[i], rngs=rngs)
        layers[f"{4 * len(widths) - 2}"] = conv(widths[-1], 1)
        self.main = nnx.Dict(layers)

    def __call__(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B t h w 1"]:
        """Returns the logits of pixels in [-1, 1], without dropout."""
        return self._forward(video, lambda place, norm, x: norm(x), None)

    def in_training(
        self, video: Float[Array, "B T H W C"], masks: Sequence[Bool[Array, "B _t _h _w _c"]] | None
    ) -> tuple[Float[Array, "B t h w 1"], nnx.State]:
        """Returns the logits, and the running statistics (`nnx.BatchStat`) after this batch; the module keeps its own.

        `masks` (of `draw_masks`) say what the dropouts keep; without them nothing is dropped.
        """
        after: dict[Any, Array] = {}  # by path in the module

        def normalise(place: str, norm: BatchNorm, x: Array) -> Array:
            x, moved = norm.of_batch(x)
            after.update({("main", place, name): value for name, value in moved.items()})
            return x

        logits = self._forward(video, normalise, masks)
        stats = nnx.to_flat_state(nnx.state(self, nnx.BatchStat))
        return logits, nnx.from_flat_state([(path, leaf.replace(after[path])) for path, leaf in stats])

    def draw_masks(self, key: Array, video_shape: tuple[int, ...]) -> list[Bool[Array, "B _t _h _w _c"]]:
        """Returns what each dropout keeps of its input, for a batch of videos of a shape."""
        masks, (batch, *size, _) = [], video_shape
        for i, (strides, width) in enumerate(zip(self.config.strides, self.config.widths, strict=True)):
            size = [-(-n // stride) for n, stride in zip(size, strides, strict=True)]
            shape = (batch, *size, width)
            masks.append(jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.config.dropout, shape))
        return masks[1:]  # the first layer has no dropout

    def _forward(self, video: Array, normalise: Normalise, masks: Sequence[Array] | None) -> Array:
        *places, last = range(len(self.config.widths) + 1)
        x = jax.nn.leaky_relu(self.main["0"](video), LEAK)
        for i in places[1:]:
            place = f"{4 * i - 1}"
            norm = cast(BatchNorm, self.main[place])
            x = jax.nn.leaky_relu(normalise(place, norm, self.main[f"{4 * i - 2}"](x)), LEAK)
            if masks is not None:
                x = jnp.where(masks[i - 1], x / (1 - self.config.dropout), 0)
        return self.main[f"{4 * last - 2}"](x).astype(jnp.float32)
