"""What a variational autoencoder says of a latent: a Gaussian per value, from the moments that its encoder gives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

FIRST_LOGVAR = -6.0  # training starts with little noise on the latent


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, not yet scaled."""

    mean: Float[Array, "B *L Z"]
    logvar: Float[Array, "B *L Z"]

    def sample(self, keys: Key[Array, "B"]) -> Float[Array, "B *L Z"]:
        """Returns draws, each by the key of its sample: whatever the others of the batch are."""
        return self.mean + jnp.exp(0.5 * self.logvar) * normal(keys, self.mean.shape, self.mean.dtype)

    def latent(self, keys: Key[Array, "B"] | None) -> Float[Array, "B *L Z"]:
        """Returns modes, or draws when there is a key for each sample."""
        return self.mean if keys is None else self.sample(keys)

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


def normal(keys: Key[Array, "B"], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "B *L Z"]:
    """Returns standard normal numbers, each sample's by its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:], dtype))(keys)
