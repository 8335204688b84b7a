"""Shards of arrays survive being cut short, and are the same whoever writes them."""

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from opensora_jax.data.cache.array_shards import ArrayReader, ArrayShards, pack, unpack

SCHEMA = pa.schema([("row", pa.int64())])


def array(seed):
    return np.random.default_rng(seed).standard_normal((2, 3, 5)).astype(np.float32)


def shards_of(folder, items=7, shard_size=3, dtype="float32"):
    return ArrayShards(folder, "latents", items, shard_size, dtype)


def write(shards, shard, numbers):
    with shards.writing(shard, SCHEMA) as writer:
        for number in numbers:
            writer.add({"row": number}, {"a": array(number), "b": array(number)[0]})
        writer.notes["seen"] = len(numbers)


def test_items_are_divided_and_the_last_shard_is_smaller(tmp_path):
    shards = shards_of(tmp_path)
    assert [list(range(7))[shards.part(shard)] for shard in range(len(shards))] == [[0, 1, 2], [3, 4, 5], [6]]
    assert shards.records_path(1).name == "latents-00001-of-00003.array_record"
    assert len(shards_of(tmp_path, items=0)) == 0


def test_arrays_come_back_counted_through_all_shards(tmp_path):
    shards = shards_of(tmp_path / "a=1")
    shards.folder.mkdir()
    for shard, numbers in ((2, [6]), (0, [1, 2]), (1, [])):
        write(shards, shard, numbers)
    assert shards.index().to_pydict() == {"row": [1, 2, 6]}
    assert [(one.records, one.notes) for one in shards.info()] == [(2, {"seen": 2}), (0, {"seen": 0}), (1, {"seen": 1})]
    reader = ArrayReader(shards, shards.info())
    assert len(reader) == 3
    for place, number in enumerate((1, 2, 6)):
        found = reader.read(place)
        np.testing.assert_array_equal(found["a"], array(number))
        np.testing.assert_array_equal(found["b"], array(number)[0])


@pytest.mark.parametrize(("dtype", "expected"), [("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)])
def test_values_are_kept_in_their_dtype(dtype, expected):
    blob = pack({"a": array(1), "b": array(2).astype(ml_dtypes.bfloat16)}, np.dtype(expected))
    found = unpack(blob)
    np.testing.assert_array_equal(found["a"], array(1).astype(expected))
    assert {one.dtype for one in found.values()} == {np.dtype(expected)}
    assert 0 <= len(blob) - 60 * np.dtype(expected).itemsize < 200
    if dtype == "float32":
        np.testing.assert_array_equal(safetensors.numpy.load(blob)["a"], array(1))


def test_a_shard_is_not_there_before_its_block_ends_nor_after_an_error(tmp_path):
    shards = shards_of(tmp_path)
    with pytest.raises(KeyError, match="no row"), shards.writing(0, SCHEMA) as writer:  # noqa: PT012
        writer.add({"row": 1}, {"a": array(1)})
        assert shards.info() == [None] * 3
        raise KeyError("no row")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", ["index", "records", "both", "short"])
def test_a_shard_that_lacks_a_part_is_not_finished(tmp_path, cut):
    shards = shards_of(tmp_path)
    write(shards, 0, [1])
    if cut in ("index", "both"):
        shards.index_path(0).unlink()
    if cut in ("records", "both"):
        shards.records_path(0).unlink()
    if cut == "short":
        shards.records_path(0).write_bytes(shards.records_path(0).read_bytes()[:-1])
    assert shards.info() == [None] * 3
    write(shards, 0, [2])
    assert shards.info()[0].records == 1


@pytest.mark.parametrize("content", [b"", b"PAR1 but nothing else"])
def test_an_index_that_is_none_counts_as_missing(tmp_path, content):
    shards = shards_of(tmp_path)
    write(shards, 0, [1])
    shards.index_path(0).write_bytes(content)
    assert shards.info()[0] is None


def test_a_shard_written_twice_is_the_same_bytes(tmp_path):
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shards = shards_of(tmp_path / name)
        write(shards, 0, [3, 5])
        found.append([path.read_bytes() for path in (shards.records_path(0), shards.index_path(0))])
    assert found[0] == found[1]
