"""Schedules, clipping, AdamW at the smallest epsilon, and moments in bfloat16."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opensora_jax.training.moments import bfloat16_moments, round_randomly
from opensora_jax.training.optimizer import OptimConfig, Optimizer, learning_rate, make_optimizer

CONFIG = OptimConfig(
    cls="adamw",
    lr=1e-2,
    betas=(0.9, 0.999),
    eps=1e-15,
    weight_decay=0.0,
    grad_clip=float("inf"),
    warmup_steps=4,
    lr_schedule="constant",
    moments_dtype="float32",
    freeze=(),
)


def update(config, grads, params, steps=1):
    """Returns parameters and state after equal updates."""
    optimizer = make_optimizer(config, 20)
    state = optimizer.init(params)
    for step in range(steps):
        params, state = optimizer.update(grads, optax.tree.norm(grads), state, params, jnp.int32(step))
    return params, state


def test_the_rate_warms_up_and_stays():
    rates = [float(learning_rate(CONFIG, 20)(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:4], [1e-6 + (n + 1) / 5 * (1e-2 - 1e-6) for n in range(4)], rtol=1e-6)
    np.testing.assert_allclose(rates[4:], 1e-2, rtol=1e-6)


def test_the_rate_falls_to_zero_at_the_last_step():
    rates = [float(learning_rate(replace(CONFIG, lr_schedule="cosine"), 20)(step)) for step in range(25)]
    assert rates[3] == pytest.approx(1e-2)  # after (n + 1) / 4 of it
    assert rates[4] == pytest.approx(1e-2 * 2 / (1 + np.cos(np.pi / 16)))
    assert rates[4:21] == sorted(rates[4:21], reverse=True)
    assert rates[20:] == [0.0] * 5


def test_the_rate_follows_the_step_and_not_the_number_of_updates():
    optimizer = make_optimizer(CONFIG, 20)
    grads = jnp.ones(3)
    params, state = optimizer.update(grads, jnp.sqrt(3), optimizer.init(grads), jnp.zeros(3), jnp.int32(2))
    np.testing.assert_allclose(params, -(1e-6 + 3 / 5 * (1e-2 - 1e-6)), rtol=1e-5)
    assert int(state[0].count) == 1


def test_gradients_are_clipped_together():
    seen = Optimizer(optax.identity(), lambda step: 1.0, grad_clip=2.0)
    grads, zeros = {"a": jnp.full(3, 4.0), "b": jnp.full(1, 11.0)}, {"a": jnp.zeros(3), "b": jnp.zeros(1)}
    norm = jnp.float32(13)  # sqrt(3 * 16 + 121)
    params, _ = seen.update(grads, norm, seen.init(zeros), zeros, jnp.int32(0))
    np.testing.assert_allclose(params["a"], -4 * 2 / 13, rtol=1e-6)
    np.testing.assert_allclose(params["b"], -11 * 2 / 13, rtol=1e-6)
    hundredth = jax.tree.map(lambda g: g / 100, grads)
    small, _ = seen.update(hundredth, norm / 100, seen.init(zeros), zeros, jnp.int32(0))
    np.testing.assert_allclose(small["b"], -0.11, rtol=1e-6)


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_an_epsilon_of_1e_15_works_in_float32(moments_dtype):
    grads = jnp.asarray([0.0, 1e-38, 1e-30, 1e-22, 1e-18, 1e-12, -1e-3, 1.0])
    config = replace(CONFIG, warmup_steps=0, moments_dtype=moments_dtype)
    params, state = update(config, grads, jnp.zeros(8), steps=7)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    assert (np.abs(params) <= 7 * 1e-2 * 1.01).all()  # squares below 1e-38 vanish: no step grows from that
    assert params[0] == 0
    g = np.asarray(grads, np.float64)[5:]
    tolerance = 1e-5 if moments_dtype == "float32" else 1e-2
    np.testing.assert_allclose(params[5:], -7 * 1e-2 * g / (np.abs(g) + 1e-15), rtol=tolerance)


@pytest.mark.parametrize(("cls", "moments_dtype"), [("adamw", "float32"), ("adamw", "bfloat16"), ("muon", "float32")])
def test_optimisers_fit_a_line(cls, moments_dtype):
    config = replace(CONFIG, cls=cls, lr=5e-2, eps=1e-8, warmup_steps=0, moments_dtype=moments_dtype, betas=(0.9, 0.99))
    optimizer = make_optimizer(replace(config, grad_clip=1.0), 200)
    x = jax.random.normal(jax.random.key(0), (32, 3))
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}

    def error(params):
        return jnp.mean((x @ params["kernel"] + params["bias"] - (x @ jnp.ones((3, 2)) - 0.5)) ** 2)

    @jax.jit
    def step(params, state, number):
        grads = jax.grad(error)(params)
        return optimizer.update(grads, optax.tree.norm(grads), state, params, number)

    state = optimizer.init(params)
    for number in range(200):
        params, state = step(params, state, jnp.int32(number))
    assert error(params) < 0.01


def test_moments_in_bfloat16_are_widened_for_the_update():
    grads, params = jax.random.normal(jax.random.key(1), (7, 5)), jnp.ones((7, 5))
    narrow, state = update(replace(CONFIG, moments_dtype="bfloat16"), grads, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("bfloat16")}
    wide, _ = update(CONFIG, grads, params)
    np.testing.assert_array_equal(narrow, wide)  # rounding comes after the first update, not before


def test_a_second_moment_in_bfloat16_falls_as_one_in_float32_does():
    adam = bfloat16_moments(optax.scale_by_adam(0.9, 0.999))
    size, steps = 500, 300

    @jax.jit
    def run(state):
        def without_gradient(state, _):
            return adam.update(jnp.zeros(size), state)[1], None

        return jax.lax.scan(without_gradient, state, length=steps)[0]

    state = run(adam.init(jnp.zeros(size))._replace(nu=jnp.full(size, 1.0, jnp.bfloat16)))
    assert np.asarray(state.nu, np.float64).mean() == pytest.approx(0.999**steps, rel=0.02)
    nearest = jnp.bfloat16(1.0) * jnp.float32(0.999)
    assert nearest.astype(jnp.bfloat16) == 1.0  # and would so for ever


def test_random_rounding_keeps_the_mean_and_takes_neighbours_only():
    x = jnp.asarray([1.0, -2.5, 0.0, 1 + 1e-3, 3e-20, -1.234567, 3.3e38])
    rounded = jax.vmap(lambda seed: round_randomly(x, seed))(jnp.arange(4000, dtype=jnp.uint32))
    assert rounded.dtype == jnp.bfloat16
    values = np.asarray(rounded, np.float64)
    np.testing.assert_allclose(values.mean(0), x, rtol=3e-4)
    assert [len(np.unique(column)) for column in values.T] == [1, 1, 1, 2, 2, 2, 2]
    assert (np.abs(values - np.asarray(x)) <= np.abs(x) * 2.0**-7).all()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"cls": "muon", "moments_dtype": "bfloat16"}, "moments_dtype='bfloat16' is for cls='adamw' alone"),
        ({"grad_clip": 0.0}, "grad_clip is above 0: got 0.0; use inf"),
        ({"lr": -1e-3}, "lr is at least 0: got -0.001"),
        ({"warmup_steps": -1}, "warmup_steps is at least 0: got -1"),
        ({"betas": (0.9, 1.0)}, "betas are from 0 to below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(CONFIG, **changes)
