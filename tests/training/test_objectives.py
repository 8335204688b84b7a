"""The loss of the autoencoder, on fakes whose answers are known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.posterior import Posterior
from opensora_jax.nn.conv3d import CausalConv3d
from opensora_jax.training import vae
from opensora_jax.training.latent_sums import LatentSums


def test_the_vae_loss_weighs_its_terms():
    class Model(nnx.Module):
        def posterior(self, video):
            return Posterior(jnp.ones((2, 1, 1, 1, 3)), jnp.zeros((2, 1, 1, 1, 3)))

        def reconstruct(self, z):
            return jnp.full((2, 1, 4, 4, 3), -0.5)

    batch = {"video": jnp.zeros((2, 1, 4, 4, 3), jnp.uint8)}  # black is -1
    loss = vae.VAELoss(vae.VAELossConfig(1.0, 10.0, 100.0))
    draws = loss.draw(batch, jax.random.key(0))
    total, parts = loss(Model(), batch, draws)
    assert parts["l1"] == pytest.approx(0.5)
    assert parts["l2"] == pytest.approx(0.25)
    assert parts["kl"] == pytest.approx(0.5)  # of N(1, 1), per value
    assert total == pytest.approx(0.5 + 2.5 + 50.0)
    pixels = {"video": jnp.full((2, 1, 4, 4, 3), -1.0)}  # as `dataset.resize=original` gives them
    assert loss(Model(), pixels, draws)[0] == total


def test_summed_losses_count_every_value_of_a_frame_and_of_a_latent():
    video = jnp.zeros((2, 3, 5, 7, 3))
    posterior = Posterior(jnp.ones((2, 2, 1, 1, 4)), jnp.zeros((2, 2, 1, 1, 4)))
    distance = lambda a, b: jnp.full(a.shape[:2], 0.25)  # noqa: E731
    config = vae.VAELossConfig(1.0, 0.0, 10.0, perceptual_loss_weight=2.0, reduction="sum")
    nll, kl, parts = vae.measure(config, video, video + 0.5, posterior, distance, 0.1)
    assert nll == pytest.approx((5 * 7 * 3) * ((0.5 + 2 * 0.25) / np.exp(0.1) + 0.1))
    assert kl == pytest.approx(10 * 0.5 * (2 * 1 * 1 * 4))
    images = vae.measure(config, video, video, posterior, distance, 0.1, frames_apart=True)
    assert images[1] == pytest.approx(10 * 0.5 * (1 * 1 * 4))
    assert parts["perceptual"] == pytest.approx(0.25)
    assert vae.measure(config, video, video, None, None, 0.0)[1] == 0  # an autoencoder without noise


def test_images_teach_the_tap_of_the_current_frame_alone():
    model = CausalConv3d(3, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def loss(params, video):
        model = nnx.merge(graphdef, params)
        return jnp.sum(vae.only_current_frame_learns(model)(video) ** 2)

    gradient = jax.grad(loss)(params, jnp.ones((1, 1, 4, 4, 3)))["conv"]["kernel"][...]
    assert not gradient[:-1].any()
    assert gradient[-1].any()


def test_latent_sums_continue_from_what_a_killed_run_wrote():
    rng = np.random.default_rng(0)
    batches = [(rng.normal(3, 2, (5, 7, 3)), rng.uniform(0, 1, (5, 7, 3))) for _ in range(4)]
    whole = summed(LatentSums(), batches).result()
    saved = json.loads(json.dumps(summed(LatentSums(), batches[:2]).to_dict()))
    assert summed(LatentSums(**saved), batches[2:]).result() == whole


def summed(sums, batches):
    for mean, variance in batches:
        sums = sums.add(mean, variance)
    return sums


def test_latent_statistics_are_those_of_all_values_together():
    parts = [np.random.default_rng(i).normal(i, 2, (2, 3, 2, 1, 4, 5)) for i in range(3)]
    mean, std = summed(LatentSums(), [(means, spread**2) for means, spread in parts]).result()
    means, spread = np.concatenate(parts, axis=1).reshape(2, -1, 5)
    np.testing.assert_allclose(mean, means.mean(0))
    np.testing.assert_allclose(std, np.sqrt(means.var(0) + (spread**2).mean(0)))
