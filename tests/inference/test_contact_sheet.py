import numpy as np
import pytest
from PIL import Image

from opensora_jax.inference.contact_sheet import INK, PAPER, contact_sheet, wrap, write_contact_sheet


def video(color, frames=7, height=29, width=43):
    return np.broadcast_to(np.array(color, np.uint8), (frames, height, width, 3))


def test_24_videos_fit_a_sheet_1800_pixels_wide():
    clips = [video((200, 30, 30), height=48, width=48)] * 24
    sheet = contact_sheet(clips, ["a red circle moves to the right"] * 24)
    assert 1600 < sheet.width <= 1800
    assert sheet.height < 1800


def test_every_video_is_on_the_sheet_above_its_prompt():
    colors = [(200, 30, 30), (20, 180, 40), (10, 40, 220)]
    sheet = np.asarray(contact_sheet([video(c) for c in colors], ["one", "two", "three"]))
    rows = [np.nonzero((sheet == c).all(-1))[0] for c in colors]
    assert rows[0].max() < rows[1].min() < rows[1].max() < rows[2].min()
    between = sheet[rows[0].max() + 1 : rows[1].min()]
    assert (between == INK).all(-1).any()


def test_the_strip_goes_from_the_first_frame_to_the_last():
    clip = np.stack([np.full((20, 20, 3), 10 * i, np.uint8) for i in range(11)])
    sheet = np.asarray(contact_sheet([clip], ["grey"], num_frames=3))
    strip = sheet[30]
    shades = list(dict.fromkeys(strip[(strip != PAPER).any(-1)][:, 0].tolist()))
    assert shades == [0, 50, 100]


def test_a_single_image_has_a_strip_of_one():
    sheet = contact_sheet([video((9, 9, 9), frames=1)], ["image"])
    assert sheet.width < 400


def test_a_long_prompt_is_cut_at_two_lines_with_an_ellipsis():
    lines = wrap("a very long prompt " * 20, 300)
    assert len(lines) == 2
    assert lines[1].endswith("…")
    assert len(wrap("short", 300)) == 1
    assert wrap("x" * 200, 300)[0].endswith("…")


def test_videos_without_a_prompt_each_are_refused():
    with pytest.raises(ValueError, match="2 videos, 1 prompts"):
        contact_sheet([video((1, 2, 3))] * 2, ["one"])


def test_the_file_is_a_complete_png(tmp_path):
    write_contact_sheet(tmp_path / "sheet.png", [video((1, 2, 3))], ["one"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG"
    assert [f.name for f in tmp_path.iterdir()] == ["sheet.png"]
