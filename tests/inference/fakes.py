"""An autoencoder and text encoders whose results a test can foresee."""

import jax
import jax.numpy as jnp
from flax import nnx


class Autoencoder(nnx.Module):
    """Keeps every fourth pixel and frame; decoding repeats them."""

    strides, is_causal, latent_channels = (4, 4, 4), True, 3

    def __init__(self):
        self.gain = nnx.Param(jnp.float32(1.0))

    def latent_shape(self, frames, height, width):
        return (frames - 1) // 4 + 1, height // 4, width // 4

    def encode(self, video):
        return self.gain[...] * video[:, ::4, ::4, ::4]

    def decode(self, latent):
        frames = jnp.repeat(latent, 4, axis=1)[:, 3:]
        return jnp.repeat(jnp.repeat(frames, 4, axis=2), 4, axis=3)


def encode_text(prompts):
    seeds = [sum(map(ord, prompt)) for prompt in prompts]
    rows = [jax.random.normal(jax.random.key(seed), (7,)) for seed in seeds]
    return jnp.stack(rows)[:, :6].reshape(-1, 2, 3), jnp.stack(rows)[:, 6:]
