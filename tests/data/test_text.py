"""Caption suffixes: exact strings of the original."""

import math

import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.text import (
    Texts,
    add_fps,
    add_motion_score,
    ends_with_fps,
    sampling_text,
    training_text,
    training_texts,
)


@pytest.mark.parametrize(
    ("fps", "fps_max", "score", "expected"),
    [
        (24.0, 24, 3.2, "A cat. 24 FPS, 3 motion score."),
        (24.0, 24, 4.5, "A cat. 24 FPS, 5 motion score."),
        (30.0, 24, 4.4999, "A cat. 15 FPS, 4 motion score."),
        (23.976, 24, None, "A cat. 23.976 FPS."),
        (24.0, 16, math.nan, "A cat. 12 FPS."),
        (math.nan, 24, 0.0, "A cat. 0 motion score."),
        (math.nan, 24, None, "A cat."),
        (24.0, 999, None, "A cat."),
    ],
)
def test_training_names_the_rate_after_thinning(fps, fps_max, score, expected):
    assert training_text("A cat.", fps=fps, fps_max=fps_max, motion_score=score) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A cat", "A cat. 24 FPS. 4 motion score."),
        (" A cat. ", "A cat. 24 FPS. 4 motion score."),
        ("A cat. 7 FPS.", "A cat. 7 FPS. 4 motion score."),
        ("", ". 24 FPS. 4 motion score."),
        ("Why?", "Why?. 24 FPS. 4 motion score."),
    ],
)
def test_sampling_writes_two_sentences(prompt, expected):
    assert sampling_text(prompt, fps=24, motion_score=4) == expected


def test_a_rate_counts_only_as_the_last_sentence():
    assert ends_with_fps("x 24 FPS.")
    assert not ends_with_fps("24 FPS. x")
    assert not ends_with_fps("24 FPS")
    assert add_fps("24FPS.", 16) == "24FPS. 16 FPS."


def test_a_motion_score_may_be_a_word():
    assert add_motion_score("A cat.", "high") == "A cat. high motion score."


TABLE = pa.table(
    {
        "text": ["a cat", "a cat", "", "a cat", "a dog", "a dog"],
        "fps": [23.976, 60.0, math.nan, 23.976, 23.976, math.inf],
        "score": [1.2, 3.5, 0.4, 1.4, None, -2.2],
    }
)


@pytest.mark.parametrize("fps_suffix", [True, False])
@pytest.mark.parametrize("motion_score", ["score", ""])
@pytest.mark.parametrize("fps_max", [24, 999])
def test_a_table_gets_the_suffix_of_each_of_its_rows(fps_suffix, motion_score, fps_max):
    found = training_texts(TABLE, fps_max=fps_max, fps_suffix=fps_suffix, motion_score=motion_score)
    assert found.to_pylist() == [
        training_text(
            text, fps=fps if fps_suffix else math.nan, fps_max=fps_max, motion_score=score if motion_score else None
        )
        for text, fps, score in zip(*TABLE.to_pydict().values(), strict=True)
    ]


def test_a_score_that_is_no_column_of_numbers_is_refused_by_name():
    with pytest.raises(UserError, match="names the column 'scores', which the table lacks: it has text, fps, score"):
        training_texts(TABLE, fps_max=24, fps_suffix=False, motion_score="scores")
    with pytest.raises(UserError, match="the column 'text' holds no numbers"):
        training_texts(TABLE, fps_max=24, fps_suffix=False, motion_score="text")


def test_the_same_caption_with_another_rate_is_another_text_and_the_empty_one_is_always_there():
    texts = training_texts(TABLE, fps_max=24, fps_suffix=True, motion_score="")
    distinct, of_row = Texts.of(texts, [4, 0, 1, 3])
    assert distinct.to_pylist() == ["", "a cat 20 FPS.", "a cat 23.976 FPS.", "a dog 23.976 FPS."]
    assert of_row.tolist() == [2, 1, -1, 2, 3, -1]
    plain = training_texts(TABLE, fps_max=24, fps_suffix=False, motion_score="")
    assert Texts.of(plain, [2, 0]).distinct.to_pylist() == ["", "a cat"]
    assert Texts.of(plain, [2, 0]).of_row.tolist() == [1, -1, 0, -1, -1, -1]
