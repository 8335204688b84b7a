"""Caption suffixes: exact strings of the original."""

import math

import pytest

from opensora_jax.data.text import add_fps, add_motion_score, ends_with_fps, sampling_text, training_text


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
