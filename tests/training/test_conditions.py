"""The draw of conditions, and what a config may ask for."""

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.diffusion.drawn_conditions import NAMES
from opensora_jax.training.conditions import CONDITION, ConditionMix

WEIGHTS = {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1, "v2v_head": 2, "v2v_tail": 0}
MIX = ConditionMix.parse(WEIGHTS, is_causal=True)
IDS = np.arange(20_000)


def shares(numbers):
    return {NAMES[i]: float(np.mean(numbers == i)) for i in np.unique(numbers)}


def test_conditions_come_as_often_as_their_weights_say():
    found = shares(MIX.draw(0, 3, IDS, 19))
    assert found == pytest.approx(
        {"t2v": 0.1, "i2v_head": 0.5, "i2v_loop": 0.1, "i2v_tail": 0.1, "v2v_head": 0.2}, abs=0.01
    )
    assert shares(ConditionMix.parse({"i2v_tail": 1e-9}, True).draw(0, 3, IDS, 19)) == {"i2v_tail": 1}


def test_short_clips_share_the_weights_that_are_left_and_long_ones_after_them_have_all():
    assert shares(MIX.draw(0, 3, IDS, 9)) == pytest.approx(
        {"t2v": 1 / 8, "i2v_head": 5 / 8, "i2v_loop": 1 / 8, "i2v_tail": 1 / 8}, abs=0.01
    )
    assert "v2v_head" in shares(MIX.draw(0, 4, IDS, 10))


def test_an_image_is_text_to_video():
    assert shares(MIX.draw(0, 3, IDS, 1)) == {"t2v": 1}
    assert shares(ConditionMix.parse({"v2v_head": 1}, True).draw(0, 3, IDS, 1)) == {"t2v": 1}


def test_a_draw_depends_on_seed_step_and_sample_alone():
    whole = MIX.draw(7, 3, IDS, 19)
    np.testing.assert_array_equal(MIX.draw(7, 3, IDS[5000:6000], 19), whole[5000:6000])  # as another host has them
    for seed, step in (8, 3), (7, 4):
        assert np.mean(MIX.draw(seed, step, IDS, 19) != whole) > 0.2


def test_a_batch_of_text_to_video_stays_as_it_is():
    batch = {"sample_id": IDS, "step": np.asarray(3)}
    assert ConditionMix.parse({}, True).add(batch, 7, 19) is batch
    assert ConditionMix.parse({"t2v": 2, "i2v_head": 0}, True).add(batch, 7, 19) is batch
    np.testing.assert_array_equal(MIX.add(batch, 7, 19)[CONDITION], MIX.draw(7, 3, IDS, 19))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"i2v_haed": 1.0}, "no condition 'i2v_haed'; did you mean 'i2v_head'"),
        ({"t2v": -1.0}, "config.condition_config.t2v is a weight, 0 or more: got -1.0"),
        ({"t2v": float("nan")}, "is a weight"),
        ({"t2v": 0.0}, "no weight above 0"),
    ],
)
def test_a_mix_that_cannot_be_drawn_from_is_refused(weights, message):
    with pytest.raises(UserError, match=message):
        ConditionMix.parse(weights, True)


def example(frames, *names):
    return {"latent": np.zeros((2, frames, 3, 5, 7))} | {name: np.zeros((2, 1, 3, 5, 7)) for name in names}


def test_what_fits_passes():
    MIX.check({"a": example(9, "head", "tail"), "image": example(1)}, cond_embed=True)
    ConditionMix.parse({"v2v_head": 1}, False).check({"a": example(9)}, cond_embed=True)  # a part of the latent
    ConditionMix.parse({}, True).check({"a": example(9)}, cond_embed=False)


@pytest.mark.parametrize(
    ("weights", "examples", "cond_embed", "message"),
    [
        ({"i2v_head": 1}, {}, False, "model.cond_embed=True"),
        ({"v2v_head": 1}, {"a": example(9)}, True, "longer clips than those of a, which have 9 latent frames"),
        ({"i2v_loop": 1}, {"a": example(9, "head")}, True, "the cached latents of a do not hold"),
        (
            {"v2v_tail": 1, "t2v": 1},
            {"a": example(10)},
            True,
            "causal autoencoder encodes alone, which",
        ),
    ],
)
def test_a_mix_that_does_not_fit_model_or_data_is_refused(weights, examples, cond_embed, message):
    with pytest.raises(UserError, match=message):
        ConditionMix.parse(weights, True).check(examples, cond_embed=cond_embed)


def test_clips_that_are_too_short_for_all_can_be_drawn_for_until_they_are_refused():
    draws = ConditionMix.parse({"v2v_head": 1.0}, True).draw(0, 0, np.arange(3), 3)
    assert [NAMES[number] for number in draws] == ["t2v"] * 3
