"""The plan: every sample once per epoch, leftovers carried over, each step one answer in any order."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.buckets import Assignment, Bucket, Buckets, Unassigned
from opensora_jax.data.plan import Plan, mix

BUCKETS = (Bucket("48px", "1:1", 9, 48, 48, 3), Bucket("48px", "1:1", 1, 48, 48, 2))


class Given:
    """Puts row i into the bucket given for it; -1 is none."""

    def __init__(self, *bucket, buckets=BUCKETS):
        self.bucket, self.buckets = np.array(bucket), buckets

    def assign(self, table, *, seed):
        lost = int((self.bucket < 0).sum())
        return Assignment(self.bucket, self.buckets, (Unassigned("lost", lost, "", "search"),) if lost else ())


def plan(*bucket, seed=7, data_shards=1, small_buckets="error", buckets=BUCKETS):
    return Plan({}, Given(*bucket, buckets=buckets), seed=seed, data_shards=data_shards, small_buckets=small_buckets)


TWO = [0] * 11 + [-1] + [1] * 5  # 11 videos in batches of 3, one row lost, 5 images in batches of 2


def steps(some_plan, numbers):
    return [(s.bucket, s.sample_ids.tolist(), s.seeds.tolist()) for s in (some_plan[n] for n in numbers)]


def test_after_some_epochs_every_sample_was_seen_as_often():
    epochs = 6  # 6 * 11 videos are 22 whole batches, 6 * 5 images are 15
    counts = Counter(i for _, ids, _ in steps(plan(*TWO), range(22 + 15)) for i in ids)
    assert counts == {i: epochs for i in range(17) if i != 11}


def test_the_leftover_of_an_epoch_opens_the_next():
    stream = np.concatenate([plan(*[0] * 11)[step].sample_ids for step in range(11)])
    for epoch in stream.reshape(3, 11):
        assert sorted(epoch.tolist()) == list(range(11))
    assert len({tuple(epoch) for epoch in stream.reshape(3, 11)}) == 3


def test_a_step_has_one_bucket_and_its_samples():
    for bucket, ids, _ in steps(plan(*TWO), range(41)):
        assert len(ids) == bucket.batch_size
        assert {TWO[i] for i in ids} == {BUCKETS.index(bucket)}


def test_buckets_are_mixed_and_differently_in_each_epoch():
    order = [bucket.num_frames for bucket, _, _ in steps(plan(*TWO), range(37))]
    epochs = [order[:5], order[5:12]]
    assert all(len(set(epoch)) == 2 for epoch in epochs)
    assert order != sorted(order)


def test_any_step_can_be_asked_for_in_any_order():
    forward, fresh = steps(plan(*TWO), range(60)), plan(*TWO)
    backward = [steps(fresh, [number])[0] for number in reversed(range(60))]
    assert backward[::-1] == forward
    assert steps(plan(*TWO), [10**9]) == steps(fresh, [10**9])


def test_threads_see_the_same_plan():
    expected = steps(plan(*TWO), range(60))
    for trial in range(5):
        shared = plan(*TWO)
        numbers = np.random.default_rng(trial).permutation(60).tolist()
        with ThreadPoolExecutor(4) as pool:
            seen = list(pool.map(lambda number, p=shared: steps(p, [number])[0], numbers))
        assert seen == [expected[number] for number in numbers]


def test_seeds_differ_between_samples_and_epochs():
    seeds = [seed for _, _, seeds in steps(plan(*TWO), range(37)) for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 6 * 16


def test_the_seed_decides_the_order():
    assert steps(plan(*TWO), range(9)) == steps(plan(*TWO), range(9))
    assert steps(plan(*TWO), range(9)) != steps(plan(*TWO, seed=8), range(9))


def test_data_shards_multiply_the_batch():
    sharded = plan(*TWO, data_shards=2)
    assert {bucket: len(ids) for bucket, ids, _ in steps(sharded, range(9))} == {BUCKETS[0]: 6, BUCKETS[1]: 4}


def test_the_report_counts_before_training_starts():
    some_plan = plan(*TWO)
    assert len(some_plan) == 5
    assert some_plan.report() == [(BUCKETS[0], 11, 3, 2, 0, 0), (BUCKETS[1], 5, 2, 1, 0, 0)]
    assert some_plan.describe().splitlines()[1:] == [
        "  48px 1:1, 9 frames of 48x48: 11 samples, 3 x 3, 2 carried",
        "  48px 1:1, 1 frames of 48x48: 5 samples, 2 x 2, 1 carried",
        "  no bucket: 1 lost",
    ]


def test_a_bucket_smaller_than_its_batch_is_refused_with_three_ways_out():
    with pytest.raises(UserError) as refusal:
        plan(0, 0, 0, 0, 1, data_shards=1)
    message = str(refusal.value)
    assert "48px 1:1, 1 frames of 48x48 has 1 for a batch of 2" in message
    assert "9 frames" not in message
    assert all(way in message for way in ("Lower their batch size", "give them samples", "small_buckets"))


def test_small_buckets_can_be_dropped():
    dropping = plan(0, 0, 0, 0, 1, small_buckets="drop")
    assert {bucket for bucket, _, _ in steps(dropping, range(7))} == {BUCKETS[0]}
    assert dropping.report()[-1] == (BUCKETS[1], 1, 0, 0, 1, 0)
    with pytest.raises(UserError, match="too few samples"):
        plan(0, 1, small_buckets="drop")


def test_small_buckets_can_repeat_their_samples():
    repeating = plan(0, 0, small_buckets="repeat")
    assert len(repeating) == 1
    assert repeating.report() == [(BUCKETS[0], 2, 0, 2, 0, 1)]
    assert Counter(i for _, ids, _ in steps(repeating, range(4)) for i in ids) == {0: 6, 1: 6}


def test_the_hash_tells_another_plan():
    same, other = plan(*TWO), [plan(*TWO, seed=8), plan(*TWO, data_shards=2), plan(*TWO[:-1])]
    assert same.hash == plan(*TWO).hash
    assert len({same.hash, *(p.hash for p in other)}) == 4


def test_the_hash_tells_other_files():
    buckets = Buckets({"48px_ar1:1": {1: (1.0, 1)}}, spatial_unit=16, fps_max=24)
    columns = {"num_frames": [1, 1], "height": [48, 48], "width": [48, 48], "fps": [1.0, 1.0]}
    hashes = [
        Plan(pa.table(columns | {"path": list(paths)}), buckets, seed=0, data_shards=1).hash
        for paths in ("ab", "ba", "ab")
    ]
    assert hashes[0] == hashes[2] != hashes[1]


def test_wrong_questions_are_refused():
    with pytest.raises(IndexError, match="no step -1"):
        plan(*TWO)[-1]
    with pytest.raises(UserError, match="error, drop, repeat"):
        plan(*TWO, small_buckets="ignore")
    with pytest.raises(UserError, match="data_shards is at least 1"):
        plan(*TWO, data_shards=0)


def test_the_hash_function_does_not_change():
    """A change would give every running training another order of its data."""
    assert mix(1, 2, np.arange(3)).tolist() == [mix(1, 2, i)[0] for i in range(3)]
    assert mix(0).tolist() == [0xE220A8397B1DCDAF]  # SplitMix64's first output for seed 0
    bits = np.unpackbits((mix(3, np.arange(997)) ^ mix(3, np.arange(997) + 1024)).view(np.uint8))
    assert 0.49 < bits.mean() < 0.51
