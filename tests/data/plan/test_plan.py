"""The plan: every sample once per epoch, leftovers carried over, each step one answer in any order."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.plan.buckets import Assignment, Bucket, Buckets
from opensora_jax.data.plan.plan import Plan, Rounds, mix
from opensora_jax.data.plan.reasons import EmptyLine, Unassigned

BUCKETS = (Bucket("48px", "1:1", 9, 48, 48, 3), Bucket("48px", "1:1", 1, 48, 48, 2))


class Given:
    """Puts row i into the bucket given for it; -1 is none."""

    def __init__(self, *bucket, buckets=BUCKETS, empty=()):
        self.bucket, self.buckets, self.empty = np.array(bucket), buckets, empty

    def assign(self, table, *, seed):
        lost = int((self.bucket < 0).sum())
        reasons = (Unassigned("lost", lost, "", "search"),) if lost else ()
        return Assignment(self.bucket, self.buckets, reasons, self.empty)


def plan(*bucket, buckets=BUCKETS, empty=(), **options):
    return Plan({}, Given(*bucket, buckets=buckets, empty=empty), **({"seed": 7, "data_shards": 1} | options))


TWO = [0] * 11 + [-1] + [1] * 5  # 11 videos in batches of 3, one row lost, 5 images in batches of 2


def steps(some_plan, numbers):
    return [(s.bucket, s.sample_ids.tolist(), s.seeds.tolist()) for s in (some_plan[n] for n in numbers)]


def test_after_some_epochs_every_sample_was_seen_as_often():
    epochs = 6  # 6 * 11 videos are 22 whole batches, 6 * 5 images are 15
    counts = Counter(i for _, ids, _ in steps(plan(*TWO), range(22 + 15)) for i in ids)
    assert counts == {i: epochs for i in range(17) if i != 11}


def test_rounds_read_a_batch_of_every_bucket_and_in_the_end_every_sample():
    rounds = Rounds({}, Given(*TWO, *[1] * 8), seed=7, data_shards=1, small_buckets="repeat")  # 13 images, 11 videos
    order = [rounds[step].bucket.num_frames for step in range(len(rounds))]
    assert order == [1, 9] * 4 + [1] * 3
    assert {i for step in range(len(rounds)) for i in rounds[step].sample_ids.tolist()} == {*range(25)} - {11}
    with pytest.raises(IndexError, match="a plan of 11 steps has no step 11"):
        rounds[11]
    small = Rounds({}, Given(0, 1, 1, 1, 1), seed=7, data_shards=1, small_buckets="repeat")
    assert [small[step].bucket.num_frames for step in range(len(small))] == [1, 9, 1]


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
    assert some_plan.report() == [(BUCKETS[0], 11, 3, 3, 2, 0, 0), (BUCKETS[1], 5, 2, 2, 1, 0, 0)]
    assert some_plan.describe().splitlines() == [
        f"plan {some_plan.hash}: 5 steps in the first epoch, 1 data shard(s)",
        "  bucket                       samples  batch  steps  carried  dropped  repeated",
        "  48px 1:1, 9 frames of 48x48       11      3      3        2        -         -",
        "  48px 1:1, 1 frames of 48x48        5      2      2        1        -         -",
        "  in all                            16             5        3        -",
        "  no bucket: 1 lost",
    ]


def test_ratios_without_samples_are_reported_and_lines_without_any_are_refused():
    wide = Bucket("48px", "16:9", 9, 32, 64, 3)
    buckets = (*BUCKETS, wide)
    assert plan(0, 0, 0, 1, 1, buckets=buckets).describe().splitlines()[-1] == (
        "  48px, 9 frames has no sample of 16:9"
    )
    long = EmptyLine("48px", 17, "5 are large enough, none of them has 17 frames")
    for small_buckets in ("error", "repeat"):
        with pytest.raises(UserError) as refusal:
            plan(0, 0, 0, 1, 1, empty=(long,), small_buckets=small_buckets)
        assert str(refusal.value) == (
            "1 line(s) of bucket_config have too few samples for a global batch over 1 data shard(s): 48px, 17 frames "
            "has no sample (5 are large enough, none of them has 17 frames). Ways out: lower their batch size or take "
            "them out of bucket_config; or give them samples (more data, higher probabilities, or fewer lines and "
            'ratios, as in "256px_ar1:1"); or set small_buckets to "drop"'
        )
    dropping = plan(0, 0, 0, 1, 1, empty=(long,), small_buckets="drop")
    assert dropping.describe().splitlines()[-1] == f"  dropped line: {long}"


def test_a_line_of_probability_0_is_off_and_the_report_says_so():
    columns = {"num_frames": [9, 9, 9], "height": [48] * 3, "width": [48] * 3, "fps": [8.0] * 3}
    buckets = Buckets(
        {"48px_ar1:1": {9: (0.0, 1), 5: (1.0, 1)}, "32px_ar1:1": {9: (1.0, 1)}}, spatial_unit=16, fps_max=24
    )
    with pytest.raises(UserError, match="48px_ar1:1, 5 frames has no sample"):
        Plan(pa.table(columns), buckets, seed=0, data_shards=1)
    buckets = Buckets({"48px_ar1:1": {9: (0.0, 1)}, "32px_ar1:1": {9: (1.0, 1)}}, spatial_unit=16, fps_max=24)
    found = Plan(pa.table(columns), buckets, seed=0, data_shards=1).describe()
    assert "dropped line: 48px_ar1:1, 9 frames has no sample (its probability is 0)" in found


def test_an_error_names_three_of_each_kind_and_counts_the_rest():
    buckets = tuple(Bucket("48px", f"{i}:1", 9, 48, 48, 2) for i in range(5))
    with pytest.raises(
        UserError, match=r"^5 bucket\(s\) have too few .* 2:1, 9 frames of 48x48 has 1 .*; and 2 more\."
    ):
        plan(0, 1, 2, 3, 4, buckets=buckets)


def test_a_bucket_smaller_than_its_batch_is_refused_with_three_ways_out():
    with pytest.raises(UserError) as refusal:
        plan(0, 0, 0, 0, 1, data_shards=1)
    message = str(refusal.value)
    assert "48px 1:1, 1 frames of 48x48 has 1 for a batch of 2" in message
    assert "9 frames" not in message
    assert all(way in message for way in ("lower their batch size", "give them samples", "small_buckets"))


def test_small_buckets_can_be_dropped():
    dropping = plan(0, 0, 0, 0, 1, small_buckets="drop")
    assert {bucket for bucket, _, _ in steps(dropping, range(7))} == {BUCKETS[0]}
    assert dropping.report()[-1] == (BUCKETS[1], 1, 2, 0, 0, 1, 0)
    with pytest.raises(UserError, match="too few samples"):
        plan(0, 1, small_buckets="drop")


def test_small_buckets_can_repeat_their_samples():
    repeating = plan(0, 0, small_buckets="repeat")
    assert len(repeating) == 1
    assert repeating.report() == [(BUCKETS[0], 2, 3, 0, 2, 0, 1)]
    assert Counter(i for _, ids, _ in steps(repeating, range(4)) for i in ids) == {0: 6, 1: 6}


def test_the_hash_tells_another_plan():
    same, other = plan(*TWO), [plan(*TWO, seed=8), plan(*TWO, data_shards=2), plan(*TWO[:-1])]
    assert same.hash == plan(*TWO).hash
    assert len({same.hash, *(p.hash for p in other)}) == 4


def image_plan(**columns):
    count = len(columns["path"])
    same = {"num_frames": [1] * count, "height": [48] * count, "width": [48] * count, "fps": [1.0] * count}
    buckets = Buckets({"48px_ar1:1": {1: (1.0, 1)}}, spatial_unit=16, fps_max=24)
    return Plan(pa.table(same | columns), buckets, seed=0, data_shards=1)


def test_the_hash_tells_other_files():
    given = [
        {"path": ["a", "b"]},
        {"path": ["b", "a"]},
        {"path": ["ab", ""]},
        {"path": ["a", "b"], "shard": ["s", "s"]},
        {"path": ["a", "b"], "shard": ["s", "t"]},
        {"path": ["a", "b"], "shard": ["s", "s"], "record": [0, 1]},
        {"path": ["a", "b"], "shard": ["s", "s"], "record": [1, 0]},
    ]
    assert len({image_plan(**columns).hash for columns in given}) == len(given)
    assert image_plan(**given[-1]).hash == image_plan(**given[-1]).hash


def test_a_folder_of_clips_may_be_moved():
    there = ["/data/a/x.mp4", "/data/b/y.mp4"]
    moved, other = [path.replace("/data", "/mnt/disk") for path in there], ["/data/a/x.mp4", "/data/b/z.mp4"]
    assert image_plan(path=there).hash == image_plan(path=moved).hash != image_plan(path=other).hash
    shards = {"path": ["x.mp4", "y.mp4"], "record": [0, 1]}
    here, elsewhere = (image_plan(shard=[f"{at}/c-0", f"{at}/c-0"], **shards).hash for at in ("/data", "/mnt"))
    assert here == elsewhere


@pytest.mark.parametrize("bad", ["", "https://x.org/y.mp4", "/data/z.mp4", None])
def test_bad_rows_do_not_tie_the_hash_to_a_place(bad):
    here, there, other = (
        image_plan(path=[bad, f"{folder}/a/x.mp4", f"{folder}/a/{name}.mp4"], status=["bad", "ok", "ok"]).hash
        for folder, name in (("/data", "y"), ("/mnt/disk", "y"), ("/data", "z"))
    )
    assert here == there != other
    shards = {"shard": ["", "", "/s/0"], "status": ["bad", "ok", "ok"]}
    assert image_plan(path=[bad, "/s/x.mp4", "y"], **shards).hash == (
        image_plan(path=[bad, "/t/x.mp4", "y"], **shards | {"shard": ["", "", "/t/0"]}).hash
    )


def test_the_hash_of_tables_stays_as_it_was():
    paths = ["/data/a/x.mp4", "/data/b/y.mp4", "/data/b/z.mp4"]
    assert image_plan(path=paths, status=["ok"] * 3).hash == image_plan(path=paths).hash == "d09f910d35962fdb"
    assert image_plan(path=paths, status=["ok", "ok", "bad"]).hash == "57f8c769a42d2e00"


def test_the_hash_does_not_depend_on_how_arrow_holds_the_columns():
    paths, records = ["", "a", "bé", "", "cde", "f"], [5, 0, 3, 2, 1, 4]
    whole = pa.array(paths)
    forms = [
        whole,
        pa.chunked_array([whole[:2], whole[2:2], whole[2:3], whole[3:]]),
        pa.array(["x", *paths])[1:],
        whole.cast(pa.large_string()),
        whole.dictionary_encode(),
        pa.array([None, *paths[1:3], None, *paths[4:]]),
    ]
    hashes = {
        image_plan(path=path, record=pa.array(records, kind)).hash
        for path in forms
        for kind in (pa.int32(), pa.int64())
    }
    cut = pa.chunked_array([records[:1], records[1:]])
    assert hashes == {image_plan(path=whole, record=cut).hash}
    assert image_plan(path=["", "", ""]).hash != image_plan(path=["", ""]).hash


def test_a_bucket_is_shuffled_once_per_epoch_whatever_the_others_repeat(monkeypatch):
    shuffle, shuffled = Plan._shuffled_rows, []
    monkeypatch.setattr(Plan, "_shuffled_rows", lambda *args: shuffled.append(args[1:]) or shuffle(*args))
    buckets = (BUCKETS[0], Bucket("48px", "1:1", 1, 48, 48, 25))
    repeating = plan(*[0] * 33, 1, 1, 1, buckets=buckets, small_buckets="repeat")
    assert {bucket for bucket, _, _ in steps(repeating, range(11 * 9))} == set(buckets)
    assert [epoch for which, epoch in shuffled if which == 0] == list(range(9))


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
