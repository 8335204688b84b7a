"""Conditions that differ within a batch, against those of sampling, which are the same for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import conditions, drawn_conditions
from opensora_jax.diffusion.drawn_conditions import HEAD, NAMES, TAIL, learnt_frames, padded_frames

FRAMES, SIZE = 19, (2, 3, 5)  # of the latent, H W C
DRAWN = jnp.arange(len(NAMES))  # every condition once


def given(causal):
    """Returns a latent for every condition, and everything that any of them shows."""
    sizes = {"latent": FRAMES} | drawn_conditions.references(NAMES, FRAMES, causal)
    rng = np.random.default_rng(int(causal))
    return {name: jnp.asarray(rng.normal(size=(len(NAMES), size, *SIZE)), jnp.float32) for name, size in sizes.items()}


@pytest.mark.parametrize("causal", [True, False])
def test_every_sample_sees_what_the_sampler_would_show_it(causal):
    values = given(causal)
    latent = values.pop("latent")
    found = drawn_conditions.condition(DRAWN, latent, values, causal)
    for i, name in enumerate(NAMES):
        head, tail = conditions.visible_frames(name, causal)
        if max(head, tail) == 1:
            shown = [values["head"][i], values["tail"][i]][head == 0 :]
        else:  # a part of the latent has the frames of both ends in it, a clip encoded alone is one end
            shown = [values[drawn_conditions.clip_name(max(head, tail))][i] if causal and name != "t2v" else latent[i]]
        mask, reference = conditions.condition(name, [shown], (1, FRAMES, *SIZE), causal)
        np.testing.assert_array_equal(found[i], jnp.concatenate([mask, reference], -1)[0], err_msg=name)


def test_one_program_serves_all_draws():
    values = given(True)
    latent = values.pop("latent")
    run = jax.jit(lambda drawn: drawn_conditions.condition(drawn, latent, values, True))
    for shift in range(3):
        drawn = jnp.roll(DRAWN, shift)
        masks = np.stack([conditions.frame_mask(NAMES[i], FRAMES, True) for i in drawn])
        np.testing.assert_array_equal(run(drawn)[:, :, 1, 2, 0], masks)
    assert run._cache_size() == 1


def test_an_image_is_shown_nothing():
    latent = jnp.ones((len(NAMES), 1, *SIZE))
    assert not drawn_conditions.condition(DRAWN, latent, {}, True).any()
    assert drawn_conditions.references(NAMES, 1, True) == {}


@pytest.mark.parametrize(("causal", "shortest"), [(False, (9, 17)), (True, (10, 18))])
def test_a_shown_clip_leaves_something_to_be_made(causal, shortest):
    for name, least in zip(("v2v_tail", "v2v_head_easy"), shortest, strict=True):
        assert drawn_conditions.fitting([name, "t2v"], least, causal) == (name, "t2v")
        assert drawn_conditions.fitting([name, "t2v"], least - 1, causal) == ("t2v",)
    assert drawn_conditions.fitting(["i2v_loop"], 2, causal) == ("i2v_loop",)


def test_only_what_conditions_show_is_needed():
    need = drawn_conditions.references
    assert need(["t2v"], FRAMES, True) == {}
    assert need(["i2v_head", "t2v"], FRAMES, True) == {HEAD: 1}
    assert need(["i2v_loop", "v2v_head"], FRAMES, True) == {HEAD: 1, TAIL: 1, "clip9": 9}
    assert need(["i2v_tail", "v2v_head"], FRAMES, False) == {TAIL: 1}  # clips are parts of the latent
    assert need(["v2v_head", "v2v_tail_easy"], 12, True) == {"clip9": 9}  # the other does not fit


@pytest.mark.parametrize(
    ("mask", "learnt"),
    [
        ([0, 0, 0, 0, 0], [1, 1, 1, 1, 1]),
        ([1, 0, 0, 0, 0], [0, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 1], [1, 1, 1, 1, 0]),
        ([1, 0, 0, 0, 1], [0, 1, 1, 1, 0]),
        ([1, 1, 0, 0, 0], [1, 1, 1, 1, 1]),  # a clip stays in the loss
        ([0, 0, 0, 1, 1], [1, 1, 1, 1, 1]),
        ([1, 1], [1, 1]),  # nothing else would be left
        ([0], [1]),
    ],
)
def test_given_images_are_not_learnt_and_given_clips_are(mask, learnt):
    assert learnt_frames(jnp.asarray([mask], jnp.float32))[0].tolist() == learnt


def test_a_padded_image_fills_a_latent_frame_and_the_other_end_pays_for_it():
    assert padded_frames("i2v_head", 12, 4).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert padded_frames("i2v_tail", 12, 4).tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11, 11]
    assert padded_frames("i2v_loop", 12, 4).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5]
    for name in ("t2v", "v2v_head"):
        assert padded_frames(name, 12, 4).tolist() == list(range(12))
    assert padded_frames("i2v_head", 4, 4).tolist() == [0, 1, 2, 3]  # one latent frame: nothing is shown
