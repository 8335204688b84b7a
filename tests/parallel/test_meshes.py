"""Training on any mesh gives the losses of one device; what the compiler makes of it is what was asked for.

    python -m pytest tests/parallel/test_meshes.py -m slow -s

prints the worst relative difference of each mesh over 20 steps.
"""

import math
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.mmdit import MMDiT
from opensora_jax.parallel.batch import batch_sharding, to_devices
from opensora_jax.parallel.mesh import MeshConfig, make_mesh, one_device
from opensora_jax.parallel.rules import param_shardings, param_spec
from opensora_jax.training.optimizer import OptimConfig, make_optimizer
from opensora_jax.training.state import make_train_step, plan_state
from tests.models.tiny import mmdit
from tests.training.losses import Keyed

CONFIG = mmdit(
    in_channels=12,
    vec_in_dim=5,
    context_in_dim=7,
    hidden_size=48,
    num_heads=8,
    depth_single_blocks=2,
    axes_dim=(2, 2, 2),
    grad_ckpt_settings=(0, 2),
    remat_policy="save_attention",
)
BATCH, TEXT, GRID = 8, 11, (3, 2, 10)  # 11 tokens of text and 15 of video: no mesh divides either
OPTIM = OptimConfig("adamw", 3e-3, (0.9, 0.999), 1e-15, 0.01, 1.0, 2, "constant", "float32", ())
MESHES = {  # those that split tokens get a batch whose samples they cannot split
    "data 8": MeshConfig(8, 1, 1, 1),
    "fsdp 8": MeshConfig(1, 8, 1, 1),
    "data 2 x fsdp 4": MeshConfig(2, 4, 1, 1),
    "fsdp 2 x seq 4, whole samples": MeshConfig(1, 2, 4, 1),
    "fsdp 2 x seq 4, ulysses": MeshConfig(1, 2, 4, 1, "ulysses"),
    "fsdp 2 x seq 4, ring": MeshConfig(1, 2, 4, 1, "ring"),
    "tensor 2 x data 4": MeshConfig(4, 1, 1, 2),
    "fsdp 2 x seq 2 x tensor 2, ulysses": MeshConfig(1, 2, 2, 2, "ulysses"),
    "fsdp 2 x seq 2 x tensor 2, ring": MeshConfig(1, 2, 2, 2, "ring"),
}
FEW = ("data 2 x fsdp 4", "fsdp 2 x seq 4, ulysses", "fsdp 2 x seq 2 x tensor 2, ring")  # where slow tests are left out


def make_model():
    """Returns a model whose loss depends on all of its parameters from the start."""
    model = MMDiT(CONFIG, rngs=nnx.Rngs(0))
    for layer in (model.final_layer.linear, model.cond_in):
        layer.kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), layer.kernel.shape)
    return model


def batch_of(name):
    return 2 if "ulysses" in name or "ring" in name else BATCH


def draw(step, batch):
    rng = np.random.default_rng(step)
    shapes = {"latent": (*GRID, 3), "text": (TEXT, 7), "pooled": (5,), "condition": (*GRID, 4)}
    return {name: rng.standard_normal((batch, *shape)).astype(np.float32) for name, shape in shapes.items()}


def loss(model, batch, key):
    key_time, key_noise = jax.random.split(key)
    t = jax.random.uniform(key_time, (len(batch["latent"]),))
    noise = jax.random.normal(key_noise, batch["latent"].shape)
    share = t[:, None, None, None, None]
    noisy = share * noise + (1 - share) * batch["latent"]
    velocity = model(noisy, t, batch["text"], batch["pooled"], batch["condition"])
    return jnp.mean((velocity - (noise - batch["latent"])) ** 2), {}


@cache
def trained(config, batch):
    """Returns a function of the number of steps that returns their losses; it compiles once."""
    mesh = one_device() if config is None else make_mesh(config)
    optimizer = make_optimizer(OPTIM, 20)
    graphdef, abstract, init = plan_state(make_model, optimizer, mesh, ema=False)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = make_train_step(graphdef, Keyed(loss), optimizer, ema_decay=None)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    @cache
    def losses(steps):
        with jax.set_mesh(mesh):
            state, found, key = init(), [], jax.random.key(5)
            for number in range(steps):
                state, metrics = step(state, to_devices(draw(number, batch), mesh), key)
                found.append(float(metrics["loss"]))
        return np.asarray(found)

    return losses


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 3) for name in FEW] + [pytest.param(name, 20, marks=pytest.mark.slow) for name in MESHES],
)
def test_a_mesh_gives_the_loss_curve_of_one_device(name, steps):
    found, expected = (trained(mesh, batch_of(name))(steps) for mesh in (MESHES[name], None))
    worst = np.abs(found / expected - 1).max()
    print(f"| {name} | {worst:.1e} |")
    assert len(set(expected)) == steps
    assert worst < 1e-4


def gradients(config, mesh, batch=BATCH):
    """Returns the compiled program of the gradient of a model's mean square."""
    return compiled(config, mesh, lambda model, inputs: jnp.mean(model(**inputs) ** 2), batch, gradient=True)


def compiled(config, mesh, measure, batch=BATCH, *, gradient=False):
    """Returns the compiled program of `measure(model, inputs)`, or of its gradient, split as parameters are."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))
    shardings = param_shardings(params, mesh)
    params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, shardings)
    inputs = {
        "x": jax.ShapeDtypeStruct((batch, *GRID, 3), jnp.float32, sharding=batch_sharding(mesh)),
        "t": jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=batch_sharding(mesh)),
        "text": jax.ShapeDtypeStruct((batch, TEXT, 7), jnp.float32, sharding=batch_sharding(mesh)),
        "pooled": jax.ShapeDtypeStruct((batch, 5), jnp.float32, sharding=batch_sharding(mesh)),
    }

    def run(params, inputs):
        return measure(nnx.merge(graphdef, params), inputs)

    run = jax.jit(jax.grad(run), out_shardings=shardings) if gradient else jax.jit(run)
    with jax.set_mesh(mesh):
        return run.lower(params, inputs).compile().as_text()


def collectives(program, kind):
    """Returns the shapes of all arrays that operations of a kind result in."""
    results = re.findall(rf"= (\S+|\([^=]*\)) {kind}(?:-start)?\(", program)
    return [
        tuple(map(int, shape.split(","))) if shape else ()
        for r in results
        for shape in re.findall(r"\w\[([\d,]*)\]", r)
    ]


def kernels(config, mesh):
    """Returns (shape of one layer, its spec, shape with all layers) of every parameter that the fsdp axis splits."""
    params = nnx.state(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))), nnx.Param)
    found = []
    for _, param in nnx.to_flat_state(params):
        names = param.get_metadata()["axes"]
        shape = param.shape[len(param.shape) - len(names) :]
        spec = param_spec(names, shape, mesh)
        found += [(shape, spec, param.shape)] if "fsdp" in spec else []
    return found


def part(shape, spec, mesh):
    return tuple(size // mesh.shape["fsdp"] if axis == "fsdp" else size for size, axis in zip(shape, spec, strict=True))


@pytest.mark.parametrize("name", ["fsdp 8", "data 2 x fsdp 4"])
def test_fsdp_gathers_weights_and_scatters_gradients_and_nothing_else(name):
    config = replace(CONFIG, cond_embed=False)  # its bias would share the gradient of another
    mesh = make_mesh(MESHES[name])
    program, split = gradients(config, mesh), kernels(config, mesh)
    whole, parts = [shape for shape, _, _ in split], [part(shape, spec, mesh) for shape, spec, _ in split]
    gathered, scattered = collectives(program, "all-gather"), collectives(program, "reduce-scatter")
    assert set(gathered) <= set(whole)
    assert len(split) < len(gathered) <= 2 * len(split)  # forwards and, in the stacks, once more backwards
    assert sorted(scattered) == sorted(parts)
    assert not set(collectives(program, "all-reduce")) & set(whole)
    kept = [shape for _, _, shape in split if len(shape) == 3 and f"f32[{','.join(map(str, shape))}]" in program]
    assert not kept  # no stack of whole weights waits for the backward pass


@pytest.mark.parametrize("fused", [False, True])
def test_split_heads_leave_tokens_whole(fused):
    """What travels forwards are sums of each product's parts: tokens are neither gathered nor traded for columns."""
    mesh = make_mesh(MESHES["tensor 2 x data 4"])
    program = compiled(replace(CONFIG, fused_qkv=fused), mesh, lambda model, inputs: model(**inputs))
    tokens = (BATCH // 4) * (TEXT + 15) * CONFIG.hidden_size
    assert collectives(program, "all-reduce")
    assert max(map(math.prod, collectives(program, "all-gather")), default=0) < tokens // 4
    assert not collectives(program, "all-to-all")


@pytest.mark.parametrize(
    ("name", "length", "moved"),
    [
        ("fsdp 2 x seq 4, ulysses", 16, {"all-to-all"}),
        ("fsdp 2 x seq 4, ring", 16, {"collective-permute"}),
        ("fsdp 2 x seq 4, whole samples", 15, set()),
    ],
)
def test_what_is_split_along_seq_is_gathered_once_as_the_velocity(name, length, moved):
    mesh, batch = make_mesh(MESHES[name]), batch_of(name)
    program = gradients(CONFIG, mesh, batch)
    whole = {shape for shape, _, _ in kernels(CONFIG, mesh)}
    others = [shape for shape in collectives(program, "all-gather") if shape not in whole]
    assert others == [(batch // 2, length, CONFIG.in_channels)]
    assert {kind for kind in ("all-to-all", "collective-permute") if collectives(program, kind)} == moved
