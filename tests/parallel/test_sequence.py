"""Attention over tokens on several devices is attention over all of them, whatever their number; so are gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from opensora_jax.config.errors import UserError
from opensora_jax.kernels.attention import attention
from opensora_jax.nn.linear import Linear
from opensora_jax.parallel.mesh import MeshConfig, make_mesh, one_device
from opensora_jax.parallel.sequence import attend, per_device
from opensora_jax.parallel.tokens import SharedTokens

WIDTH = 12


def block(module, text, video, samples, shared):
    """Returns video tokens after attention of 4 heads, in two layers of a scan."""
    (txt, shift), img = text, video

    def layer(x, _):
        q, k, v = (part.reshape(*x.shape[:2], 4, 3) for part in jnp.split(module(x), 3, -1))
        return x + attend(q, k, v, shared).reshape(x.shape) * samples[:, None, None], None

    joint, _ = jax.lax.scan(layer, jnp.concatenate([txt + shift, img], axis=1), length=2)
    return joint[:, txt.shape[1] :]


def run(mesh, lengths, dtype=jnp.float32, batch=2):
    """Returns the output of `block` and the gradients of its mean square."""
    keys = jax.random.split(jax.random.key(0), 3)
    module = Linear(WIDTH, 3 * WIDTH, ("embed", "heads"), dtype=dtype, rngs=nnx.Rngs(0))
    txt, img = (jax.random.normal(k, (batch, n, WIDTH)) for k, n in zip(keys, lengths, strict=False))
    shift, gain = jax.random.normal(keys[2], (lengths[0], WIDTH)), jnp.arange(1.0, batch + 1)
    graphdef, params = nnx.split(module)

    def measure(params, txt, img):
        out = per_device(block, nnx.merge(graphdef, params), (txt, shift), img, gain)
        return jnp.mean(out.astype(jnp.float32) ** 2), out

    gradient = jax.value_and_grad(measure, argnums=(0, 1, 2), has_aux=True)
    if mesh is None:
        return jax.jit(gradient)(params, txt, img)
    with jax.set_mesh(mesh):
        return jax.jit(gradient)(params, txt, img)


@pytest.mark.parametrize("lengths", [(8, 12), (7, 13), (1, 5)])  # no padding; odd; a device with padding alone
@pytest.mark.parametrize("sizes", [(1, 2, 4, 1), (1, 2, 4, 1, "ring"), (2, 1, 2, 2), (2, 1, 2, 2, "ring")])
def test_split_attention_is_attention(lengths, sizes):
    found, expected = run(make_mesh(MeshConfig(*sizes)), lengths), run(None, lengths)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("samples", [3, 5])  # of a device: one after the other, and at once
def test_several_samples_trade_tokens(samples):
    found, expected = (run(mesh, (7, 13), batch=2 * samples) for mesh in (make_mesh(MeshConfig(2, 1, 2, 2)), None))
    # the last sample adds ten times what the first does, twice
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.parametrize("sizes", [(1, 2, 4, 1), (2, 1, 2, 2, "ring"), (1, 1, 8, 1)])  # 4 heads: 8 cannot share them
def test_where_samples_divide_by_the_axis_of_tokens_it_splits_them(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    found, expected = run(mesh, (7, 13), batch=8), run(None, (7, 13), batch=8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("sizes", [(2, 1, 1, 4), (1, 1, 1, 8)])  # heads divide over `tensor`; they do not
def test_attention_over_heads_alone_is_attention(sizes):
    found, expected = run(make_mesh(MeshConfig(*sizes)), (7, 13)), run(None, (7, 13))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_bfloat16_is_as_near_to_float32_on_four_devices_as_on_one(method):
    exact, one = (np.asarray(run(None, (7, 13), dtype)[0][1]) for dtype in (jnp.float32, jnp.bfloat16))
    split = np.asarray(run(make_mesh(MeshConfig(1, 2, 4, 1, method)), (7, 13), jnp.bfloat16)[0][1])
    error = [np.linalg.norm(values - exact) / np.linalg.norm(exact) for values in (one, split)]
    assert 1e-4 < error[0] < 1e-2
    assert error[1] < 1.5 * error[0]


def test_gathers_are_in_the_compute_dtype_and_gradients_add_up_in_float32():
    mesh = make_mesh(MeshConfig(1, 8, 1, 1))
    part = NamedSharding(mesh, PartitionSpec("fsdp"))
    graphdef, params = nnx.split(Linear(16, 48, ("embed", "heads"), dtype=jnp.bfloat16, bias=False, rngs=nnx.Rngs(0)))
    params = jax.device_put(params, part)

    def measure(params, x):
        linear = nnx.merge(graphdef, params)
        apply = lambda module, text, video, samples, shared: module(video)  # noqa: E731
        return jnp.mean(per_device(apply, linear, x, x, x[:, 0, 0]).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(measure)).lower(params, jax.device_put(jnp.ones((8, 3, 16)), part)).as_text()
    assert "stablehlo.all_gather" in program
    lines = program.splitlines()
    assert all("xbf16>" in line.split("->")[-1] for line in lines if "stablehlo.all_gather" in line)
    start = next(i for i, line in enumerate(lines) if "stablehlo.reduce_scatter" in line)
    assert "tensor<f32>" in lines[start + 1]


def test_without_a_mesh_or_on_one_device_the_program_is_that_of_plain_attention():
    q = jnp.ones((2, 5, 4, 3))

    def model(module, text, video, samples, shared):
        assert shared is None
        joint = jnp.concatenate([text, video], axis=1)
        return attend(joint, joint, joint, shared)[:, 5:, 0]

    def split(q):
        return per_device(model, nnx.Module(), q, q, q)

    def plain(q):
        joint = jnp.concatenate([q, q], axis=1)
        return attention(joint, joint, joint)[:, 5:, 0]

    def program(function):
        function.__name__ = "run"
        return jax.jit(function).lower(q).as_text()

    assert program(split) == program(plain)
    with jax.set_mesh(one_device()):
        assert program(split) == program(plain)


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ((1, 1, 8, 1), 4, "4 attention heads do not divide by mesh.seq x mesh.tensor = 8 x 1"),
        ((2, 4, 1, 1), 6, "a batch of 6 samples does not divide by mesh.data x mesh.fsdp = 2 x 4"),
    ],
)
def test_what_the_mesh_cannot_split_is_refused_in_one_line(sizes, batch, message):
    with pytest.raises(UserError, match=message) as error:
        run(make_mesh(MeshConfig(*sizes)), (7, 13), batch=batch)
    assert "\n" not in str(error.value)


def test_padding_is_at_the_end_of_each_kind_of_token():
    assert SharedTokens(8, 12, "seq", 4).real is None
    real = SharedTokens(3, 5, "seq", 2).real
    np.testing.assert_array_equal(real, [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
