"""Videos are split over whatever divides: over the batch first, then rows, then columns."""

import pytest
from jax.sharding import PartitionSpec

from opensora_jax.parallel.batch import video_sharding
from opensora_jax.parallel.mesh import MeshConfig, make_mesh


def test_an_axis_that_splits_nothing_is_told_once(caplog):
    mesh = make_mesh(MeshConfig(2, 1, 1, 4))
    for _ in range(2):
        video_sharding(mesh, 2, 7, 9)
    assert [record.getMessage() for record in caplog.records] == [
        "the 4 devices along mesh.tensor all do the same work in the autoencoder: neither 2 videos nor the 7 rows or 9 "
        "columns of their latents divide by it"
    ]


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
