"""Gradients of a batch taken in parts: equal to those of the whole, without moving a row between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.parallel.batch import batch_sharding
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training.accumulate import mean_gradient

PARAMS = {"w": jax.random.normal(jax.random.key(0), (5, 3)), "b": jnp.zeros(3)}
BATCH = {
    "x": jax.random.normal(jax.random.key(1), (12, 5)),
    "row": jnp.arange(12),
    "step": jnp.int32(3),
}


def objective(params, batch):
    value = jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) - 0.3 * batch["step"]) ** 2)
    return value, {"mean_row": batch["row"].mean()}


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_give_the_gradient_of_the_whole_batch(parts):
    whole = mean_gradient(objective, 1, PARAMS, BATCH)
    found = mean_gradient(objective, parts, PARAMS, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, whole)
    assert found[1]["mean_row"] == 5.5


def test_neighbours_are_in_different_parts_and_values_of_the_whole_batch_in_all():
    def look(params, batch):
        return jnp.sum(params["b"]), {"row": batch["row"][1], "step": batch["step"]}

    _, metrics, _ = mean_gradient(look, 3, PARAMS, BATCH)
    assert metrics["row"] == pytest.approx(np.mean([3, 4, 5]))  # part a of 3 holds the rows a, a + 3, ...
    assert metrics["step"] == 3


def test_gradients_are_added_in_float32():
    def tiny(params, batch):
        return jnp.sum(params.astype(jnp.float32) * jnp.where(batch["row"][0] == 0, 1.0, 2.0**-9)), {}

    _, _, grad = mean_gradient(tiny, 12, jnp.zeros(1, jnp.bfloat16), BATCH)
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad * 12, 1 + 11 * 2.0**-9)  # in bfloat16 the 11 would vanish


def test_no_row_moves_to_another_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, seq=1, tensor=1))
    x = jax.ShapeDtypeStruct((48, 5), jnp.float32, sharding=batch_sharding(mesh))
    row = jax.ShapeDtypeStruct((48,), jnp.int32, sharding=batch_sharding(mesh))
    step = jax.jit(lambda params, batch: mean_gradient(objective, 3, params, batch))
    text = step.lower(PARAMS, {"x": x, "row": row, "step": jnp.int32(3)}).compile().as_text()
    assert set(re.findall(r"(all-to-all|all-gather|collective-permute|all-reduce)\(", text)) == {"all-reduce"}


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"in 5 parts \(accumulation_steps\): row has 12 rows"):
        mean_gradient(objective, 5, PARAMS, BATCH)
