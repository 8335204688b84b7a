"""Reads encoded clips out of ArrayRecord shards: our own (`shard_writer.py`) and those of other TFDS sets.

What a record holds is read off `features.json`, not through TFDS's feature classes: its Video needs TensorFlow, its
records do not.
"""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.clip_bytes import Stills
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.shards.record_files import RecordError, RecordReader

FORMAT = "array_record"
CLIP = "video"  # the feature in our shards
CLIP_KINDS = ("stills", "image", "bytes")
CAPTIONS = ("text", "caption")


class Record(NamedTuple):
    """Where a clip lies, and a name for messages."""

    shard: str
    record: int
    name: str


@dataclass(frozen=True)
class Keys:
    """The features of a data set that are the clip and the caption ("" = none); `stills`: the clip is a list."""

    clip: str
    stills: bool
    text: str


class ShardReader:
    """Reads clips from any thread; the files used last stay open."""

    def __init__(self) -> None:
        self._files = RecordReader()
        self._keys: dict[str, Keys] = {}
        self._lock = threading.Lock()

    def read(self, shard: str, record: int) -> bytes | Stills:
        """Returns an encoded clip, for `probe` and `read_frames`.

        Raises: VideoError if it is damaged or missing. UserError if the shard is not of a data set with clips.
        """
        return self.read_with_text(shard, record)[0]

    def read_with_text(self, shard: str, record: int) -> tuple[bytes | Stills, str]:
        """Returns an encoded clip and its caption. Raises: as `read`."""
        from tensorflow_datasets.proto import tf_example_pb2  # half a second that clips in files need not

        keys = self._keys_of(os.path.dirname(shard))
        try:
            example = tf_example_pb2.Example.FromString(self._files.read(shard, record))
        except RecordError as error:
            raise VideoError(str(error)) from None
        except DecodeError:
            raise VideoError(f"{shard}, record {record}: no tf.train.Example") from None
        values = {name: example.features.feature[name].bytes_list.value for name in (keys.clip, keys.text)}
        if not values[keys.clip]:
            raise VideoError(f"{shard}, record {record}: the feature {keys.clip} is empty")
        text = b"".join(values[keys.text][:1]).decode("utf-8", "replace")
        return Stills(values[keys.clip]) if keys.stills else values[keys.clip][0], text

    def _keys_of(self, folder: str) -> Keys:
        with self._lock:
            if folder not in self._keys:
                self._keys[folder] = find_keys(folder)
            return self._keys[folder]


def list_records(folder: str | Path, split: str = "train") -> list[Record]:
    """Returns all records of a split, without reading them.

    Raises: UserError if the folder holds no TFDS data set of clips in array_record, or not this split.
    """
    from tensorflow_datasets.core import dataset_info  # as above

    find_keys(folder)
    try:
        about = dataset_info.read_proto_from_builder_dir(folder)
    except dataset_info.DatasetInfoFileError:
        raise UserError(
            f"{folder} holds no TFDS data set: it has no dataset_info.json. Give the folder of a version."
        ) from None
    splits = dataset_info.get_split_dict_from_proto(about, folder, FORMAT)
    if split not in splits:
        raise UserError(f"{folder} has no split {split!r}, only {', '.join(splits) or 'none'}.")
    lengths = splits[split].shard_lengths
    paths = [os.path.abspath(path) for path in splits[split].filename_template.sharded_filepaths(len(lengths))]
    missing = next((path for path in paths if not os.path.exists(path)), None)
    if missing:
        advice = f"`tfds convert_format --dataset_version_dir={folder} --out_file_format={FORMAT}`"
        raise UserError(f"There is no {missing}. A set in tfrecord is converted, by TensorFlow, with {advice}.")
    return [Record(path, n, f"{path}/{n}") for path, length in zip(paths, lengths, strict=True) for n in range(length)]


def find_keys(folder: str | Path) -> Keys:
    """Returns which features of a TFDS data set are the clip and the caption.

    The clip is the feature `video`, else the only list of stills, image, or scalar string. Raises: UserError if
    there is none, or several alike.
    """
    path = Path(folder) / "features.json"
    try:
        features = dict(_features(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{path} cannot be read: a shard of a TFDS data set has it beside it. Check the path."
        ) from None
    texts = [name for name, kind in features.items() if kind == "text"]
    text = next((name for name in CAPTIONS if name in texts), texts[0] if len(texts) == 1 else "")
    by_kind = [[name for name in features if features[name] == kind] for kind in CLIP_KINDS]
    candidates = next((names for names in by_kind if names), [])
    clip = CLIP if features.get(CLIP) in CLIP_KINDS else candidates[0] if len(candidates) == 1 else ""
    if clip:
        return Keys(clip, features[clip] == "stills", text)
    if candidates:
        raise UserError(f"{folder}: which of {', '.join(candidates)} is the clip? Name that feature {CLIP!r}.")
    wanted = "a Video, an Image or a scalar string with an encoded file"
    raise UserError(f"{folder} has no clips: it has the features {', '.join(features)}, and needs {wanted}.")


def _features(feature: dict[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """Yields (name, kind) of the features, those inside others as TFDS names them in a record: `outer/inner`."""
    if "featuresDict" in feature:
        for inner, value in feature["featuresDict"]["features"].items():
            yield from _features(value, f"{name}/{inner}".lstrip("/"))
        return
    tensor = feature.get("tensor", {})
    if "video" in feature or "image" in feature.get("sequence", {}).get("feature", {}):
        yield name, "stills"
    elif tensor.get("dtype") in ("string", "object") and not tensor["shape"] and tensor.get("encoding") == "none":
        yield name, "bytes"
    else:
        yield name, "image" if "image" in feature else "text" if "text" in feature else "other"
