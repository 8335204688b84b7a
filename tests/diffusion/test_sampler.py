from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import conditions, guidance
from opensora_jax.diffusion.sampler import Prompt, branch_prompts, denoise

B, T, H, W, C, S, D, P = 2, 5, 3, 2, 3, 7, 5, 3
STEPS = 13
TIMES = np.linspace(1, 0, STEPS + 1, dtype=np.float32) ** 0.5


def velocity(params, x, t, text, pooled, condition, strength):
    """An arbitrary smooth function of every input; NumPy and JAX alike."""
    shift = (text.sum((1, 2)) + (pooled * pooled).sum(1) + t)[:, None, None, None, None]
    seen = 0 if condition is None else condition.sum(-1, keepdims=True)
    extra = 0 if strength is None else strength[:, None, None, None, None]
    return params * jnp.sin(x + shift + 0.3 * seen) + 0.1 * x * seen - 0.2 * extra


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


NOISE = draw(B, T, H, W, C, seed=0)
PROMPT = Prompt(draw(B, S, D, seed=1), draw(B, P, seed=2))
NULL = Prompt(draw(B, S, D, seed=3), draw(B, P, seed=4))
PROMPTS = branch_prompts(PROMPT, NULL)
PARAMS = jnp.float32(0.7)


def three_passes(config, name, condition):
    """The original's loop: all three branches in every step, whatever they add."""
    x, nothing = NOISE, jnp.zeros_like(condition)
    for i in range(STEPS):
        t = jnp.full(B, TIMES[i])
        c = velocity(PARAMS, x, t, *PROMPT, condition, None)
        u1 = velocity(PARAMS, x, t, *NULL, condition, None)
        u2 = velocity(PARAMS, x, t, *NULL, nothing, None)
        off = i >= 10 and i % 2 == 1
        text = 1.0 if off and config.text_osci else config.guidance
        image = 1.0 if off and config.image_osci else config.guidance_img
        if image > 1 and config.scale_temporal_osci and "i2v" in name:
            image = jnp.linspace(1, jnp.linspace(image, 1, STEPS + 1)[i], T)[:, None, None, None]
        x = x + (TIMES[i + 1] - TIMES[i]) * (u2 + image * (u1 - u2) + text * (c - u1))
    return x


@pytest.mark.parametrize("name", ["t2v", "i2v_head", "i2v_loop"])
@pytest.mark.parametrize(
    "flags", [(False, False, False), (True, False, True), (False, True, False), (True, True, True)]
)
def test_skipping_passes_gives_the_same_as_three_passes(name, flags):
    config = guidance.GuidanceConfig(2.5, 1.7, *flags)
    references = [[draw(1, H, W, C, seed=5)], [draw(1, H, W, C, seed=6)]]
    mask, reference = conditions.condition(name, references, NOISE.shape, causal=True)
    shown = jnp.concatenate([mask, reference], -1)
    plan = guidance.plan_steps(config, STEPS, name, T)
    x = denoise(velocity, PARAMS, NOISE, TIMES, plan, prompts=PROMPTS, condition=shown)
    np.testing.assert_allclose(x, three_passes(config, name, shown), rtol=1e-4, atol=1e-4)


def test_a_distilled_model_gets_its_guidance_as_an_input():
    plan = guidance.plan_distilled(STEPS, T)
    settings = {"prompts": PROMPTS, "condition": None, "guidance": 4.0}
    x = denoise(velocity, PARAMS, NOISE, TIMES, plan, **settings)
    expected = NOISE
    for now, then in pairwise(TIMES):
        v = velocity(PARAMS, expected, jnp.full(B, now), *PROMPT, None, jnp.full(B, 4.0))
        expected = expected + (then - now) * v
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_neighbours():
    plan = guidance.plan_steps(guidance.GuidanceConfig(2.5, None, False, False, False), STEPS, "t2v", T)
    both = denoise(velocity, PARAMS, NOISE, TIMES, plan, prompts=PROMPTS, condition=None)
    second = branch_prompts(*(Prompt(p.text[1:], p.pooled[1:]) for p in (PROMPT, NULL)))
    settings = {"prompts": second, "condition": None}
    alone = denoise(velocity, PARAMS, NOISE[1:], TIMES, plan, **settings)
    np.testing.assert_allclose(alone[0], both[1], rtol=1e-5, atol=1e-5)


def test_progress_sees_every_step():
    seen = []
    plan = guidance.plan_distilled(STEPS, T)
    settings = {"prompts": PROMPTS, "condition": None}
    denoise(velocity, PARAMS, NOISE, TIMES, plan, progress=lambda steps: seen.extend(steps) or steps, **settings)
    assert len(seen) == STEPS


def test_times_that_do_not_fit_the_plan_are_refused():
    plan = guidance.plan_distilled(STEPS, T)
    with pytest.raises(ValueError, match="13 steps need 14 times, got 13"):
        denoise(velocity, PARAMS, NOISE, TIMES[1:], plan, prompts=PROMPTS, condition=None)
