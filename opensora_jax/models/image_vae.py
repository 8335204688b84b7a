"""The image autoencoder of latent diffusion, which Flux and SDXL share but for widths: its encoder and decoder.

Video autoencoders apply it to frames. Attribute names are those of diffusers; `layout` says what else differs between
the two forms in which such networks are published.
Source: CompVis/latent-diffusion (Rombach et al. 2022), `ldm/modules/diffusionmodules/model.py`; in hpcaitech/Open-Sora
`opensora/models/vae/autoencoder_2d.py`; huggingface/diffusers, `AutoencoderKL`.
"""

from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.models.sizes import check_least
from opensora_jax.nn.conv2d import Conv2d, image_blur
from opensora_jax.nn.frame_attention import frame_causal_attention
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.norm import GroupNorm

Layout = Literal["ldm", "diffusers"]  # ldm: attention projects by 1x1 convolutions, up_blocks begin with the finest


@dataclass(frozen=True)
class ImageVAEConfig:
    """Shape of the network: `block_out_channels` from the finest level on, `stem_channels` before the first."""

    in_channels: int
    out_channels: int
    latent_channels: int
    stem_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    layout: Layout

    def __post_init__(self):
        """Check what the layers below rely on."""
        check_least(self, 1, "in_channels", "out_channels", "latent_channels", "stem_channels", "block_out_channels")
        check_least(self, 1, "layers_per_block", "norm_num_groups")
        for channels in (self.stem_channels, *self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ValueError(f"all channels are divisible by {self.norm_num_groups} groups: got {channels}.")

    @property
    def stride(self) -> int:
        """Pixels (rows, columns) for one latent position."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, around a shortcut; the second convolution starts near zero."""

    def __init__(self, c_in: int, c_out: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(groups, c_in, rngs=rngs)
        self.conv1 = Conv2d(c_in, c_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(groups, c_out, rngs=rngs)
        self.conv2 = Conv2d(c_out, c_out, dtype=dtype, rngs=rngs)
        self.conv2.kernel[...] *= 0.1
        self.conv_shortcut = Conv2d(c_in, c_out, 1, dtype=dtype, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W D"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class ImageAttention(nnx.Module):
    """One head over all positions of an image, with its own group norm and a residual."""

    def __init__(self, channels: int, groups: int, layout: Layout, *, dtype: DTypeLike, rngs: nnx.Rngs):
        layer = Linear if layout == "diffusers" else partial(Conv2d, kernel_size=1)
        project = partial(layer, channels, channels, dtype=dtype, rngs=rngs)
        self.group_norm = GroupNorm(groups, channels, rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = project(), project(), project(), project()

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        h = self.group_norm(x)
        q, k, v = (to(h)[:, None] for to in (self.to_q, self.to_k, self.to_v))  # each a video of one frame
        return x + self.to_out(frame_causal_attention(q, k, v)[:, 0])


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the coarsest level."""

    def __init__(self, config: ImageVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([ImageAttention(channels, groups, config.layout, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nnx.Module):
    """A convolution that halves the size, or one after every pixel has been doubled."""

    def __init__(self, channels: int, *, stride: int = 1, growth: int = 1, dtype: DTypeLike, rngs: nnx.Rngs):
        self.growth = growth
        self.conv = Conv2d(channels, channels, stride=stride, kernel_init=image_blur, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w C"]:
        if self.growth > 1:
            x = jnp.repeat(jnp.repeat(x, self.growth, axis=1), self.growth, axis=2)
        return self.conv(x)


def _resnets(c_in: int, c_out: int, layers: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.List:
    widths = [c_in] + [c_out] * layers
    return nnx.List([ResnetBlock(a, b, groups, dtype=dtype, rngs=rngs) for a, b in pairwise(widths)])


class DownLevel(nnx.Module):
    """Resnets at one resolution, then a halving unless it is the last."""

    def __init__(self, c_in: int, c_out: int, config: ImageVAEConfig, last: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        layers, groups = config.layers_per_block, config.norm_num_groups
        self.resnets = _resnets(c_in, c_out, layers, groups, dtype=dtype, rngs=rngs)
        self.downsamplers = nnx.List([] if last else [Resample(c_out, stride=2, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w D"]:
        for layer in chain(self.resnets, self.downsamplers):
            x = layer(x)
        return x


class UpLevel(nnx.Module):
    """Resnets at one resolution, one more than on the way down, then a doubling unless it is the last."""

    def __init__(self, c_in: int, c_out: int, config: ImageVAEConfig, last: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        layers, groups = config.layers_per_block + 1, config.norm_num_groups
        self.resnets = _resnets(c_in, c_out, layers, groups, dtype=dtype, rngs=rngs)
        self.upsamplers = nnx.List([] if last else [Resample(c_out, growth=2, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w D"]:
        for layer in chain(self.resnets, self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Images to the mean and log variance of their latents."""

    def __init__(self, config: ImageVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = (config.stem_channels, *config.block_out_channels)
        self.conv_in = Conv2d(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownLevel(a, b, config, last=level == len(widths) - 1, dtype=dtype, rngs=rngs)
                for level, (a, b) in enumerate(pairwise(widths), start=1)
            ]
        )
        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], rngs=rngs)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w M"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to images: the encoder's levels backwards, each with one resnet more."""

    def __init__(self, config: ImageVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = (*config.block_out_channels, config.block_out_channels[-1])[::-1]
        self.finest_first = config.layout == "ldm"
        self.conv_in = Conv2d(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)
        levels = [
            UpLevel(a, b, config, last=level == len(widths) - 1, dtype=dtype, rngs=rngs)
            for level, (a, b) in enumerate(pairwise(widths), start=1)
        ]
        self.up_blocks = nnx.List(levels[::-1] if self.finest_first else levels)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], rngs=rngs)
        self.conv_out = Conv2d(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, z: Float[Array, "N h w Z"]) -> Float[Array, "N H W C"]:
        x = self.mid_block(self.conv_in(z))
        for level in reversed(self.up_blocks) if self.finest_first else self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
