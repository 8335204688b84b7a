"""The loader: the plan's batches whatever the hosts, start and threads; failures are told once."""

import os
import threading
import time

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CachedBuckets, CacheInfo, LatentCache
from opensora_jax.data.loader import LatentSource, LoaderConfig, make_loader
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.data.plan.plan import Plan
from tests.data.plans import COUNT, batches, clip_table, make_plan


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


@pytest.mark.parametrize(("num_workers", "prefetch"), [(1, 0), (1, 1), (3, 2), (7, 5)])
def test_threads_and_prefetch_change_nothing(num_workers, prefetch):
    plan = make_plan(clip_table())
    expected = batches(plan, Fake(bad=[1]), num_workers=1, prefetch=0)
    for _ in range(4):
        assert_same(
            batches(make_plan(clip_table()), Fake(bad=[1]), num_workers=num_workers, prefetch=prefetch),
            expected,
        )


@pytest.mark.parametrize(("num_workers", "prefetch"), [(0, 2), (-2, 2), (2, -1)])
def test_a_loader_that_cannot_run_is_refused(num_workers, prefetch):
    with pytest.raises(ValueError, match="at least"):
        LoaderConfig(num_workers, prefetch)


def test_minus_one_worker_is_one_per_core():
    assert LoaderConfig(-1, 2).num_threads == os.cpu_count()


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
        np.testing.assert_array_equal(batch["replaced"], ~kept)
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


def test_cached_latents_become_batches(tmp_path):
    bucket = Bucket("48px", "1:1", 9, 48, 48, 1)
    writer = LatentWriter(tmp_path, CacheInfo("dataset encode", Identity({}, {}), "float32", 7, 7, 1, 1))
    writer.start()
    with writer.writing_texts(0) as texts:
        texts.add("", np.ones((5, 3), np.float32), np.ones(2, np.float32))
    with writer.writing_latents(0) as latents:
        for i in range(7):
            latents.add(i, bucket, np.full((3, 6, 6, 2), i, np.float32), text_id=0, fps=8, path="")
    cache = LatentCache(tmp_path)
    plan = Plan(cache.index, CachedBuckets({"48px": {9: (1.0, 3)}}), seed=0, data_shards=1)
    for batch in batches(plan, LatentSource(cache), count=5):
        assert {name: array.shape for name, array in batch.items()} == {
            "latent": (3, 3, 6, 6, 2),
            "text": (3, 5, 3),
            "pooled": (3, 2),
            "fps": (3,),
            "sample_id": (3,),
            "replaced": (3,),
            "step": (),
        }
        np.testing.assert_array_equal(batch["latent"][:, 0, 0, 0, 0], batch["sample_id"])
