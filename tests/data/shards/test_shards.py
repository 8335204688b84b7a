"""Reading clips out of data sets of TFDS, with features.json and dataset_info.json as TFDS 4.9.10 writes them."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.clip_bytes import Stills
from opensora_jax.data.media.ffmpeg_process import VideoError
from opensora_jax.data.media.video import probe, read_frames
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.shards.shard_writer import write_shards
from opensora_jax.data.shards.shards import Record, ShardReader, list_records
from opensora_jax.data.table import records
from opensora_jax.data.table.probing import describe


def example(**values: bytes | list[bytes]) -> bytes:
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    features = {
        name.replace("__", "/"): tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=value))
        for name, value in lists.items()
    }
    features["number"] = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[5]))
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features)).SerializeToString()


NUMBER = {
    "pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar",
    "tensor": {"dtype": "int64", "shape": {}},
}
TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
IMAGE = {"pythonClassName": "....Image", "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}}}
BYTES = {"pythonClassName": "....Tensor", "tensor": {"dtype": "string", "encoding": "none", "shape": {}}}
VIDEO = {
    "pythonClassName": "....Video",
    "video": {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": ["-1", "34", "46", "3"]}},
}
IMAGES = {"pythonClassName": "....Sequence", "sequence": {"feature": IMAGE, "length": "-1"}}


def foreign_set(folder: Path, features: dict, examples: list[bytes], file_format: str = "array_record") -> Path:
    folder.mkdir()
    inner = {"features": features | {"number": NUMBER}}
    (folder / "features.json").write_text(json.dumps({"pythonClassName": "...", "featuresDict": inner}))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    parts = [examples[:2], examples[2:]]
    split = {"name": "train", "shardLengths": [str(len(part)) for part in parts], "filepathTemplate": template}
    about = {"name": "their", "version": "1.0.0", "fileFormat": file_format, "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    for number, part in enumerate(parts):
        writer = ArrayRecordWriter(
            str(folder / f"their-train.array_record-{number:05d}-of-00002"), "group_size:1,uncompressed"
        )
        for one in part:
            writer.write(one)
        writer.close()
    return folder


def text_of(record: Record) -> str:
    return ShardReader().read_with_text(record.shard, record.record)[1]


def pictures(folder: Path) -> list[bytes]:
    """Five numbered frames as PNG."""
    paths = [write_video(folder / f"{n}.png", np.full((1, 34, 46, 3), 8 * n, np.uint8), 8) for n in range(5)]
    return [path.read_bytes() for path in paths]


@pytest.mark.parametrize("feature", [VIDEO, IMAGES])
def test_a_set_of_videos_as_stills_is_probed_read_and_sharded(feature, tmp_path):
    stills = pictures(tmp_path)
    examples = [example(video=stills[:3], caption=b"up"), example(video=stills[::-1]), example(video=stills[:1])]
    folder = foreign_set(tmp_path / "set", {"video": feature, "caption": TEXT}, examples)
    found = list_records(folder)
    assert [(Path(one.shard).name[-14:], one.record, text_of(one)) for one in found] == [
        ("00000-of-00002", 0, "up"),
        ("00000-of-00002", 1, ""),
        ("00001-of-00002", 0, ""),
    ]
    assert len({one.name for one in found}) == 3
    clip = ShardReader().read(found[1].shard, found[1].record)
    assert isinstance(clip, Stills)
    frames = read_frames(clip, probe(clip, fps=6), picks=np.array([0, 3, 4]))
    assert np.round(frames.mean((1, 2, 3)) / 8).tolist() == [4, 1, 0]

    rows = [describe(one.name, one.shard, one.record, fps=6) for one in found]
    records.write_table(pa.Table.from_pylist(rows), tmp_path / "meta.parquet")
    table = records.read_table(tmp_path / "meta.parquet")
    write_shards(table, tmp_path / "out", name="clips", shard_bytes=1 << 20, num_workers=1)
    for row, count in zip(records.read_table(tmp_path / "out" / "meta.parquet").to_pylist(), [3, 5, 1], strict=True):
        clip = ShardReader().read(row["shard"], row["record"])
        assert isinstance(clip, bytes)
        info = probe(clip)
        assert (info.num_frames, info.height, info.width) == (count, 34, 46)
        np.testing.assert_equal(info.fps, 6.0 if count > 1 else float("nan"))


@pytest.mark.parametrize(
    ("features", "values", "text"),
    [
        ({"image": IMAGE, "id": BYTES}, {"id": b"7"}, ""),
        ({"mp4": BYTES, "title": TEXT}, {"title": "été".encode()}, "été"),
        ({"mp4": BYTES, "caption": TEXT, "id": TEXT}, {"caption": b"yes", "id": b"7"}, "yes"),
        ({"mp4": BYTES, "one": TEXT, "two": TEXT}, {"one": b"1", "two": b"2"}, ""),
        ({"video": BYTES, "thumbnail": IMAGE}, {"thumbnail": b"no"}, ""),
        ({"inner": {"featuresDict": {"features": {"image": IMAGE}}}}, {}, ""),
    ],
)
def test_the_clip_and_its_caption_are_found_by_their_features(features, values, text, tmp_path):
    picture = pictures(tmp_path)[3]
    key = next(iter(features)) if "inner" not in features else "inner__image"
    folder = foreign_set(tmp_path / "set", features, [example(**{key: picture}, **values)] * 3)
    found = list_records(folder)
    assert [text_of(one) for one in found] == [text] * 3
    assert ShardReader().read(found[2].shard, found[2].record) == picture
    assert probe(picture).num_frames == 1


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"caption": TEXT}, "has no clips: it has the features caption, number, and needs a Video"),
        ({"a": BYTES, "b": BYTES}, "which of a, b is the clip"),
    ],
)
def test_a_set_without_one_clip_feature_is_refused(features, message, tmp_path):
    with pytest.raises(UserError, match=message):
        list_records(foreign_set(tmp_path / "set", features, [example(caption=b"x")]))


def test_other_formats_splits_and_folders_are_refused_with_what_to_do(tmp_path):
    tfrecord = foreign_set(tmp_path / "tfrecord", {"image": IMAGE}, [example(image=b"x")], "tfrecord")
    assert len(list_records(tfrecord)) == 1  # converted in place, which dataset_info.json need not tell
    (tfrecord / "their-train.array_record-00001-of-00002").unlink()
    with pytest.raises(UserError, match=r"no .*00001-of-00002\. .*tfds convert_format --.*=array_record"):
        list_records(tfrecord)
    other = foreign_set(tmp_path / "set", {"image": IMAGE}, [])
    with pytest.raises(UserError, match="has no split 'test', only train"):
        list_records(other, "test")
    (other / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"has no dataset_info\.json"):
        list_records(other)
    with pytest.raises(UserError, match=r"features\.json cannot be read"):
        list_records(tmp_path)


def test_a_record_without_its_clip_is_a_bad_clip(tmp_path):
    folder = foreign_set(tmp_path / "set", {"image": IMAGE, "text": TEXT}, [example(text=b"x"), b"\xff\xff", b""])
    messages = ("image is empty", r"no tf\.train\.Example", "image is empty")
    for one, message in zip(list_records(folder), messages, strict=True):
        with pytest.raises(VideoError, match=rf"{one.shard}, record {one.record}: .*{message}"):
            ShardReader().read(one.shard, one.record)


@pytest.fixture
def clips(tmp_path) -> tuple[Path, list[bytes]]:
    """A set of three encoded clips, and what they are."""
    contents = [np.random.default_rng(number).bytes(1500 + 37 * number) for number in range(3)]
    return foreign_set(tmp_path / "set", {"video": BYTES}, [example(video=one) for one in contents]), contents


def test_many_threads_read_the_same(clips):
    reader, places = ShardReader(), list_records(clips[0])
    numbers = np.random.default_rng(1).integers(0, 3, 300).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda number: reader.read(places[number].shard, places[number].record), numbers)
        assert list(read) == [clips[1][number] for number in numbers]


def test_damage_is_told_by_shard_and_record(clips):
    folder, contents = clips
    shard = folder / "their-train.array_record-00000-of-00002"
    data = bytearray(shard.read_bytes())
    data[data.index(contents[1][:100]) + 7] ^= 1
    shard.write_bytes(data)
    reader = ShardReader()
    with pytest.raises(VideoError, match=rf"{shard}, record 1: .*hash mismatch"):
        reader.read(str(shard), 1)
    assert reader.read(str(shard), 0) == contents[0]
    with pytest.raises(VideoError, match=rf"{shard}, record 99: index 99 out of bound"):
        reader.read(str(shard), 99)
    shard.unlink()
    with pytest.raises(VideoError, match="No such file"):
        ShardReader().read(str(shard), 0)
