import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.data.clip_source import ClipSource
from opensora_jax.data.clips import ImageSteps, assigned_rows, read_once
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.buckets import Bucket, Buckets

BUCKET = Bucket("32px", "1:1", 3, 32, 32, 2)


def batches(start, stop, clips=5, frames=7):
    for step in range(start, stop):
        video = np.arange(clips * frames, dtype=np.uint8).reshape(clips, frames, 1, 1, 1).repeat(3, -1)
        yield {"video": video, "sample_id": np.arange(clips) + 10, "step": np.asarray(step)}


def test_early_steps_see_single_frames_of_every_clip_and_later_ones_whole_clips():
    early, late = list(ImageSteps(steps=4, frames=3).apply(batches(3, 5), seed=0))
    assert early["video"].shape == (15, 1, 1, 1, 3)
    assert early["sample_id"].tolist() == np.repeat(np.arange(10, 15), 3).tolist()
    clip, frame = np.divmod(early["video"][:, 0, 0, 0, 0].astype(int), 7)
    assert clip.tolist() == np.repeat(np.arange(5), 3).tolist()
    assert all(len(set(frame[clip == c])) == 3 for c in range(5))  # no frame twice
    assert late["video"].shape == (5, 7, 1, 1, 3)


def test_the_frames_of_a_step_do_not_depend_on_where_a_run_starts():
    images = ImageSteps(steps=9, frames=2)
    whole = [batch["video"] for batch in images.apply(batches(0, 5), seed=1)]
    np.testing.assert_array_equal(whole[3:], [batch["video"] for batch in images.apply(batches(3, 5), seed=1)])
    other = [batch["video"] for batch in images.apply(batches(3, 5), seed=2)]
    assert (np.asarray(whole[3:]) != np.asarray(other)).any()


def test_short_clips_give_all_their_frames():
    (batch,) = ImageSteps(steps=1, frames=50).apply(batches(0, 1), seed=0)
    assert sorted(batch["video"][:, 0, 0, 0, 0].tolist()) == list(range(35))


@pytest.mark.parametrize(("steps", "frames"), [(-1, 1), (1, 0)])
def test_image_steps_that_no_batch_can_give_are_refused(steps, frames):
    with pytest.raises(ValueError, match="steps >= 0 and frames >= 1"):
        ImageSteps(steps, frames)


class Source(ClipSource):
    """Clips of one colour, the number of their row; some cannot be read."""

    def __init__(self, broken):
        self.broken, self.refused = broken, []

    def read(self, sample_id, bucket, seed):
        if sample_id in self.broken:
            raise VideoError("broken")
        return {"video": np.full((bucket.num_frames, 2, 2, 3), sample_id, np.uint8)}

    def refuse(self, sample_id, error):
        self.refused.append(sample_id)


def test_every_clip_is_read_once_in_batches_of_one_size():
    source, other = Source(broken=(2,)), Bucket("32px", "1:1", 5, 32, 32, 2)
    rows = [(BUCKET, 0), (BUCKET, 1), (BUCKET, 2), (BUCKET, 3), (other, 4)]
    found = list(read_once(source, rows, 2, "read"))
    assert [(bucket.num_frames, ids) for bucket, ids, _ in found] == [(3, [0, 1]), (3, [3]), (5, [4])]
    assert [video[:, 0, 0, 0, 0].tolist() for _, _, video in found] == [[0, 1], [3, 3], [4, 4]]
    assert source.refused == [2]


def test_rows_come_bucket_by_bucket_and_unusable_ones_not_at_all():
    table = pa.table(
        {
            "num_frames": [9, 3, 1, 9],
            "height": [64, 64, 64, 4],
            "width": [64, 64, 64, 4],
            "fps": [8.0, 8.0, float("nan"), 8.0],
        }
    )
    buckets = Buckets({"32px_ar1:1": {9: (1.0, 2), 3: (1.0, 2)}}, spatial_unit=8, fps_max=24.0)
    rows = assigned_rows(table, buckets, 0)
    assert [(bucket.num_frames, row) for bucket, row in rows] == [(9, 0), (3, 1)]
