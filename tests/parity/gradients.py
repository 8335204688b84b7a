"""Gradients of an autoencoder case: of mean(reconstruction^2) by the stored parameters and by the input."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from opensora_jax.weights.params import export_params
from opensora_jax.weights.rename import parameter_keys
from tests.parity.golden import Golden, Tolerance, channels_first

OUTPUT = Tolerance(1e-4)
GRADIENT = Tolerance(5e-4)


def compare_gradients(
    golden: Golden,
    model_name: str,
    reconstruction: Callable[[nnx.State, Array], Array],
    params: nnx.State,
    video: Array,
    video_name: str,
) -> None:
    """Compare the loss and those gradients that are stored: the others are not even compiled."""
    keys = [key for key, _ in parameter_keys(model_name, params)]
    paths = dict(zip(keys, (path for path, _ in nnx.to_flat_state(params)), strict=True))
    stored = {paths[key] for key in golden.part("grad/") if key in paths}

    @jax.jit
    def run(params: nnx.State, video: Array) -> tuple[Array, nnx.State, Array]:
        def loss(params: nnx.State, video: Array) -> Array:
            return jnp.mean(reconstruction(params, video) ** 2)

        value, (by_params, by_video) = jax.value_and_grad(loss, argnums=(0, 1))(params, video)
        kept = [(path, leaf) for path, leaf in nnx.to_flat_state(by_params) if path in stored]
        return value, nnx.from_flat_state(kept), by_video

    value, by_params, by_video = run(params, video)
    golden.compare("out/loss_mean_recon_sq", value, OUTPUT)
    found = {f"grad/{key}": gradient for key, gradient in export_params(model_name, by_params).items()}
    golden.compare_found(found | {f"grad/{video_name}": channels_first(by_video)}, GRADIENT)
