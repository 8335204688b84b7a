import os

import numpy as np
import pytest

from opensora_jax.data.media.video import VideoError
from opensora_jax.inference import outputs
from opensora_jax.inference.request import Request

FRAMES = np.full((5, 16, 32, 3), (200, 30, 30), np.uint8)
REQUEST = Request("a red circle", index=3, seed=0)


def test_a_finished_video_is_found_by_its_key_alone(tmp_path):
    record = outputs.save(tmp_path, "0003_red", FRAMES, 8.0, {"key": "one", "prompt": "red"})
    assert record["file"] == "0003_red.mp4"
    assert outputs.find(tmp_path, "0003_red", "one") == record
    assert outputs.find(tmp_path, "0003_red", "two") is None
    assert outputs.find(tmp_path, "0004_red", "one") is None
    assert not list(tmp_path.glob(".*"))


def test_a_video_that_was_deleted_is_not_finished(tmp_path):
    outputs.save(tmp_path, "a", FRAMES, 8.0, {"key": "one"})
    (tmp_path / "a.mp4").unlink()
    assert outputs.find(tmp_path, "a", "one") is None


def test_a_video_that_could_not_be_written_leaves_no_record(tmp_path):
    outputs.save(tmp_path, "a", FRAMES, 8.0, {"key": "one"})
    with pytest.raises(VideoError):
        outputs.save(tmp_path, "a", FRAMES[:, :15], 8.0, {"key": "two"})
    assert outputs.find(tmp_path, "a", "one") is None
    assert not (tmp_path / "a.json").exists()


def test_a_single_frame_is_a_png_and_reads_back_exactly(tmp_path):
    record = outputs.save(tmp_path, "a", FRAMES[:1], 8.0, {"key": "one"})
    assert record["file"] == "a.png"
    np.testing.assert_array_equal(outputs.read(tmp_path / "a.png"), FRAMES[:1])


def test_a_video_reads_back_with_all_its_frames(tmp_path):
    record = outputs.save(tmp_path, "a", FRAMES, 8.0, {"key": "one"})
    video = outputs.read(tmp_path / record["file"])
    assert video.shape == FRAMES.shape
    np.testing.assert_allclose(video, FRAMES, atol=6)
    np.testing.assert_array_equal(outputs.read(tmp_path / record["file"], 2), video[[0, -1]])


def test_the_key_differs_with_everything_that_changes_the_video(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    with_reference = Request("a red circle", index=3, seed=0, references=(image,))
    keys = [
        outputs.request_key(REQUEST, {"steps": 5}),
        outputs.request_key(REQUEST, {"steps": 6}),
        outputs.request_key(Request("a red circle", index=4, seed=0), {"steps": 5}),
        outputs.request_key(Request("a red circle", index=3, seed=1), {"steps": 5}),
        outputs.request_key(with_reference, {"steps": 5}),
    ]
    image.write_bytes(b"other")
    keys.append(outputs.request_key(with_reference, {"steps": 5}))
    assert len(set(keys)) == len(keys)
    assert keys[0] == outputs.request_key(Request("a red circle", index=3, seed=0), {"steps": 5})


def test_the_weights_of_a_run_are_those_of_its_newest_step(tmp_path):
    def save(step):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "state").write_text(step)
        return outputs.weights_identity(tmp_path)

    ninth = save("9")
    (tmp_path / "runs.jsonl").write_text("another run that changed nothing")
    assert outputs.weights_identity(tmp_path) == ninth
    tenth = save("10")
    assert tenth != ninth
    os.utime(tmp_path / "checkpoints" / "9" / "state")
    assert outputs.weights_identity(tmp_path) == tenth
    (tmp_path / "latent.json").write_text("{}")
    assert outputs.weights_identity(tmp_path) != tenth


def test_the_weights_of_an_index_are_its_shards(tmp_path):
    index, shard = tmp_path / "model.safetensors.index.json", tmp_path / "1.safetensors"
    index.write_text('{"weight_map": {"a": "1.safetensors"}}')
    shard.write_text("one")
    before = outputs.weights_identity(index)
    shard.write_text("other")
    assert outputs.weights_identity(index) != before


def test_a_missing_checkpoint_has_an_identity_of_its_own(tmp_path):
    assert outputs.weights_identity(tmp_path / "a") != outputs.weights_identity(tmp_path / "b")
