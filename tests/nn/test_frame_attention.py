"""Attention frame by frame is attention written out, forwards and backwards, on one device and on eight."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.kernels import reference
from opensora_jax.nn import frame_attention as module
from opensora_jax.nn.frame_attention import frame_causal_attention
from opensora_jax.parallel.batch import video_sharding
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from tests.collectives import gathered


def draw(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (3, *shape)).astype(dtype)


def definition(q, k, v):
    B, T, H, W, C = q.shape
    q, k, v = (a.reshape(B, T * H * W, 1, C) for a in (q, k, v))
    frame = np.repeat(np.arange(T), H * W)
    mask = jnp.asarray(frame[:, None] >= frame)[None, None]
    return reference.attention(q, k, v, mask=mask).reshape(B, T, H, W, C)


def with_gradients(attend):
    def loss(q, k, v):
        y = attend(q, k, v)
        return jnp.sin(y).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    ("shape", "largest"),
    [
        ((2, 5, 3, 7, 11), 10**6),  # written out
        ((2, 5, 3, 7, 11), 2 * 3 * 7 * 13),  # chunks of keys that end within frames, the last one short
        ((2, 5, 3, 7, 11), 1),  # single keys
        ((1, 3, 5, 29, 4), 5 * 29 * 130),  # chunks as a TPU likes them
        ((3, 1, 5, 7, 4), 3 * 35 * 8),  # images
    ],
)
def test_frames_and_chunks_of_keys_make_the_whole(monkeypatch, shape, largest):
    monkeypatch.setattr(module, "LARGEST", largest)
    found, expected = (with_gradients(attend)(*draw(*shape)) for attend in (frame_causal_attention, definition))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found[0][1], expected[0][1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.abs(theirs).max()), rtol=1e-6)


def test_in_bfloat16_it_differs_by_the_rounding_of_weights_alone(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 500)
    q, k, v = draw(1, 3, 4, 5, 8, dtype=jnp.bfloat16)
    found, expected = jax.jit(frame_causal_attention)(q, k, v), definition(q, k, v)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-2)


def test_split_in_space_devices_keep_their_queries_and_gather_keys_and_values_once(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 16 * 6 * 200)
    mesh, (B, T, H, W, C) = make_mesh(MeshConfig(1, 2, 1, 4)), (1, 3, 16, 6, 4)
    sharding = video_sharding(mesh, B, H, W)
    inputs = draw(B, T, H, W, C)
    placed = [jax.device_put(a, sharding) for a in inputs]
    run = jax.jit(with_gradients(frame_causal_attention))
    found, expected = run(*placed), with_gradients(definition)(*inputs)
    np.testing.assert_allclose(found[0][1], expected[0][1], atol=1e-6)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.abs(theirs).max()), rtol=1e-6)
    text = jax.jit(frame_causal_attention, out_shardings=sharding).lower(*placed).compile().as_text()
    assert sum(gathered(text)) == 2 * B * T * H * W * C


def test_no_array_has_a_value_for_every_pair_of_positions(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 5000)
    B, T, H, W, C = 1, 7, 8, 8, 4
    text = jax.jit(frame_causal_attention).lower(*draw(B, T, H, W, C)).compile().as_text()
    made = [np.prod([int(n) for n in shape.split(",") if n]) for shape in re.findall(r"\[([\d,]*)\]", text)]
    assert max(made) <= 5000
