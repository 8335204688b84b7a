"""Assignment of rows to buckets, against the original's rules written out for one row at a time."""

import math

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.plan.aspect import nominal_ratio, num_pixels
from opensora_jax.data.plan.buckets import Bucket, Buckets

MIXED = {
    "64px": {1: (0.6, 3), 5: (0.9, 2), 9: ((0.7, 0.4), 2), 17: (0.5, 1)},
    "128px": {1: (0.3, 1), 9: (0.0, 1), 13: ((0.8, 1.0), 1), 5: ((1.0, 0.5), 1)},
}


def table(rows):
    """Returns the columns of rows (frames, height, width, fps)."""
    names = ("num_frames", "height", "width", "fps")
    types = (np.int64, np.int64, np.int64, np.float64)
    columns = zip(*rows, strict=True)
    return {name: np.array(column, kind) for name, column, kind in zip(names, columns, types, strict=True)}


def search_one(config, frames, height, width, fps, fps_max, rng):
    """Returns (resolution, frames) of one row by the original's loop."""
    if fps >= fps_max:
        frames //= math.ceil(fps / fps_max)
    for resolution in sorted(config, key=num_pixels, reverse=True):
        lines = config[resolution]
        if height * width < 0.8 * num_pixels(resolution):
            continue
        if frames == 1:
            if 1 in lines and rng.random() < lines[1][0]:
                return resolution, 1
            continue
        for count in sorted(lines, reverse=True):
            if count == 1 or frames < count:
                continue
            keep, skip = lines[count][0] if isinstance(lines[count][0], tuple) else (lines[count][0], None)
            if skip is not None and (skip >= 1 or rng.random() <= skip):
                continue
            if keep >= 1 or rng.random() <= keep:
                return resolution, count
            break
    return None


def test_columns_are_assigned_like_single_rows_with_their_own_generators():
    rows = mixed_rows(307)
    buckets = Buckets(MIXED, spatial_unit=16, fps_max=16)
    found, choices, *_ = buckets.assign(table(rows), seed=5)
    for i, row in enumerate(rows):
        expected = search_one(MIXED, *row, 16, np.random.default_rng(5 + i * len(buckets.buckets)))
        chosen = choices[found[i]] if found[i] >= 0 else None
        assert (chosen and (chosen.resolution, chosen.num_frames)) == expected
        if chosen:
            ratios = [b.aspect_ratio for b in choices if b.resolution == chosen.resolution]
            nearest = min(ratios, key=lambda name: abs(row[1] / row[2] - nominal_ratio(name)))
            assert chosen.aspect_ratio == nearest


def mixed_rows(count, seed=11):
    rng = np.random.default_rng(seed)
    frames, fps = rng.choice([1, 2, 4, 5, 9, 14, 17, 40], count), rng.choice([math.nan, 8, 16, 24, 30, 60], count)
    return list(zip(frames, *rng.integers(40, 181, (2, count)), fps, strict=True))


@pytest.mark.parametrize("block", [7, 64])
def test_the_rows_read_at_a_time_change_nothing(block, monkeypatch):
    columns, assigner = table(mixed_rows(307)), Buckets(MIXED, spatial_unit=16, fps_max=16)
    expected = assigner.assign(columns, seed=3)
    monkeypatch.setattr("opensora_jax.data.plan.buckets.BLOCK", block)
    chunked = pa.concat_tables([pa.table(columns).slice(start, 100) for start in range(0, 307, 100)])
    for given in (columns, chunked):
        found = assigner.assign(given, seed=3)
        np.testing.assert_array_equal(found.bucket, expected.bucket)
        assert found[1:] == expected[1:]


def test_a_line_that_no_sample_reaches_is_told_with_its_reason():
    config = {
        "128px": {1: (1.0, 1)},
        "64px": {40: (1.0, 1), 17: (1.0, 1), 14: (0.0, 1), 9: (1.0, 1), 5: ((1.0, 1.0), 1), 1: (1.0, 1)},
    }
    rows = [(17, 64, 64, 8), (17, 64, 64, 8), (14, 64, 64, 8), (9, 64, 64, 8)]
    found = Buckets(config, spatial_unit=16, fps_max=24).assign(table(rows), seed=0)
    assert [str(line) for line in found.empty] == [
        "128px, 1 frames has no sample (none has 13107 pixels)",
        "64px, 40 frames has no sample (4 are large enough, none of them has 40 frames)",
        "64px, 14 frames has no sample (its probability is 0)",
        "64px, 5 frames has no sample (4 would fit, but all went to other lines or were left out by a probability)",
        "64px, 1 frames has no sample (4 are large enough, none of them is an image)",
    ]


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_a_seed_that_gives_no_draws_is_refused_where_they_are_needed(seed):
    rows = table([(9, 48, 48, 8)])
    with pytest.raises(UserError, match=r"a seed from 0 to 2\*\*63 - 1: got"):
        Buckets({"48px_ar1:1": {9: (0.5, 4)}}, spatial_unit=16, fps_max=24).assign(rows, seed=seed)
    assert Buckets({"48px_ar1:1": {9: (1.0, 4)}}, spatial_unit=16, fps_max=24).assign(rows, seed=seed).bucket == [0]


def test_the_largest_bucket_that_fits_wins():
    buckets = Buckets({"48px_ar1:1": {1: (1.0, 2), 9: (1.0, 4), 17: (1.0, 3)}}, spatial_unit=16, fps_max=24)
    rows = [(16, 48, 48, 8), (17, 48, 48, 8), (1, 60, 70, math.nan), (40, 48, 48, 48)]
    found, choices, unassigned, empty = buckets.assign(table(rows), seed=0)
    assert empty == ()
    assert [choices[i].num_frames for i in found] == [9, 17, 1, 17]
    assert choices[found[0]] == Bucket("48px_ar1:1", "1:1", 9, 48, 48, 4)
    assert unassigned == ()


def test_rows_without_a_bucket_are_counted_by_reason():
    buckets = Buckets({"48px_ar1:1": {9: (1.0, 4)}}, spatial_unit=16, fps_max=24)
    rows = [(9, 48, 48, 8), (5, 48, 48, 8), (17, 48, 48, 60), (9, 42, 43, 8), (1, 48, 48, math.nan)]
    found, _, unassigned, _ = buckets.assign(table(rows), seed=0)
    assert found.tolist() == [0, -1, -1, -1, -1]
    assert [str(reason) for reason in unassigned] == [
        "2 shorter than 9 frames (longest: 5)",
        "1 smaller than 1843 pixels (largest: 42x43)",
        "1 images without a line of 1 frame",
    ]


def test_a_long_video_that_thinning_makes_short_is_explained():
    buckets = Buckets({"48px_ar1:1": {9: (1.0, 4)}}, spatial_unit=16, fps_max=24)
    with pytest.raises(UserError, match="longest: 8, taking 1 of 3 to keep to fps_max"):
        buckets.assign(table([(26, 48, 48, 60)]), seed=0)


def test_bad_rows_of_a_table_get_no_bucket():
    columns = table([(9, 48, 48, 8), (9, 48, 48, 8), (0, 0, 0, math.nan)])
    buckets = Buckets({"48px_ar1:1": {9: (1.0, 4)}}, spatial_unit=16, fps_max=24)
    texts = pa.array(["ok", "bad", None])
    for status in (np.array(["ok", "bad", "bad"]), texts, texts.dictionary_encode()):
        given = columns | {"status": status}
        found, _, unassigned, _ = buckets.assign(given if isinstance(status, np.ndarray) else pa.table(given), seed=0)
        assert found.tolist() == [0, -1, -1]
        assert [str(reason) for reason in unassigned] == ["2 marked bad in the table"]


def test_a_table_of_which_nothing_fits_is_refused_with_the_way_out():
    buckets = Buckets({"48px_ar1:1": {9: (1.0, 4), 17: (1.0, 2)}}, spatial_unit=16, fps_max=24)
    with pytest.raises(UserError) as refusal:
        buckets.assign(table([(5, 48, 48, 8), (3, 48, 48, 8), (17, 20, 30, 8)]), seed=0)
    assert str(refusal.value) == (
        "none of the 3 samples fits a bucket: 2 shorter than 9 frames (longest: 5); "
        "1 smaller than 1843 pixels (largest: 20x30); "
        "the nearest bucket is 48px_ar1:1 1:1, 9 frames of 48x48; "
        "use longer videos or lines of fewer frames, or use larger frames or a smaller resolution"
    )


def test_an_empty_table_is_refused():
    empty = {name: column[:0] for name, column in table([(9, 48, 48, 8)]).items()}
    with pytest.raises(UserError, match="the table has no rows"):
        Buckets({"48px_ar1:1": {9: (1.0, 4)}}, spatial_unit=16, fps_max=24).assign(empty, seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "bucket_config is empty"),
        ({"48px": {}}, "bucket_config is empty"),
        ({"48": {9: (1.0, 4)}}, 'write it as "256px"'),
        ({"48px": {0: (1.0, 4)}}, r'bucket_config\["48px"\]\[0\]: frames are a whole number'),
        ({"48px": {"9": (1.0, 4)}}, "frames are a whole number"),
        ({"48px": {9: 1.0}}, r"write \(keep, batch size\)"),
        ({"48px": {9: (1.5, 4)}}, "between 0 and 1: got 1.5"),
        ({"48px": {9: ((1.0, -0.5), 4)}}, "between 0 and 1"),
        ({"48px": {1: ((1.0, 0.5), 4)}}, "images have no fewer frames"),
        ({"48px": {9: (1.0, 0)}}, "batch size is a whole number of at least 1: got 0"),
        ({"48px": {9: (1.0, 2.5)}}, "batch size is a whole number"),
    ],
)
def test_a_mistake_in_bucket_config_is_named(config, message):
    with pytest.raises(UserError, match=message):
        Buckets(config, spatial_unit=16, fps_max=24)
