"""Training a LoRA of a small MMDiT: what learns, what is computed, and the same on a mesh as on one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import jaxprs_in_params

from opensora_jax.models.mmdit import MMDiT
from opensora_jax.nn.lora import LoRAConfig
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training.optimizer import Optimizer
from opensora_jax.training.state import make_train_step, plan_state
from opensora_jax.weights.lora import frozen_parameters, with_lora
from tests.models.tiny import mmdit
from tests.training.losses import Keyed

CONFIG = mmdit(depth=1, depth_single_blocks=2, cond_embed=False, grad_ckpt_settings=(0, 1))
LORA = LoRAConfig(3, 6.0, ("double_blocks", "single_blocks"), None)
ADAM = Optimizer(optax.scale_by_adam(), lambda step: 1e-2, grad_clip=1.0)


def make_model():
    model = MMDiT(CONFIG, rngs=nnx.Rngs(0))
    head = model.final_layer.linear.kernel  # it starts at zero, and would pass no gradient on
    head[...] = 0.3 * jax.random.normal(jax.random.key(1), head.shape)
    return model


def plan(mesh):
    return plan_state(
        with_lora(make_model, "mmdit", LORA, 1),
        ADAM,
        mesh,
        ema=True,
        frozen=frozen_parameters("mmdit", (), LORA),
    )


def loss(model, batch, key):
    velocity = model(batch["x"], batch["t"], batch["text"], batch["pooled"])
    return jnp.mean((velocity - 1) ** 2), {}


def batch(step):
    rng = np.random.default_rng(step)
    shapes = {"x": (4, 2, 4, 4, 2), "text": (4, 3, 10), "pooled": (4, 6)}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {"t": rng.uniform(size=4).astype(np.float32)}


def train(mesh, steps=4):
    """Returns the losses of a few steps, and the states before and after them."""
    graphdef, _, init = plan(mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(graphdef, Keyed(loss), ADAM, ema_decay=0.9), donate_argnums=0)
        state, losses = init(), []
        start = jax.device_get(state)
        for number in range(steps):
            state, metrics = step(state, batch(number), jax.random.key(0))
            losses.append(metrics["loss"].item())
    return losses, start, jax.device_get(state)


def test_a_lora_learns_on_a_mesh_as_on_one_device():
    alone, start, end = train(make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))
    assert alone[-1] < alone[0]
    split, _, _ = train(make_mesh(MeshConfig(2, 2, 2, 1)))
    np.testing.assert_allclose(split, alone, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, end.frozen, start.frozen)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(end.params))  # lora_B has left zero


def test_what_a_checkpoint_of_a_lora_needs_is_small():
    _, abstract, _ = plan(make_mesh(MeshConfig(8, 1, 1, 1)))
    size = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in abstract._asdict().items()
    }
    thin = sum(math.prod((3, sum(kernel))) for kernel in kernels(abstract.frozen, "blocks"))
    assert size["params"] == size["ema"] == thin
    assert size["opt_state"] == 2 * thin + 1
    assert abstract._replace(frozen=None).frozen is None


def test_no_gradient_is_computed_for_the_kernels_beside_a_lora():
    graphdef, abstract, _ = plan(make_mesh(MeshConfig(8, 1, 1, 1)))
    step = make_train_step(graphdef, Keyed(loss), ADAM, ema_decay=None)
    found = products(jax.make_jaxpr(step)(abstract, batch(0), jax.random.key(0)).jaxpr)
    assert {(24, 3), (3, 24)} <= found  # gradients of thin matrices
    shapes = {kernel[-2:] for kernel in kernels(abstract.frozen, "")}
    assert not found & (shapes | {shape[::-1] for shape in shapes})


def kernels(params, where):
    """Returns the shapes of all kernels under a path, one for each layer of a stack."""
    flat = [(path, leaf.shape) for path, leaf in nnx.to_flat_state(params) if path[-1] == "kernel"]
    chosen = [shape for path, shape in flat if any(where in part for part in path)]
    return [shape[-2:] for shape in chosen for _ in range(shape[0] if len(shape) == 3 else 1)]


def products(jaxpr):
    """Returns the shapes of all matrix products in a program, those of inner programs too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            found |= products(inner)
    return found
