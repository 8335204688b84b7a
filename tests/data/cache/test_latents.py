"""The latent cache: what goes in comes out, from any thread; stale, unfinished and damaged caches are refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CachedBuckets, CacheInfo, LatentCache
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.data.plan.plan import Plan

VIDEO, IMAGE = Bucket("48px", "1:1", 9, 48, 48, 2), Bucket("48px", "4:3", 1, 40, 56, 5)
CAPTIONS = ["", "a red circle", "été 雨"]
COUNT = 11
IDENTITY = Identity({"autoencoder weights": "1", "captions": "2"}, {"encode.posterior": "mode"})
INFO = CacheInfo("dataset encode", IDENTITY, "float32", COUNT, 4, len(CAPTIONS), 2)


def latent_of(sample_id, bucket):
    shape = (3, 6, 6, 2) if bucket is VIDEO else (1, 5, 7, 2)
    return np.random.default_rng(sample_id).standard_normal(shape, np.float32)


def text_of(number):
    return np.full((5, 3), number, np.float32), np.full(7, -number, np.float32)


def bucket_of(i):
    return IMAGE if i % 3 == 0 else VIDEO


def write_cache(folder, info=INFO):
    writer = LatentWriter(folder, info)
    writer.start()
    for shard in range(len(writer.texts)):
        with writer.writing_texts(shard) as file:
            for number in range(info.texts)[writer.texts.part(shard)]:
                file.add(CAPTIONS[number], *text_of(number))
    for shard in range(len(writer.latents)):
        write_latents(writer, shard)
    return writer


def write_latents(writer, shard):
    with writer.writing_latents(shard) as file:
        for i in range(COUNT)[writer.latents.part(shard)]:
            fps = float("nan") if bucket_of(i) is IMAGE else 8
            latent = latent_of(i, bucket_of(i))
            file.add(100 + i, bucket_of(i), latent, text_id=i % 2 + 1, fps=fps, path=f"{i}.mp4")


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "latents")
    return LatentCache(tmp_path / "latents")


def check_row(cache, row):
    bucket = bucket_of(row)
    entry = cache.read(row)
    text, pooled = text_of(row % 2 + 1)
    np.testing.assert_array_equal(entry["latent"], latent_of(row, bucket))
    np.testing.assert_array_equal(entry["text"], text)
    np.testing.assert_array_equal(entry["pooled"], pooled)
    np.testing.assert_array_equal(entry["fps"], np.float32("nan") if bucket is IMAGE else np.float32(8))


def test_rows_come_back_exactly(cache):
    assert len(cache) == COUNT
    for row in range(COUNT):
        check_row(cache, row)
    assert cache.index["path"].to_pylist() == [f"{i}.mp4" for i in range(COUNT)]
    assert cache.index["sample_id"].to_pylist() == list(range(100, 100 + COUNT))
    assert cache.captions.to_pylist() == CAPTIONS
    assert cache.index["text_id"].to_pylist() == [i % 2 + 1 for i in range(COUNT)]


def test_the_ends_of_a_clip_are_read_with_its_latent(tmp_path):
    writer = write_cache(tmp_path)
    with writer.writing_latents(2) as file:
        ends = {name: np.full((1, 6, 6, 2), i, np.float32) for i, name in enumerate(("head", "tail"))}
        file.add(108, VIDEO, latent_of(8, VIDEO), ends, text_id=1, fps=8, path="8.mp4")
    entry = LatentCache(tmp_path).read(8)
    np.testing.assert_array_equal(entry["latent"], latent_of(8, VIDEO))
    for name, value in ends.items():
        np.testing.assert_array_equal(entry[name], value)


def test_four_threads_read_the_same(cache):
    rows = np.random.default_rng(2).integers(0, COUNT, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: check_row(cache, row), rows))


def test_bfloat16_is_stored_and_read_as_such(tmp_path):
    write_cache(tmp_path / "latents", replace(INFO, dtype="bfloat16"))
    cache = LatentCache(tmp_path / "latents")
    entry = cache.read(1)
    assert {entry[name].dtype for name in ("latent", "text", "pooled")} == {np.dtype(ml_dtypes.bfloat16)}
    np.testing.assert_array_equal(entry["latent"], latent_of(1, VIDEO).astype(ml_dtypes.bfloat16))
    assert entry["fps"].dtype == np.float32
    assert cache.null_text["text"].dtype == ml_dtypes.bfloat16


def test_the_null_text_is_that_of_the_empty_caption(cache):
    np.testing.assert_array_equal(cache.null_text["text"], text_of(0)[0])


def test_a_cache_of_latents_alone_has_no_texts_and_says_so(tmp_path):
    folder = tmp_path / "latents"
    write_cache(folder, replace(INFO, command="vae encode", texts=0))
    cache = LatentCache(folder)
    np.testing.assert_array_equal(cache.read_latent(4), latent_of(4, VIDEO))
    with pytest.raises(UserError, match="latents but no texts: make it with `dataset encode`, not `vae encode`"):
        cache.read(4)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (Identity(IDENTITY.digests | {"captions": "3"}, IDENTITY.settings), "other captions; delete it and run "),
        (Identity({"captions": "2"}, IDENTITY.settings), "other autoencoder weights; "),
        (Identity(IDENTITY.digests, {"encode.posterior": "sample"}), r"encode.posterior = 'mode' \(now 'sample'\)"),
    ],
)
def test_a_cache_of_other_things_is_refused_by_what_differs(tmp_path, identity, message):
    write_cache(tmp_path / "latents")
    before = {path: path.read_bytes() for path in (tmp_path / "latents").iterdir()}
    with pytest.raises(UserError, match=f"latents is made of other things: {message}"):
        LatentWriter(tmp_path / "latents", replace(INFO, identity=identity))
    assert {path: path.read_bytes() for path in (tmp_path / "latents").iterdir()} == before


def test_a_folder_without_shards_may_become_another_cache(tmp_path):
    LatentWriter(tmp_path, INFO).start()
    other = replace(INFO, identity=Identity({}, {}))
    LatentWriter(tmp_path, other).start()
    assert CacheInfo.read(tmp_path) == other


def test_nothing_is_written_before_the_start(tmp_path):
    LatentWriter(tmp_path / "latents", INFO)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_continued_in_its_own_shards(tmp_path):
    write_cache(tmp_path).latents.index_path(1).unlink()
    writer = LatentWriter(tmp_path, replace(INFO, shard_clips=100, shard_texts=100))
    writer.start()
    assert [info is None for info in writer.latents.info()] == [False, True, False]
    assert all(writer.texts.info())
    write_latents(writer, 1)
    cache = LatentCache(tmp_path)
    for row in range(COUNT):
        check_row(cache, row)


def test_an_unfinished_cache_is_refused_and_says_how_to_go_on(tmp_path):
    with pytest.raises(UserError, match="holds no latents; make them with `dataset encode`"):
        LatentCache(tmp_path)
    writer = write_cache(tmp_path)
    writer.latents.index_path(1).unlink()
    message = r"1 of its 3 shards of latents .*latents-00001-of-00003.array_record\); continue with `dataset encode`"
    with pytest.raises(UserError, match=message):
        LatentCache(tmp_path)
    write_latents(writer, 1)
    writer.texts.records_path(0).unlink()
    with pytest.raises(UserError, match="1 of its 2 shards of texts are missing or cut short"):
        LatentCache(tmp_path)


def test_a_shard_cut_short_is_one_line(tmp_path):
    records = write_cache(tmp_path).latents.records_path(2)
    records.write_bytes(records.read_bytes()[:-7])
    with pytest.raises(UserError, match="missing or cut short") as caught:
        LatentCache(tmp_path)
    assert "\n" not in str(caught.value)


def test_damage_inside_a_shard_is_one_line_and_the_other_rows_are_read(tmp_path):
    records = write_cache(tmp_path).latents.records_path(0)
    data = records.read_bytes()
    records.write_bytes(data.replace(latent_of(2, VIDEO).tobytes()[:40], bytes(40)))
    cache = LatentCache(tmp_path)
    check_row(cache, 1)
    with pytest.raises(
        UserError, match=r"00000-of-00003\.array_record, record 2: .*delete this file and run"
    ) as caught:
        cache.read(2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"version": 1}), "has cache version 1, not 2; delete it and encode again"),
        ('{"version": 2,', "cache.json is damaged"),
    ],
)
def test_a_foreign_or_damaged_cache_is_refused(tmp_path, content, message):
    write_cache(tmp_path)
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(UserError, match=message):
        LatentCache(tmp_path)
    with pytest.raises(UserError, match=message):
        LatentWriter(tmp_path, INFO)


def test_what_was_left_out_is_remembered(tmp_path):
    writer = write_cache(tmp_path)
    with writer.writing_latents(0) as file:
        file.leave_out("0.mp4", "damaged")
        file.leave_out("1.mp4", "empty")
    cache = LatentCache(tmp_path)
    assert cache.left_out == [("0.mp4", "damaged"), ("1.mp4", "empty")]
    assert len(cache) == COUNT - 4


def test_what_killed_runs_left_is_swept_and_nothing_else(tmp_path):
    writer = write_cache(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / ".latents-00001-of-00003.array_record.0123.tmp").write_bytes(b"half")
    writer.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_shapes_must_agree_within_a_bucket(tmp_path):
    writer = LatentWriter(tmp_path, INFO)
    with writer.writing_latents(0) as file:
        file.add(0, VIDEO, latent_of(0, VIDEO), fps=8, path="")
    with pytest.raises(ValueError, match="one shape in a cache"), writer.writing_latents(1) as file:
        file.add(1, VIDEO, latent_of(0, IMAGE), fps=8, path="")
    with writer.writing_texts(0) as texts:
        texts.add("", *text_of(0))
        with pytest.raises(ValueError, match="one shape in a cache"):
            texts.add("a", np.zeros((4, 3), np.float32), text_of(0)[1])


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
