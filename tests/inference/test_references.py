import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.inference.references import check_references, read_references
from opensora_jax.inference.request import Request


class Autoencoder:
    strides = (4, 8, 8)
    is_causal = True

    def latent_shape(self, frames, height, width):
        return (frames - 1) // 4 + 1, height // 8, width // 8

    def gives_back(self, frames):
        return frames % 4 == 1


@pytest.fixture
def clip(tmp_path):
    """Returns a function that writes a video whose frames are 5, 10, 15, ... in grey."""

    def write(frames, name="clip.mp4"):
        grey = 5 * np.arange(1, frames + 1, dtype=np.uint8)[:, None, None, None]
        return write_video(tmp_path / name, np.broadcast_to(grey, (frames, 34, 46, 3)), 8)

    return write


def request(*references):
    return Request("a cat", index=0, seed=0, references=references)


@pytest.mark.parametrize(
    ("condition", "shown"),
    [
        ("t2v", []),
        ("i2v_head", [range(1)]),
        ("i2v_tail", [range(36, 37)]),
        ("i2v_loop", [range(1), range(36, 37)]),
        ("v2v_head", [range(33)]),
        ("v2v_tail", [range(4, 37)]),
    ],
)
def test_a_condition_shows_its_frames_of_a_video(clip, condition, shown):
    path = clip(37)
    clips = read_references(request(path), condition, (16, 24), Autoencoder())
    assert [clip.shape for clip in clips] == [(len(frames), 16, 24, 3) for frames in shown]
    for pixels, frames in zip(clips, shown, strict=True):
        grey = (pixels.mean((1, 2, 3)) + 1) * 127.5
        np.testing.assert_allclose(grey, 5 * (np.array(frames) + 1), atol=2)
    if condition != "t2v":
        check_references([request(path)], condition, Autoencoder())


@pytest.mark.parametrize(
    ("condition", "frames", "needed"),
    [("v2v_head", 32, 33), ("v2v_tail", 32, 33), ("v2v_head_easy", 33, 65)],
)
def test_a_short_video_is_refused_by_name_before_it_is_read(clip, condition, frames, needed):
    path = clip(frames)
    with pytest.raises(UserError, match=rf"clip.mp4 has {frames} frames, {condition} needs {needed}. Give a longer"):
        check_references([request(path)], condition, Autoencoder())


def test_a_clip_for_an_uncausal_autoencoder_has_no_odd_frame(clip):
    autoencoder = Autoencoder()
    autoencoder.is_causal = False
    path = clip(32)
    check_references([request(path)], "v2v_head", autoencoder)
    assert len(read_references(request(path), "v2v_head", (16, 24), autoencoder)[0]) == 32


def test_references_that_are_missing_or_not_looked_at_are_refused(clip, tmp_path):
    path, autoencoder = clip(1), Autoencoder()
    with pytest.raises(UserError, match="i2v_head needs a reference: 'a cat' has none"):
        check_references([request(path), request()], "i2v_head", autoencoder)
    with pytest.raises(UserError, match=r"nowhere.png of 'a cat' does not exist"):
        check_references([request(tmp_path / "nowhere.png")], "i2v_head", autoencoder)
    with pytest.raises(UserError, match=r"t2v looks at no reference: 'a cat' has .*clip.png"):
        check_references([request(), request(path)], "t2v", autoencoder)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with pytest.raises(UserError, match=r"broken.png cannot be read"):
        check_references([request(broken)], "i2v_head", Autoencoder())
