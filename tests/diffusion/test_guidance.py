import numpy as np
import pytest

from opensora_jax.diffusion.guidance import (
    GuidanceConfig,
    count_passes,
    image_scales,
    plan_distilled,
    plan_steps,
)

FULL = GuidanceConfig(7.5, 3.0, text_osci=True, image_osci=True, scale_temporal_osci=True)


def test_fifty_steps_of_t2v_need_eighty_passes():
    assert count_passes(plan_steps(FULL, 50, "t2v", 33)) == 80


def test_fifty_steps_of_i2v_need_110_passes():
    assert count_passes(plan_steps(FULL, 50, "i2v_head", 33)) == 110


def test_without_oscillation_every_step_is_guided():
    steady = GuidanceConfig(7.5, 3.0, text_osci=False, image_osci=False, scale_temporal_osci=False)
    assert count_passes(plan_steps(steady, 50, "t2v", 33)) == 100
    assert count_passes(plan_steps(steady, 50, "i2v_loop", 33)) == 150


@pytest.mark.parametrize("condition", ["t2v", "i2v_head", "v2v_tail"])
def test_the_weights_of_every_frame_sum_to_one(condition):
    for step in plan_steps(FULL, 50, condition, 7):
        np.testing.assert_allclose(step.weights.sum(0), 1, atol=1e-6)


def test_off_steps_are_the_odd_ones_after_the_first_ten():
    plan = plan_steps(FULL, 17, "i2v_tail", 5)
    assert [i for i, step in enumerate(plan) if step.branches == ("cond",)] == [11, 13, 15]


def test_guidance_of_one_is_the_conditional_pass_alone():
    none = GuidanceConfig(1.0, 1.0, text_osci=False, image_osci=False, scale_temporal_osci=False)
    for condition in ("t2v", "i2v_head"):
        assert all(step.branches == ("cond",) for step in plan_steps(none, 3, condition, 5))


def test_equal_scales_skip_the_null_text_with_the_reference():
    equal = GuidanceConfig(3.0, 3.0, text_osci=False, image_osci=False, scale_temporal_osci=False)
    assert plan_steps(equal, 1, "i2v_head", 5)[0].branches == ("cond", "uncond")


def test_the_image_scale_grows_along_time_up_to_a_bound_that_falls_over_the_steps():
    np.testing.assert_allclose(image_scales(FULL, 0, 13, "i2v_head", 3), [1, 2, 3])
    np.testing.assert_allclose(image_scales(FULL, 12, 13, "i2v_head", 3), [1, 1 + 1 / 13, 1 + 2 / 13], rtol=1e-6)


def test_temporal_scaling_is_for_images_and_for_guided_steps():
    np.testing.assert_allclose(image_scales(FULL, 0, 13, "v2v_head", 3), [3, 3, 3])
    np.testing.assert_allclose(image_scales(FULL, 11, 13, "i2v_head", 3), [1, 1, 1])


def test_a_distilled_model_takes_one_pass_per_step():
    assert count_passes(plan_distilled(5, 3)) == 5


def test_i2v_without_an_image_scale_is_refused():
    with pytest.raises(ValueError, match="needs guidance_img"):
        plan_steps(GuidanceConfig(7.5, None, True, True, True), 5, "i2v_head", 3)
