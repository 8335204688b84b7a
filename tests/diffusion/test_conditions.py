import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import conditions

SHAPE = (2, 19, 2, 3, 5)  # B T H W C


def references(frames: int, seed: int = 0) -> list[list]:
    draw = np.random.default_rng(seed).normal(size=(2, 2, frames, 2, 3, 5)).astype(np.float32)
    return [[jnp.asarray(clip) for clip in sample] for sample in draw]


@pytest.mark.parametrize(
    ("name", "causal", "given"),
    [
        ("t2v", True, []),
        ("i2v_head", True, [0]),
        ("i2v_tail", False, [18]),
        ("i2v_loop", True, [0, 18]),
        ("v2v_head", False, range(8)),
        ("v2v_head", True, range(9)),
        ("v2v_tail", True, range(10, 19)),
        ("v2v_head_easy", True, range(17)),
        ("v2v_tail_easy", False, range(3, 19)),
    ],
)
def test_each_condition_shows_its_frames(name, causal, given):
    assert conditions.frame_mask(name, 19, causal).nonzero()[0].tolist() == list(given)


def test_the_head_is_the_start_of_the_first_reference_and_the_tail_the_end_of_the_last():
    refs = references(3)
    mask, placed = conditions.condition("i2v_loop", refs, SHAPE, causal=True)
    np.testing.assert_array_equal(placed[1, 0], refs[1][0][0])
    np.testing.assert_array_equal(placed[1, -1], refs[1][1][2])
    assert not placed[:, 1:-1].any()
    np.testing.assert_array_equal(mask[0, :, 1, 2, 0], mask[1, :, 0, 0, 0])


def test_a_tail_clip_keeps_its_order():
    refs = references(11)
    _, placed = conditions.condition("v2v_tail", refs, SHAPE, causal=False)
    np.testing.assert_array_equal(placed[0, 11:], refs[0][1][3:])


def test_t2v_needs_no_reference_and_shows_nothing():
    mask, placed = conditions.condition("t2v", None, SHAPE, causal=True)
    assert mask.shape == (2, 19, 2, 3, 1)
    assert placed.shape == SHAPE
    assert not mask.any()
    assert not placed.any()


def test_a_single_frame_is_never_given():
    mask, _ = conditions.condition("i2v_head", references(1), (2, 1, 2, 3, 5), causal=True)
    assert not mask.any()


def test_references_are_pasted_in_every_sample():
    refs = references(1)
    mask, placed = conditions.condition("i2v_head", refs, SHAPE, causal=True)
    pasted = conditions.paste("i2v_head", jnp.ones(SHAPE), mask, placed)
    for sample in range(2):
        np.testing.assert_array_equal(pasted[sample, 0], refs[sample][0][0])
    assert (pasted[:, 1:] == 1).all()


def test_clips_are_not_pasted():
    mask, placed = conditions.condition("v2v_head", references(9), SHAPE, causal=True)
    assert (conditions.paste("v2v_head", jnp.ones(SHAPE), mask, placed) == 1).all()


def test_an_unknown_condition_is_refused_with_the_allowed_names():
    with pytest.raises(ValueError, match=r"v2v_middle.*i2v_loop.*v2v_tail_easy"):
        conditions.frame_mask("v2v_middle", 19, causal=True)


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match="needs a reference for each of the 2 samples"):
        conditions.condition("i2v_head", None, SHAPE, causal=True)
    with pytest.raises(ValueError, match="needs a reference"):
        conditions.condition("i2v_head", [references(1)[0], []], SHAPE, causal=True)


def test_a_short_reference_is_refused():
    with pytest.raises(ValueError, match="reference of 9 latent frames: got 5"):
        conditions.condition("v2v_head", references(5), SHAPE, causal=True)


def test_a_video_shorter_than_its_condition_is_refused():
    with pytest.raises(ValueError, match="gives 9 latent frames, the video has 7"):
        conditions.frame_mask("v2v_tail", 7, causal=True)
