"""Clips as samples: starts and picks drawn by seeds, bad ones counted, decoded ones kept, captions as tokens."""

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.clip_source import Captions, ClipSource, read_original, read_scaled
from opensora_jax.data.clips import ClipDataset, assigned_rows, read_once
from opensora_jax.data.media.transforms import original_pixels
from opensora_jax.data.media.video import VideoError, VideoInfo, read_frames
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.plan.buckets import Bucket, Buckets
from opensora_jax.data.plan.plan import Plan
from opensora_jax.data.table import records
from tests.data.plans import COUNT, batches, clip_table, make_plan

BUCKET = Bucket("48px", "1:1", 9, 48, 48, 1)


@pytest.fixture
def decoder(monkeypatch):
    """Replaces decoding: frames hold their number; files whose name starts with x cannot be read."""
    calls = []

    def read_frames(path, info, *, picks, size, crop):
        calls.append((path, picks[0]))
        if path.startswith("x"):
            raise VideoError("damaged")
        assert (size, crop) == ((48, 60), (0, 6, 48, 48))
        clip = np.zeros((len(picks), crop[2], crop[3], 3), np.uint8)
        return clip + picks.astype(np.uint8)[:, None, None, None]

    monkeypatch.setattr("opensora_jax.data.clip_source.read_frames", read_frames)
    return calls


def clip_source(table, cache_bytes=0, max_bad_rate=0.5):
    return ClipSource(table, read_scaled, fps_max=24, cache_bytes=cache_bytes, max_bad_rate=max_bad_rate)


def test_clips_start_where_their_seed_says(decoder):
    table = clip_table(frames=(9, 30))
    starts = [b["video"][:, 0, 0, 0, 0] for b in batches(make_plan(table), clip_source(table), count=6)]
    again = [b["video"][:, 0, 0, 0, 0] for b in batches(make_plan(table), clip_source(table), count=6)]
    np.testing.assert_array_equal(starts, again)
    assert len(set(np.concatenate(starts).tolist())) > 3


def test_a_cached_clip_is_decoded_once(decoder):
    table = clip_table(frames=(9, 9))
    batches(make_plan(table), clip_source(table, cache_bytes=10**7), count=12, num_workers=1)
    assert len(decoder) == len(set(decoder)) == COUNT


def test_the_cache_keeps_to_its_bytes(decoder):
    clip_bytes = 9 * 48 * 48 * 3
    table = clip_table(frames=(9, 9))
    source = clip_source(table, cache_bytes=5 * clip_bytes + 1)
    batches(make_plan(table), source, count=12)
    assert source._cache.bytes == 5 * clip_bytes
    assert len(decoder) > COUNT


def test_bad_clips_are_counted_with_their_reason(decoder):
    table = clip_table(paths=["x0.mp4", *(f"{i}.mp4" for i in range(1, COUNT))])
    source = clip_source(table)
    seen = np.concatenate([batch["sample_id"] for batch in batches(make_plan(table), source)])
    assert source.bad_clips == {"x0.mp4": "damaged"}
    assert 0 not in seen


def test_asking_whether_a_clip_can_be_read_counts_nowhere(decoder):
    source = clip_source(clip_table(paths=["x0.mp4", "1.mp4"], frames=(9, 9)))
    assert [source.is_readable(row, BUCKET, 0) for row in (0, 1)] == [False, True]
    assert (source.bad_clips, source._reads) == ({}, 0)


def test_too_many_bad_clips_end_the_run(decoder):
    table = clip_table(paths=[f"{'x' if i % 2 else ''}{i}.mp4" for i in range(COUNT)])
    with pytest.raises(UserError, match=r"more than max_bad_rate = 0\.25; last: x\d+\.mp4 \(damaged\)"):
        batches(make_plan(table), clip_source(table, max_bad_rate=0.25), count=60)


def test_real_files_become_clips_and_a_broken_one_is_replaced(tmp_path):
    paths = []
    for i in range(5):
        frames = np.full((9, 48, 60, 3), 40 * (i + 1), np.uint8)
        paths.append(str(write_video(tmp_path / f"{i}.mp4", frames, 8.0)))
    (tmp_path / "4.mp4").write_bytes(b"no video")
    table = clip_table(paths=paths, frames=(9, 9))
    source = clip_source(table)
    for batch in batches(make_plan(table, batch_size=2), source, count=6):
        assert batch["video"].dtype == np.uint8
        assert batch["video"].shape == (2, 9, 48, 48, 3)
        brightness = batch["video"].mean(axis=(1, 2, 3, 4))
        np.testing.assert_allclose(brightness, 40 * (batch["sample_id"] + 1), atol=3)
    assert list(source.bad_clips) == [paths[4]]


def test_images_that_are_gone_or_a_url_are_replaced_in_training_and_left_out_of_a_cache(tmp_path):
    stills = [np.full((1, 48, 60, 3), 40 * (i + 1), np.uint8) for i in range(5)]
    paths = [str(write_video(tmp_path / f"{i}.png", still, 1)) for i, still in enumerate(stills)]
    (tmp_path / "3.png").unlink()
    paths[4] = "https://x.org/4.png"
    table = clip_table(paths=paths, frames=(1, 1))
    table = records.with_column(table, "fps", pa.array([float("nan")] * 5))
    bad = {paths[3]: "no such file", paths[4]: "a URL, not a file: download it first"}
    buckets = Buckets({"48px_ar1:1": {1: (1.0, 2)}}, spatial_unit=16, fps_max=24)
    plan, source = Plan(table, buckets, seed=3, data_shards=1), clip_source(table)
    found = batches(plan, source, count=8)
    assert {row for batch in found for row in batch["sample_id"].tolist()} == {0, 1, 2}
    assert sum(batch["replaced"].sum() for batch in found) > 0
    assert source.bad_clips == bad
    source = clip_source(table)
    left = [ids for _, ids, _ in read_once(source, assigned_rows(table, buckets, 0), 2, "encode")]
    assert left == [[0, 1], [2]]
    assert source.bad_clips == bad


def test_what_is_read_does_not_depend_on_what_was_read_before(decoder):
    table = clip_table(paths=[f"{'x' if i % 5 == 0 else ''}{i}.mp4" for i in range(COUNT)])
    whole = batches(make_plan(table), clip_source(table), count=12)
    rest = batches(make_plan(table), clip_source(table), start=7, count=5)
    for one, other in zip(whole[7:], rest, strict=True):
        np.testing.assert_array_equal(one["video"], other["video"])
        np.testing.assert_array_equal(one["replaced"], other["replaced"])
    assert any(batch["replaced"].any() for batch in whole)


def test_captions_come_as_tokens(decoder):
    table = clip_table()
    texts = pa.chunked_array([[f"clip {i}" for i in range(COUNT)]], pa.large_string())
    captions = Captions(texts, lambda text: {"t5": np.frombuffer(text.encode().ljust(9), np.uint8)})
    source = ClipSource(table, read_scaled, fps_max=24, cache_bytes=0, max_bad_rate=0.1, captions=captions)
    assert bytes(source.read(17, BUCKET, 0)["t5"]) == b"clip 17  "


def test_resizing_is_that_of_ffmpeg_or_of_the_original(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    path, info = str(write_video(tmp_path / "a.mp4", frames, 8.0)), VideoInfo(9, 48, 64, 8.0)
    picks, target = np.arange(9), (24, 24)
    ours, theirs = read_scaled(path, info, picks, target), read_original(path, info, picks, target)
    assert (ours.dtype, theirs.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(theirs, original_pixels(read_frames(path, info, picks=picks), target, image=False))
    assert 0 < np.abs(theirs - (ours / 127.5 - 1)).mean() < 0.1


def test_a_dataset_refuses_what_no_clip_can_be_read_by():
    fields = {"data_path": "a", "fps_max": 24.0, "spatial_unit": 8, "cache_bytes": 0}
    with pytest.raises(ValueError, match="resize is one of ffmpeg, original: got 'pil'"):
        ClipDataset(**fields, resize="pil", max_bad_rate=0.1)
    with pytest.raises(ValueError, match="0 to 1: got 10"):
        ClipDataset(**fields, resize="ffmpeg", max_bad_rate=10.0)
