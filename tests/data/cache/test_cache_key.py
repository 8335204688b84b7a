"""What changes a cache's key, what does not, and how a difference is told."""

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.data.cache.cache_key import Identity, buckets_digest, clips_digest
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.data.plan.digests import column_digest

COUNT = 11
BUCKET = Bucket("48px", "1:1", 9, 48, 48, 2)


def table(folder="/data/set", **changes):
    columns = {
        "path": [f"{folder}/{'ab'[i % 2]}/{i}.mp4" for i in range(COUNT)],
        "shard": [""] * COUNT,
        "record": [0] * COUNT,
        "text": [f"caption {i}" for i in range(COUNT)],
        "num_frames": list(range(9, 9 + COUNT)),
        "height": [48] * COUNT,
        "width": [60] * COUNT,
        "fps": [8.0] * (COUNT - 1) + [float("nan")],
        "variable_fps": [False] * COUNT,
        "mtime_ns": [1_700_000_000_000_000_000 + i for i in range(COUNT)],
        "size_bytes": [1000 + i for i in range(COUNT)],
    }
    return pa.table(columns | changes)


def changed(name, value, row=4):
    return table(**{name: [value if i == row else old for i, old in enumerate(table()[name].to_pylist())]})


ROWS = [0, 2, 3, 4, 9]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", "/data/set/a/other.mp4"),
        ("num_frames", 99),
        ("height", 50),
        ("width", 50),
        ("fps", 8.5),
        ("variable_fps", True),
        ("mtime_ns", 1),
        ("size_bytes", 1),
        ("record", 1),
        ("shard", "/data/set/x-00000"),
    ],
)
def test_every_fact_of_a_used_row_counts_and_none_of_another(name, value):
    assert clips_digest(changed(name, value), ROWS) != clips_digest(table(), ROWS)
    assert clips_digest(changed(name, value, row=5), ROWS) == clips_digest(table(), ROWS)


def test_which_rows_and_their_order_count():
    found = {clips_digest(table(), rows) for rows in (ROWS, ROWS[:-1], [*ROWS, 10], ROWS[::-1], [0, 2, 3, 4, 4, 9])}
    assert len(found) == 5


def test_a_folder_of_data_may_be_moved():
    there, here = clips_digest(table(), ROWS), clips_digest(table("/mnt/é/other"), np.asarray(ROWS))
    assert there == here
    names = table()["path"].to_pylist()
    shards = [f"data/train-0000{i % 2}" for i in range(COUNT)]
    sharded = [table(shard=[f"/{home}/{name}" for name in shards], path=names) for home in ("one", "two/three")]
    assert clips_digest(sharded[0], ROWS) == clips_digest(sharded[1], ROWS) != there


def test_files_and_shards_of_one_table_move_together():
    def mixed(home):
        paths = [f"{home}/{i}.mp4" if i < 5 else f"clip {i}" for i in range(COUNT)]
        return table(path=paths, shard=["" if i < 5 else f"{home}/train-00000" for i in range(COUNT)])

    assert clips_digest(mixed("/one"), ROWS) == clips_digest(mixed("/two"), ROWS)


def test_one_clip_and_no_folder_have_a_digest():
    assert clips_digest(table(), [3]) != clips_digest(table(), [4])
    assert clips_digest(table(path=[f"{i}.mp4" for i in range(COUNT)]), ROWS)


@pytest.mark.parametrize(
    "values",
    [["a", "bc", "", None, "é"], [1, 2, 3, 4, 5], [1.5, None, float("nan"), -0.0, 2], [True, False, True, True, False]],
)
def test_a_digest_is_that_of_the_values_however_they_lie(values):
    whole = pa.array(values)
    cut = pa.chunked_array([pa.array(values[:1]), pa.array(values[1:], whole.type), pa.array([], whole.type)])
    assert column_digest(whole) == column_digest(cut) == column_digest(pa.array([values[2], *values]).slice(1))
    assert column_digest(whole) != column_digest(pa.array(values[::-1]))
    if isinstance(values[0], str):
        assert column_digest(whole) == column_digest(whole.cast(pa.large_string()))
        assert column_digest(pa.array(["ab", "c"])) != column_digest(pa.array(["a", "bc"]))


def test_buckets_count_but_not_their_batch_size():
    other, larger = Bucket("48px", "4:3", 9, 40, 56, 2), Bucket("48px", "1:1", 9, 48, 48, 7)
    assert buckets_digest([(BUCKET, 0), (BUCKET, 1)]) == buckets_digest([(larger, 0), (larger, 1)])
    found = {buckets_digest(rows) for rows in ([(BUCKET, 0), (other, 1)], [(other, 0), (BUCKET, 1)], [(BUCKET, 0)] * 2)}
    assert len(found) == 3


def test_settings_are_equal_to_what_is_read_back_from_a_file():
    assert Identity({}, {"a": (1, 2.5)}) == Identity({}, {"a": [1, 2.5]})


def test_differences_name_digests_and_values():
    there = Identity({"captions": "1", "clips": "2"}, {"encode.posterior": "mode", "long": list(range(50)), "same": 1})
    now = Identity({"captions": "1", "clips": "3"}, {"encode.posterior": "sample", "long": [], "same": 1, "new": 2})
    assert there.key != now.key
    assert there.differences(now) == (
        "other clips, encode.posterior = 'mode' (now 'sample'), another long, new = None (now 2)"
    )
