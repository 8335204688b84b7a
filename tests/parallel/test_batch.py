"""Videos are split over whatever divides, over the batch first, then rows, then columns; hosts read equal parts."""

from types import SimpleNamespace
from unittest import mock

import jax
import pytest
from jax.sharding import PartitionSpec

from opensora_jax.config.errors import UserError
from opensora_jax.parallel import batch
from opensora_jax.parallel.batch import data_share, video_sharding
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


def placed(monkeypatch, *processes):
    """Makes this the second of processes whose devices hold these shards of a batch."""
    devices = [(mock.Mock(process_index=n), shard) for n, shards in enumerate(processes) for shard in shards]
    count = 1 + max(shard for _, shard in devices)
    found = {device: (slice(shard, shard + 1),) for device, shard in devices}
    sharding = SimpleNamespace(devices_indices_map=lambda shape: found)
    monkeypatch.setattr(batch, "batch_sharding", lambda mesh: sharding)
    monkeypatch.setattr(batch, "data_shards", lambda mesh: count)
    monkeypatch.setattr(jax, "process_index", lambda: 1)


@pytest.mark.parametrize(
    ("processes", "share"),
    [
        (([0, 1], [2, 3]), (1, 2)),
        (([0, 0], [1, 1]), (1, 2)),
        (([0], [0], [1], [1]), (0, 2)),  # two processes of one shard read the same
        (([0, 1], [0, 1]), (0, 1)),
    ],
)
def test_processes_read_equal_parts(monkeypatch, processes, share):
    placed(monkeypatch, *processes)
    assert data_share(make_mesh(MeshConfig(8, 1, 1, 1))) == share


@pytest.mark.parametrize("processes", [([0, 0, 0, 1], [1, 1, 2, 2], [2, 3, 3, 3]), ([0, 0], [0, 1], [1, 1])])
def test_parts_that_are_not_equal_are_refused(monkeypatch, processes):
    placed(monkeypatch, *processes)
    with pytest.raises(UserError, match=r"3 processes cannot read equal parts of a batch in \d shards: choose mesh\."):
        data_share(make_mesh(MeshConfig(8, 1, 1, 1)))
