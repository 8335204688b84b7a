"""Files of records: whole or not there, read from any thread, and damage is told by name."""

import errno
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from opensora_jax.config.files import is_unfinished
from opensora_jax.data.shards import record_files
from opensora_jax.data.shards.record_files import RecordError, RecordReader, RecordWriter


def write(path, records):
    writer = RecordWriter(path)
    for record in records:
        writer.write(record)
    return writer.close()


def noise(count=7, size=30011):
    return [np.random.default_rng(i).bytes(size) for i in range(count)]


def test_records_come_back_whatever_the_order(tmp_path):
    assert write(tmp_path / "a", noise()) == (tmp_path / "a").stat().st_size
    reader = RecordReader()
    for i in (3, 0, 6, 3):
        assert reader.read(tmp_path / "a", i) == noise()[i]


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    writer = RecordWriter(tmp_path / "a")
    writer.write(b"x" * 70000)
    (unfinished,) = tmp_path.iterdir()
    assert is_unfinished(unfinished.name)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not is_unfinished("a")


def test_a_file_given_up_leaves_nothing(tmp_path):
    writer = RecordWriter(tmp_path / "a")
    writer.write(b"x" * 70000)
    writer.give_up()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    first, second = RecordWriter(tmp_path / "a"), RecordWriter(tmp_path / "a")
    first.write(b"first")
    second.write(b"second")
    first.close()
    assert RecordReader().read(tmp_path / "a", 0) == b"first"
    second.close()
    assert RecordReader().read(tmp_path / "a", 0) == b"second"


def test_threads_read_more_files_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "OPEN_FILES", 3)
    for i in range(7):
        write(tmp_path / str(i), [bytes([i, j]) * 999 for j in range(5)])
    reader, rng = RecordReader(), np.random.default_rng(1)
    wanted = [tuple(pair) for pair in rng.integers(0, (7, 5), (300, 2)).tolist()]
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda pair: reader.read(tmp_path / str(pair[0]), pair[1]), wanted))
    assert found == [bytes(pair) * 999 for pair in wanted]
    assert len(reader._open) <= 3


@pytest.mark.parametrize(
    ("damage", "record"),
    [
        (lambda data: data[: len(data) // 2], 0),
        (lambda data: data[:-1], 0),
        (lambda data: b"", 0),
        (lambda data: data.replace(noise()[5][:50], bytes(50)), 5),
        (lambda data: data, 7),
    ],
    ids=["half of it", "a byte short", "empty", "other bytes", "no such record"],
)
def test_damage_is_told_by_name_and_a_mended_file_is_read(tmp_path, damage, record):
    write(tmp_path / "a", noise())
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(damage(whole))
    reader = RecordReader()
    with pytest.raises(RecordError, match=rf"{tmp_path}/a, record {record}: "):
        reader.read(tmp_path / "a", record)
    (tmp_path / "a").write_bytes(whole)
    assert reader.read(tmp_path / "a", 5) == noise()[5]


def test_a_missing_file_is_told_by_name(tmp_path):
    with pytest.raises(RecordError, match="a, record 0: open\\(\\) failed: No such file"):
        RecordReader().read(tmp_path / "a", 0)


def test_a_disk_that_refuses_is_an_error_of_the_system(tmp_path):
    writer = RecordWriter(tmp_path / "nowhere" / "a")
    with pytest.raises(OSError, match="nowhere/a") as caught:
        writer.write(b"x")
    assert caught.value.errno == errno.EIO
