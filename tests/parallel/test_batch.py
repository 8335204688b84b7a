"""Videos are split over whatever divides; an autoencoder split so gives the answer of one device, without gathering."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from opensora_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from opensora_jax.parallel.batch import video_sharding
from opensora_jax.parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("mesh", "sizes", "spec"),
    [
        ((8, 1, 1, 1), (16, 3, 5), (("data",),)),
        ((2, 2, 1, 2), (2, 6, 5), (("data",), None, ("fsdp",))),
        ((2, 2, 1, 2), (2, 6, 10), (("data",), None, ("fsdp",), ("tensor",))),
        ((1, 1, 1, 8), (1, 24, 42), (None, None, ("tensor",))),
        ((1, 1, 1, 8), (1, 9, 16), (None, None, None, ("tensor",))),
        ((2, 2, 1, 2), (1, 12, 5), (None, None, ("data", "fsdp"))),
        ((8, 1, 1, 1), (1, 3, 5), ()),
        ((1, 1, 4, 2), (1, 12, 6), (None, None, ("seq",), ("tensor",))),
        ((2, 1, 4, 1, "ring"), (2, 8, 5), (("data",), None, ("ring",))),
    ],
)
def test_videos_are_split_first_then_rows_then_columns(mesh, sizes, spec):
    sharding = video_sharding(make_mesh(MeshConfig(*mesh)), *sizes)
    assert sharding.spec == PartitionSpec(*spec, *[None] * (5 - len(spec)))


CONFIG = HunyuanVAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=2,
    block_out_channels=(4, 4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    time_compression_ratio=4,
    spatial_compression_ratio=8,
    mid_block_add_attention=True,
    scale_factor=0.5,
    shift_factor=0.1,
)


@pytest.mark.parametrize(("mesh", "sizes"), [((1, 2, 1, 4), (1, 8, 3)), ((2, 1, 2, 2), (2, 3, 4))])
def test_a_split_autoencoder_gives_what_one_device_gives_and_gathers_only_for_attention(mesh, sizes):
    batch, height, width = sizes
    mesh = make_mesh(MeshConfig(*mesh))
    sharding = video_sharding(mesh, *sizes)
    graph, params = nnx.split(HunyuanVAE(CONFIG, rngs=nnx.Rngs(0)))
    video = jax.random.normal(jax.random.key(0), (batch, 5, 8 * height, 8 * width, 3))

    def run(video):
        model = nnx.merge(graph, params)
        latent = model.encode(video)
        return latent, model.decode(latent)

    compiled = jax.jit(run, out_shardings=sharding).lower(jax.device_put(video, sharding)).compile()
    for found, expected in zip(compiled(jax.device_put(video, sharding)), jax.jit(run)(video), strict=True):
        assert found.sharding.spec == sharding.spec
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    gathered = [
        np.prod([int(size) for size in shape.split(",")])
        for shape in re.findall(r"= \S*?\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    ]
    assert max(gathered) <= batch * 2 * height * width * 8  # the coarsest level's positions and channels
