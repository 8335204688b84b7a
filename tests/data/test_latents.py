"""The latent cache: what goes in comes out, from any thread; stale and damaged caches are refused."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.buckets import Bucket
from opensora_jax.data.latents import CachedBuckets, LatentCache, LatentWriter
from opensora_jax.data.plan import Plan

VIDEO, IMAGE = Bucket("48px", "1:1", 9, 48, 48, 2), Bucket("48px", "4:3", 1, 40, 56, 5)
CAPTIONS = ["", "a red circle", "été 雨"]


def latent_of(sample_id, bucket):
    shape = (3, 6, 6, 2) if bucket is VIDEO else (1, 5, 7, 2)
    return np.random.default_rng(sample_id).standard_normal(shape, np.float32)


def text_of(number):
    return np.full((5, 3), number, np.float32), np.full(7, -number, np.float32)


def write_cache(folder, key="k1", count=11):
    writer = LatentWriter(folder, key)
    for number, caption in enumerate(CAPTIONS):
        assert writer.add_text(caption, *text_of(number)) == number
    for i in range(count):
        bucket = IMAGE if i % 3 == 0 else VIDEO
        fps = float("nan") if bucket is IMAGE else 8
        writer.add_latent(100 + i, bucket, latent_of(i, bucket), i % 2 + 1, fps, f"{i}.mp4")
    return writer.finish()


@pytest.fixture
def cache(tmp_path):
    return LatentCache(write_cache(tmp_path / "latents"), "k1")


def check_row(cache, row):
    bucket = IMAGE if row % 3 == 0 else VIDEO
    entry = cache.read(row)
    text, pooled = text_of(row % 2 + 1)
    np.testing.assert_array_equal(entry["latent"], latent_of(row, bucket))
    np.testing.assert_array_equal(entry["text"], text)
    np.testing.assert_array_equal(entry["pooled"], pooled)
    np.testing.assert_array_equal(entry["fps"], np.float32("nan") if bucket is IMAGE else np.float32(8))


def test_rows_come_back_exactly(cache):
    assert len(cache) == 11
    for row in range(11):
        check_row(cache, row)
    assert cache.index["path"].to_pylist() == [f"{i}.mp4" for i in range(11)]
    assert cache.index["caption"].to_pylist() == [CAPTIONS[i % 2 + 1] for i in range(11)]
    assert cache.index["sample_id"].to_pylist() == list(range(100, 111))


def test_four_threads_read_the_same(cache):
    rows = np.random.default_rng(2).integers(0, 11, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: check_row(cache, row), rows))


def test_a_caption_is_written_once(tmp_path):
    writer = LatentWriter(tmp_path / "latents", "k")
    ids = [writer.add_text(caption, *text_of(i)) for i, caption in enumerate(["", "a", "", "a", "b"])]
    writer.finish()
    assert ids == [0, 1, 0, 1, 2]
    assert len(LatentCache(tmp_path / "latents", "k").captions) == 3


def test_the_null_text_is_that_of_the_empty_caption(cache, tmp_path):
    np.testing.assert_array_equal(cache.null_text["text"], text_of(0)[0])
    writer = LatentWriter(tmp_path / "other", "k")
    writer.add_text("a", *text_of(1))
    with pytest.raises(UserError, match="no embedding of the empty text"):
        LatentCache(writer.finish(), "k").null_text  # noqa: B018


def test_a_cache_of_other_encoders_is_refused_by_name(tmp_path):
    folder = write_cache(tmp_path / "latents", key="old")
    with pytest.raises(UserError, match=r"other encoders \(key old, now new\); delete it and encode again"):
        LatentCache(folder, "new")
    assert LatentCache(folder, None).key == "old"


def test_an_unfinished_cache_is_none_and_is_replaced(tmp_path):
    folder = tmp_path / "latents"
    LatentWriter(folder, "k1").add_text("left by a killed run", *text_of(0))
    with pytest.raises(UserError, match="no finished latents"):
        LatentCache(folder, "k1")
    assert LatentCache(write_cache(folder), "k1").captions.keys() == set(CAPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_a_finished_cache_is_not_overwritten(tmp_path):
    write_cache(tmp_path / "latents")
    with pytest.raises(UserError, match="exists; delete it"):
        LatentWriter(tmp_path / "latents", "k1")


@pytest.mark.parametrize(("field", "value", "message"), [("version", 0, "version 0"), ("texts", {}, "is damaged")])
def test_a_foreign_or_damaged_cache_is_refused(tmp_path, field, value, message):
    about = write_cache(tmp_path / "latents") / "cache.json"
    about.write_text(json.dumps(json.loads(about.read_text(encoding="utf-8")) | {field: value}), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        LatentCache(tmp_path / "latents", "k1")


def test_shapes_must_agree_within_a_bucket(tmp_path):
    writer = LatentWriter(tmp_path / "latents", "k")
    writer.add_text("", *text_of(0))
    writer.add_latent(0, VIDEO, latent_of(0, VIDEO), 0, 8)
    with pytest.raises(ValueError, match="one shape in a cache"):
        writer.add_latent(1, VIDEO, latent_of(0, IMAGE), 0, 8)
    with pytest.raises(ValueError, match="one shape in a cache"):
        writer.add_text("a", np.zeros((4, 3), np.float32), text_of(0)[1])
    with pytest.raises(ValueError, match="add the text first"):
        writer.add_latent(1, VIDEO, latent_of(0, VIDEO), 1, 8)


def test_the_index_makes_a_plan_with_batch_sizes_of_the_config(cache):
    plan = Plan(cache.index, CachedBuckets({"48px": {1: (0.5, 2), 9: (1.0, 3)}}), seed=1, data_shards=1)
    assert {(row.bucket.num_frames, row.samples, row.bucket.batch_size) for row in plan.report()} == {
        (1, 4, 2),
        (9, 7, 3),
    }
    for bucket, ids, _ in (plan[step] for step in range(9)):
        assert {row % 3 == 0 for row in ids.tolist()} == {bucket.num_frames == 1}


def test_rows_outside_the_config_are_counted_and_none_at_all_is_an_error(cache):
    some = Plan(cache.index, CachedBuckets({"48px": {9: (1.0, 3)}}), seed=1, data_shards=1)
    assert [str(reason) for reason in some.unassigned] == ["4 in no line of bucket_config"]
    with pytest.raises(UserError, match="hold 48px with 1 frames, 48px with 9 frames"):
        Plan(cache.index, CachedBuckets({"96px": {9: (1.0, 3)}}), seed=1, data_shards=1)
