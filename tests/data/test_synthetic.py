"""Synthetic clips: a table like a real one, and clips that go through plan and loader without a file."""

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.clips import ClipDataset
from opensora_jax.data.loader import make_loader
from opensora_jax.data.plan.buckets import Buckets
from opensora_jax.data.plan.plan import Plan
from opensora_jax.data.synthetic import synthetic_table
from opensora_jax.data.table.records import SCHEMA


def dataset(data_path: str) -> ClipDataset:
    return ClipDataset(
        data_path=data_path, fps_max=24.0, spatial_unit=16, resize="ffmpeg", cache_bytes=0, max_bad_rate=0.0
    )


def test_the_table_has_the_columns_of_a_real_one_and_images_have_one_frame():
    table = synthetic_table("synthetic:1009")
    assert table.schema == SCHEMA
    frames, fps = table["num_frames"].to_numpy(), table["fps"].to_numpy()
    assert np.array_equal(frames == 1, np.isnan(fps))
    assert 0.05 < np.isnan(fps).mean() < 0.15
    assert set(table["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("data_path", ["synthetic:", "synthetic:0", "synthetic:many"])
def test_their_number_must_be_given(data_path):
    with pytest.raises(UserError, match="does not say how many clips"):
        dataset(data_path).table()


def test_images_and_videos_come_in_one_plan_each_in_its_own_batches():
    clips = dataset("synthetic:211")
    table = clips.table()
    buckets = Buckets({"32px": {5: (1.0, 2), 1: (1.0, 3)}}, spatial_unit=16, fps_max=24.0)
    plan = Plan(table, buckets, seed=0, data_shards=1, small_buckets="drop")
    shapes = set()
    for batch in make_loader(plan, clips.source(table), start_step=0, num_steps=len(plan)):
        frames = table["num_frames"].to_numpy()[batch["sample_id"]]
        assert ((frames == 1) == (batch["video"].shape[1] == 1)).all()
        assert batch["video"].dtype == np.uint8
        shapes.add(batch["video"].shape[:2])
    assert shapes == {(2, 5), (3, 1)}


def test_a_clip_moves_and_others_move_differently():
    clips = dataset("synthetic:50")
    source, bucket = (
        clips.source(clips.table()),
        Buckets({"32px": {5: (1.0, 2)}}, spatial_unit=16, fps_max=24.0).buckets[0],
    )
    videos = [row for row in range(50) if source.facts["num_frames"][row] > 9][:2]
    one, other = (source.read(row, bucket, 3)["video"] for row in videos)
    assert one.shape == (5, bucket.height, bucket.width, 3)
    assert (one[0] != one[1]).any()
    assert (one != other).any()
