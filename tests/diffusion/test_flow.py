import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import flow

X0, NOISE = (jax.random.normal(jax.random.key(i), (3, 2, 5)) for i in (0, 1))


def test_the_path_leads_from_data_to_noise_at_constant_velocity():
    at = lambda t: flow.interpolate(X0, NOISE, jnp.full(3, t))  # noqa: E731
    np.testing.assert_allclose(at(1.0), NOISE, rtol=1e-6)
    np.testing.assert_allclose(at(0.0), X0 + 1e-5 * NOISE, rtol=1e-6)
    np.testing.assert_allclose((at(0.7) - at(0.2)) / 0.5, flow.target(X0, NOISE), rtol=1e-4, atol=1e-5)


def test_one_euler_step_along_the_target_reaches_the_data():
    t = 0.83
    x = flow.interpolate(X0, NOISE, jnp.full(3, t)) - t * flow.target(X0, NOISE)
    np.testing.assert_allclose(x, X0 + flow.SIGMA_MIN * NOISE, atol=2e-6)


def test_the_shift_is_that_of_the_published_resolutions():
    assert flow.shift_alpha(252, 33) == pytest.approx(5.7326, abs=1e-4)  # 192x336, 129 frames
    assert flow.shift_alpha(2304, 33) == pytest.approx(11.872, abs=1e-3)  # 576x1024, 129 frames


def test_a_schedule_falls_from_noise_to_data_and_stays_longer_near_noise():
    times = flow.schedule(7, 5.0)
    assert times[0] == 1
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)
    assert np.all(times[1:-1] > flow.schedule(7, 1.0)[1:-1])


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("logit_normal", [True, False])
def test_times_have_the_distribution_they_are_named_after(logit_normal, stratified):
    t = np.asarray(flow.sample_time(jax.random.key(0), 40_000, 1.0, logit_normal=logit_normal, stratified=stratified))
    z = np.log(t / (1 - t)) if logit_normal else (t - 0.5) * np.sqrt(12)
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02


def test_the_loss_of_the_exact_velocity_is_zero_and_of_none_is_its_mean_square():
    velocity = jax.random.normal(jax.random.key(2), (3, 2, 5, 7, 11))
    assert flow.loss(velocity, velocity) == 0
    np.testing.assert_allclose(
        flow.loss(jnp.zeros_like(velocity), velocity), np.mean(np.asarray(velocity) ** 2), rtol=1e-6
    )


def test_frames_without_weight_do_not_count_and_samples_count_alike():
    velocity = jax.random.normal(jax.random.key(2), (2, 3, 5, 7, 11))
    found = flow.loss(jnp.zeros_like(velocity), velocity, jnp.asarray([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
    first, second = (np.mean(np.square(part)) for part in (velocity[0, 1:], velocity[1, 1]))
    np.testing.assert_allclose(found, (first + second) / 2, rtol=1e-6)
