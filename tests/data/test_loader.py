"""The loader: the plan's batches whatever the hosts, start and threads; failures are told once."""

import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.buckets import Bucket, Buckets
from opensora_jax.data.latents import CachedBuckets, LatentCache, LatentWriter
from opensora_jax.data.loader import ClipSource, LatentSource, make_loader
from opensora_jax.data.plan import Plan
from opensora_jax.data.video import VideoError, write_video

COUNT = 23


def clip_table(paths=None, frames=(9, 14)):
    rng = np.random.default_rng(1)
    columns = {
        "path": paths or [f"{i}.mp4" for i in range(COUNT)],
        "num_frames": rng.integers(*frames, len(paths or range(COUNT)), endpoint=True),
    }
    same = {"height": 48, "width": 60, "fps": 8.0, "variable_fps": False, "status": "ok"}
    return pa.table(columns | {name: [value] * len(columns["path"]) for name, value in same.items()})


def make_plan(table, batch_size=4, data_shards=1):
    buckets = Buckets({"48px_ar1:1": {9: (1.0, batch_size)}}, spatial_unit=16, fps_max=24)
    return Plan(table, buckets, seed=3, data_shards=data_shards, small_buckets="repeat")


class Fake:
    """Yields arrays that name the sample and its seed; waits a little, differently for each sample."""

    def __init__(self, bad=(), error=VideoError):
        self.bad, self.error, self.refused, self.lock = set(bad), error, [], threading.Lock()

    def read(self, sample_id, bucket, seed):
        time.sleep(seed % 5 / 5000)
        if sample_id in self.bad:
            raise self.error(f"sample {sample_id} is bad")
        return {"x": np.array([sample_id, seed % 1000]), "frames": np.asarray(bucket.num_frames)}

    def refuse(self, sample_id, error):
        with self.lock:
            self.refused.append(sample_id)


def batches(plan, source, start=0, count=13, **options):
    return list(make_loader(plan, source, start_step=start, num_steps=count, **options))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_those_of_the_plan():
    plan = make_plan(clip_table())
    for step, batch in enumerate(batches(plan, Fake())):
        _, ids, seeds = plan[step]
        assert batch["step"] == step
        np.testing.assert_array_equal(batch["sample_id"], ids)
        np.testing.assert_array_equal(batch["x"], np.stack([ids, seeds % 1000], axis=1))
        assert batch["frames"].tolist() == [9] * 4


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_together_read_what_one_host_reads(hosts):
    plan = make_plan(clip_table(), batch_size=2, data_shards=2)
    whole = batches(plan, Fake(bad=[2]))
    parts = [batches(plan, Fake(bad=[2]), host=(i, hosts)) for i in range(hosts)]
    joined = [
        {k: np.concatenate([p[k] for p in step]) for k in ("x", "sample_id")} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, [{k: batch[k] for k in ("x", "sample_id")} for batch in whole])


def test_a_start_in_the_middle_gives_the_rest():
    plan = make_plan(clip_table())
    assert_same(batches(plan, Fake(bad=[5]), start=6, count=7), batches(plan, Fake(bad=[5]))[6:])


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 0), (1, 1), (3, 2), (7, 5)])
def test_threads_and_prefetch_change_nothing(num_threads, prefetch):
    plan = make_plan(clip_table())
    expected = batches(plan, Fake(bad=[1]), num_threads=1, prefetch=0)
    for _ in range(4):
        assert_same(
            batches(make_plan(clip_table()), Fake(bad=[1]), num_threads=num_threads, prefetch=prefetch),
            expected,
        )


def test_four_loaders_can_share_a_plan():
    plan, results = make_plan(clip_table()), {}
    expected = batches(make_plan(clip_table()), Fake())

    def work(name):
        results[name] = batches(plan, Fake())

    for trial in range(3):
        threads = [threading.Thread(target=work, args=((trial, i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 12
    for result in results.values():
        assert_same(result, expected)


def test_a_bad_sample_is_replaced_by_another_of_its_bucket():
    plan, source = make_plan(clip_table()), Fake(bad=[4, 7])
    good = batches(plan, Fake())
    for batch, usual in zip(batches(plan, source), good, strict=True):
        kept = ~np.isin(usual["sample_id"], [4, 7])
        np.testing.assert_array_equal(batch["sample_id"][kept], usual["sample_id"][kept])
        assert not np.isin(batch["sample_id"], [4, 7]).any()
    assert set(source.refused) == {4, 7}


def test_a_bucket_without_a_readable_sample_ends_the_loader():
    with pytest.raises(UserError, match="20 samples in a row cannot be read"):
        batches(make_plan(clip_table()), Fake(bad=range(COUNT)))


def test_an_error_of_the_source_surfaces_once_with_its_own_type():
    loader = make_loader(make_plan(clip_table()), Fake(bad=[4], error=KeyError), start_step=0, num_steps=13)
    with pytest.raises(KeyError, match="sample 4 is bad"):
        list(loader)
    assert list(loader) == []
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-sample")]


def test_a_loader_left_early_stops_its_threads():
    loader = make_loader(make_plan(clip_table()), Fake(), start_step=0, num_steps=10**6)
    next(loader)
    loader.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-sample")]


def test_a_batch_that_does_not_divide_among_hosts_is_refused():
    with pytest.raises(UserError, match="batch of 4 does not divide among 3 hosts"):
        make_loader(make_plan(clip_table()), Fake(), start_step=0, num_steps=1, host=(0, 3))
    with pytest.raises(ValueError, match="host 2 of 2"):
        make_loader(make_plan(clip_table()), Fake(), start_step=0, num_steps=1, host=(2, 2))


@pytest.fixture
def decoder(monkeypatch):
    """Replaces decoding: frames hold their number; files whose name starts with x cannot be read."""
    calls = []

    def read_frames(path, info, *, start, count, stride, size, crop):
        calls.append((path, start))
        if path.startswith("x"):
            raise VideoError("damaged")
        assert (size, crop) == ((48, 60), (0, 6, 48, 48))
        clip = np.zeros((count, crop[2], crop[3], 3), np.uint8)
        return clip + (start + stride * np.arange(count, dtype=np.uint8))[:, None, None, None]

    monkeypatch.setattr("opensora_jax.data.loader.read_frames", read_frames)
    return calls


def clip_source(table, cache_bytes=0, max_bad_rate=0.5):
    return ClipSource(table, fps_max=24, cache_bytes=cache_bytes, max_bad_rate=max_bad_rate)


def test_clips_start_where_their_seed_says(decoder):
    table = clip_table(frames=(9, 30))
    starts = [b["video"][:, 0, 0, 0, 0] for b in batches(make_plan(table), clip_source(table), count=6)]
    again = [b["video"][:, 0, 0, 0, 0] for b in batches(make_plan(table), clip_source(table), count=6)]
    np.testing.assert_array_equal(starts, again)
    assert len(set(np.concatenate(starts).tolist())) > 3


def test_a_cached_clip_is_decoded_once(decoder):
    table = clip_table(frames=(9, 9))
    batches(make_plan(table), clip_source(table, cache_bytes=10**7), count=12, num_threads=1)
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
    assert sum(path == "x0.mp4" for path, _ in decoder) <= 2  # known ones are not decoded again


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


def test_cached_latents_become_batches(tmp_path):
    bucket = Bucket("48px", "1:1", 9, 48, 48, 1)
    writer = LatentWriter(tmp_path / "latents", "k")
    text = writer.add_text("", np.ones((5, 3), np.float32), np.ones(2, np.float32))
    for i in range(7):
        writer.add_latent(i, bucket, np.full((3, 6, 6, 2), i, np.float32), text, 8)
    cache = LatentCache(writer.finish(), "k")
    plan = Plan(cache.index, CachedBuckets({"48px": {9: (1.0, 3)}}), seed=0, data_shards=1)
    for batch in batches(plan, LatentSource(cache), count=5):
        assert {name: array.shape for name, array in batch.items()} == {
            "latent": (3, 3, 6, 6, 2),
            "text": (3, 5, 3),
            "pooled": (3, 2),
            "fps": (3,),
            "sample_id": (3,),
            "step": (),
        }
        np.testing.assert_array_equal(batch["latent"][:, 0, 0, 0, 0], batch["sample_id"])
