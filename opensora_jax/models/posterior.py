"""What a variational autoencoder says of a latent: a Gaussian per value, from the moments that its encoder gives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

FIRST_LOGVAR = -6.0  # training starts with little noise on the latent


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, not yet scaled."""

    mean: Float[Array, "B *L Z"]
    logvar: Float[Array, "B *L Z"]

    def sample(self, key: Array) -> Float[Array, "B *L Z"]:
        """Returns a draw."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def latent(self, key: Array | None) -> Float[Array, "B *L Z"]:
        """Returns the mode, or a draw when a key is given."""
        return self.mean if key is None else self.sample(key)

    def kl(self) -> Float[Array, "B"]:
        """Returns the divergence from the standard normal, summed over everything but the batch, in nats."""
        return self._divergence(1)

    def frame_kl(self) -> Float[Array, "B T"]:
        """Returns the divergence of every latent frame, in nats: for autoencoders that see frames as images."""
        return self._divergence(2)

    def _divergence(self, kept_axes: int) -> Array:
        terms = self.mean**2 + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(range(kept_axes, terms.ndim))

    @classmethod
    def of(cls, moments: Float[Array, "B *L M"]) -> "Posterior":
        """Returns the Gaussian of moments [mean, log variance] on the last axis, in float32, as wide as [-30, 20]."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))
