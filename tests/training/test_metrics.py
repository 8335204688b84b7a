"""What a run writes, read back: lines, TensorBoard's records by their bytes, and the files of samples."""

import io
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from opensora_jax.data.media.video import probe
from opensora_jax.training.metrics import MetricsWriter, open_metrics, read_metrics


def clip(frames):
    return np.random.default_rng(frames).integers(0, 256, (frames, 6, 10, 3)).astype(np.uint8)


def board(workdir):
    """Returns (step, tag, scalar or Image proto) of TensorBoard's records, which are sealed pieces of given lengths."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found.append((event.step, value.tag, getattr(value, value.WhichOneof("value"))))
            data = data[16 + size :]
    return found


def picture(proto):
    assert (proto.height, proto.width, proto.colorspace) == (6, 10, 3)
    return Image.open(io.BytesIO(proto.encoded_image_string))


def test_scalars_are_lines_and_curves_with_one_of_the_loss_for_each_bucket(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(3, {"loss": 0.5, "lr": 0.25}, "256px")
        writer.write(5, {"loss": 1.5, "lr": 0.75}, "")
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 3, "bucket": "256px", "loss": 0.5, "lr": 0.25},
        {"step": 5, "loss": 1.5, "lr": 0.75},
    ]
    assert board(tmp_path) == [
        (3, "loss", 0.5),
        (3, "lr", 0.25),
        (3, "loss_of_256px", 0.5),
        (5, "loss", 1.5),
        (5, "lr", 0.75),
    ]


def test_a_sample_is_a_gif_that_plays_and_a_file(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(3, {"loss": 0.5}, "", {"a cat v1.5": (clip(7), 8)})
    *_, (step, tag, proto) = board(tmp_path)
    assert (step, tag) == (3, "samples/a cat v1.5")
    with picture(proto) as image:
        assert (image.format, image.n_frames, image.info["loop"]) == ("GIF", 7, 0)
        assert 100 <= image.info["duration"] <= 130  # GIF counts in hundredths of a second
    info = probe(tmp_path / "samples" / "3" / "a cat v1.5.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (7, 6, 10, 8)


def test_a_sampled_still_is_an_image_with_its_exact_pixels(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(3, {}, "", {"cat": (clip(1), 24)})
    ((step, tag, proto),) = board(tmp_path)
    assert (step, tag) == (3, "samples/cat")
    with picture(proto) as shown, Image.open(tmp_path / "samples" / "3" / "cat.png") as kept:
        np.testing.assert_array_equal(np.asarray(shown), clip(1)[0])
        np.testing.assert_array_equal(np.asarray(kept), clip(1)[0])


def test_samples_alone_make_no_line(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(3, {}, "256px", {"cat": (clip(2), 24)})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_repeated_step_replaces_its_line_and_its_samples(tmp_path):
    for start, frames in ((0, 2), (1, 3)):
        with MetricsWriter(tmp_path, start) as writer:
            for step in range(start + 1, 4):
                writer.write(step, {"loss": float(frames)}, "", {"cat": (clip(frames), 8)} if step == 3 else {})
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 3, 3]
    assert probe(tmp_path / "samples" / "3" / "cat.mp4").num_frames == 3


def test_only_the_first_process_writes(tmp_path):
    with open_metrics(tmp_path, 0, False) as writer:
        writer.write(3, {"loss": 0.5}, "", {"cat": (clip(2), 8)})
    assert list(tmp_path.iterdir()) == []
    with open_metrics(tmp_path, 0, True) as writer:
        writer.write(3, {"loss": 0.5}, "", {"cat": (clip(2), 8)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples", "tensorboard"]
