"""Batch sizes that a bucket_config leaves to training: found, replaced, and refused where nobody replaced them."""

import re

import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.latents import CachedBuckets
from opensora_jax.data.plan.auto import auto_lines, filled, with_ones
from opensora_jax.data.plan.buckets import Buckets

CONFIG = {"48px": {129: (1.0, "auto"), 33: ((1.0, 0.5), "auto"), 1: (0.5, 7)}}


def test_words_are_found_and_replaced_by_numbers():
    assert auto_lines(CONFIG) == [("48px", 129), ("48px", 33)]
    assert auto_lines({"48px": {9: (1.0, 4), 5: 3}}) == []
    assert with_ones(CONFIG) == {"48px": {129: (1.0, 1), 33: ((1.0, 0.5), 1), 1: (0.5, 7)}}
    given = filled(CONFIG, {("48px", 129): 3, ("48px", 33): 11})
    assert given == {"48px": {129: (1.0, 3), 33: ((1.0, 0.5), 11), 1: (0.5, 7)}}
    assert CONFIG["48px"][129] == (1.0, "auto")


def test_a_word_that_nobody_replaced_is_an_error():
    message = re.escape('bucket_config["48px"][129]: the batch size "auto" is for `train`; give a whole number here')
    with pytest.raises(UserError, match=message):
        Buckets(CONFIG, spatial_unit=16, fps_max=24)
    with pytest.raises(UserError, match=message):
        CachedBuckets(CONFIG)
    with pytest.raises(UserError, match=r"at least 1: got 'most'"):
        CachedBuckets({"48px": {9: (1.0, "most")}})
