"""The step of training: what is skipped, what is frozen, and where the state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from opensora_jax.nn.linear import Linear
from opensora_jax.nn.stack import Stack
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training.optimizer import Optimizer
from opensora_jax.training.state import make_train_step, plan_state
from tests.training.losses import Keyed

ADAM = Optimizer(optax.scale_by_adam(), lambda step: 1e-2 / (1 + step), grad_clip=1.0)
FROZEN = {("first", "kernel"), ("blocks", "blocks", "bias")}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = Linear(5, 8, rngs=rngs)
        self.blocks = Stack(lambda rngs: Linear(8, 8, rngs=rngs), 3, remat=3, rngs=rngs)

    def __call__(self, x):
        return self.blocks(self.first(x))


def make_model():
    return Model(nnx.Rngs(0))


def loss(model, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    error = jnp.mean((model(batch["x"] + 0.1 * noise) - 1) ** 2)
    endless = jnp.sqrt(jnp.sum(jnp.square(model.first.bias[...] * 0)) + 1 - batch["gradient"])  # its slope, at 0
    return error + batch["loss"] + endless, {}


def batches(count, spoil=None, at=2):
    for step in range(count):
        x = np.random.default_rng(step).normal(size=(8, 5)).astype(np.float32)
        bad = {name: np.float32(0) for name in ("loss", "gradient")}
        if spoil and step == at:
            bad[spoil] = np.float32(np.nan if spoil == "loss" else 1)
        yield {"x": x} | bad


def run(data, **options):
    """Returns the state before, the states after each step, and their metrics; donated, as in training."""
    graphdef, abstract, init = plan_state(make_model, ADAM, make_mesh(MeshConfig(2, 4, 1, 1)), ema=True, **options)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = make_train_step(graphdef, Keyed(loss), ADAM, ema_decay=0.9)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    state = init()
    states, metrics = [jax.device_get(state)], []
    for batch in data:
        state, found = step(state, batch, jax.random.key(7))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    return states, metrics


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing_but_step_and_count(spoil):
    states, metrics = run(batches(4, spoil))
    before, after = states[2], states[3]
    assert_same(after._replace(step=before.step, skipped=before.skipped), before)
    assert (before.step, after.step, states[4].step) == (2, 3, 4)
    assert [found["skipped_steps"].item() for found in metrics] == [0, 0, 1, 1]
    assert metrics[2]["skipped_steps"].shape == ()
    assert np.isfinite([found["loss"] for found in metrics]).tolist() == [True, True, spoil == "gradient", True]
    assert np.isfinite([found["grad_norm"] for found in metrics]).tolist() == [True, True, spoil == "loss", True]
    kernel = states[4].params["first"]["kernel"][...]
    assert np.isfinite(kernel).all()
    assert not np.array_equal(kernel, before.params["first"]["kernel"][...])


def test_a_finite_run_is_the_same_whatever_another_run_skips():
    whole, metrics = run(batches(3))
    skipped, _ = run(batches(3, "loss"))
    assert_same(skipped[2], whole[2])
    assert [found["learning_rate"].item() for found in metrics] == pytest.approx([1e-2, 1e-2 / 2, 1e-2 / 3])


class Noisy:
    """A loss whose noise is drawn for a whole batch."""

    def draw(self, batch, key):
        return jax.random.normal(key, batch["x"].shape)

    def __call__(self, model, batch, noise):
        return jnp.mean((model(batch["x"] + noise) - 1) ** 2), {}


def test_accumulated_steps_train_as_whole_batches_do_noise_included():
    graphdef, _, init = plan_state(make_model, ADAM, make_mesh(MeshConfig(2, 2, 1, 2)), ema=True)
    ends = []
    for parts in (1, 2):
        step = jax.jit(make_train_step(graphdef, Noisy(), ADAM, ema_decay=0.9, accumulation_steps=parts))
        state = init()
        for batch in batches(3):
            state, _ = step(state, batch, jax.random.key(0))
        ends.append(jax.device_get(state.averaged_params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *ends)


def test_frozen_parameters_stay_and_have_neither_moments_nor_average():
    (start, *_, end), _ = run(batches(3), frozen=lambda params: FROZEN)
    assert_same(end.frozen, start.frozen)
    learning = {path for path, _ in nnx.to_flat_state(end.params)}
    assert learning == {("first", "bias"), ("blocks", "blocks", "kernel")}
    for tree in (end.ema, end.opt_state.mu, end.opt_state.nu):
        assert {path for path, _ in nnx.to_flat_state(tree)} == learning
    everything = nnx.state(make_model(), nnx.Param)
    for whole in (end.model_params, end.averaged_params):
        assert jax.tree.structure(whole) == jax.tree.structure(everything)
        np.testing.assert_array_equal(whole["first"]["kernel"][...], everything["first"]["kernel"][...])
        assert not np.array_equal(
            whole["blocks"]["blocks"]["kernel"][...], everything["blocks"]["blocks"]["kernel"][...]
        )


def test_frozen_parameters_change_no_step_of_the_others():
    frozen, _ = run(batches(1), frozen=lambda params: FROZEN)
    free, _ = run(batches(1))
    pairs = [(state.params["first"]["bias"][...], state.ema["first"]["bias"][...]) for state in (frozen[1], free[1])]
    np.testing.assert_allclose(pairs[0], pairs[1], rtol=1e-3)  # clipped by another norm, which Adam divides out


def test_no_gradient_is_computed_for_frozen_kernels():
    mesh = make_mesh(MeshConfig(8, 1, 1, 1))
    graphdef, abstract, _ = plan_state(make_model, ADAM, mesh, ema=False, frozen=lambda params: {("first", "kernel")})
    step = make_train_step(graphdef, Keyed(loss), ADAM, ema_decay=None)
    jaxpr = jax.make_jaxpr(step)(abstract, next(batches(1)), jax.random.key(0))
    assert (5, 8) not in products(jaxpr.jaxpr)
    assert (8, 8) in products(jaxpr.jaxpr)  # of the stack, whose kernels learn


def products(jaxpr):
    """Returns the shapes of all matrix products in a program, those of inner programs too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            found |= products(inner)
    return found


def test_frozen_parameters_may_be_held_in_the_dtype_of_the_computation():
    states, _ = run(batches(1), frozen=lambda params: FROZEN, frozen_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(states[1].frozen)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(states[1].params)} == {jnp.dtype("float32")}


def test_parameters_that_are_not_given_start_anew():
    mesh = make_mesh(MeshConfig(2, 4, 1, 1))
    fresh = plan_state(make_model, ADAM, mesh, ema=False)[2]().params
    given = nnx.State({"first": jax.tree.map(lambda leaf: 2 * leaf + 1, fresh["first"])})
    expected = jax.device_get(given)
    _, abstract, init = plan_state(make_model, ADAM, mesh, ema=True, pretrained=lambda: given)
    state = init()
    assert_same(jax.device_get(state.params["first"]), expected["first"])
    assert_same(jax.device_get(state.params["blocks"]), jax.device_get(fresh["blocks"]))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, abstract)
    assert state.params["first"]["kernel"][...].sharding.spec == PartitionSpec(None, "tensor")
