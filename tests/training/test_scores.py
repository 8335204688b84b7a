"""What is written and printed of reconstructions: a line a clip, whatever each has, then the totals."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow.csv import read_csv

from opensora_jax.training import scores

SHAPE = {"num_frames": 5, "height": 16, "width": 12}
LINES = [
    {"row": 0, "path": "/a/small.mp4", "text": "one", "psnr_db": 20.0, "fps": 8.0, "file": "small.mp4"} | SHAPE,
    {"row": 3, "path": "/a/b.png", "text": "two, three", "psnr_db": 30.0, "ssim": 0.5, "lpips": 0.25} | SHAPE,
    {"row": 4, "path": "/a/c.mp4", "text": 'a "c"', "psnr_db": 40.0, "ssim": 0.75, "lpips": 0.75, "fps": 8.0} | SHAPE,
]


def test_the_table_has_all_columns_though_the_first_clip_lacks_some_and_ends_with_the_totals(tmp_path):
    scores.write_scores(tmp_path / "scores.csv", LINES)
    table = read_csv(tmp_path / "scores.csv")
    assert table.column_names == scores.COLUMNS.names
    assert table["path"].to_pylist() == ["/a/small.mp4", "/a/b.png", "/a/c.mp4", "mean", "worst"]
    assert table["row"].to_pylist() == [0, 3, 4, None, None]
    assert table["psnr_db"].to_pylist() == [20.0, 30.0, 40.0, 30.0, 20.0]
    assert table["ssim"].to_pylist() == [None, 0.5, 0.75, 0.625, 0.5]
    assert table["lpips"].to_pylist() == [None, 0.25, 0.75, 0.5, 0.75]  # more is worse
    assert table["text"].to_pylist()[:3] == ["one", "two, three", 'a "c"']


def test_a_measure_without_weights_is_an_empty_column(tmp_path):
    scores.write_scores(tmp_path / "scores.csv", LINES[:1])
    table = read_csv(tmp_path / "scores.csv")
    assert table["lpips"].type == pa.null()
    assert table["psnr_db"].to_pylist() == [20.0] * 3


def test_the_printed_table_has_a_row_a_clip_and_the_totals():
    assert scores.as_text(LINES).splitlines() == [
        "clip       frames   size  psnr_db    ssim   lpips",
        "small.mp4       5  16x12    20.00       -       -",
        "b.png           5  16x12    30.00  0.5000  0.2500",
        "c.mp4           5  16x12    40.00  0.7500  0.7500",
        "mean                        30.00  0.6250  0.5000",
        "worst                       20.00  0.5000  0.7500",
    ]
    assert "ssim" not in scores.as_text(LINES[:1])


def test_of_many_clips_the_first_are_printed_and_the_others_counted():
    lines = scores.as_text([LINES[0]] * 33).splitlines()
    assert len(lines) == 1 + scores.SHOWN + 1 + 2
    assert lines[-3].strip() == "... 13 more"


def test_frames_smaller_than_the_window_have_no_ssim():
    clip = np.zeros((2, 11, 12, 3), np.uint8)
    assert scores.measure(clip, clip) == {"psnr_db": pytest.approx(100.0), "ssim": pytest.approx(1.0)}
    assert set(scores.measure(clip[:, 1:], clip[:, 1:])) == {"psnr_db"}
