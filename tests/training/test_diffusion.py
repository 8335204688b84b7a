"""The objective of the denoiser, on a model that tells what it was given; tests/parity has the original's numbers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.diffusion import flow
from opensora_jax.diffusion.drawn_conditions import NAMES
from opensora_jax.training.conditions import CONDITION, ConditionMix
from opensora_jax.training.diffusion import DropoutRatio, FlowConfig, NullText, Objective

NULL = NullText(jnp.full((3, 2), -1.0).at[2].set(-3.0), jnp.full(5, -2.0))
TIMES = FlowConfig("uniform", stratified=False, flow_shift=None)
KEY = jax.random.key(2)


def batch(rows=4, frames=3, tokens=3):
    shape = (rows, frames, 2, 2, 7)
    references = {name: jnp.full((rows, 1, 2, 2, 7), value) for name, value in (("head", 10.0), ("tail", 20.0))}
    texts = {"text": jnp.ones((rows, tokens, 2)), "pooled": jnp.ones((rows, 5))}
    return {"latent": jax.random.normal(jax.random.key(0), shape)} | texts | references


def objective(times=TIMES, t5=0.0, clip=0.0, weights=None, guidance=None, no_i2v_ref_loss=False):
    mix = ConditionMix.parse(weights or {}, is_causal=True)
    return Objective(times, DropoutRatio(t5, clip), NULL, mix, guidance, no_i2v_ref_loss)


def value_of(goal, model, rows):
    """Returns the loss of rows for the draws of one key."""
    return goal(model, rows, goal.draw(rows, KEY))


class Model(nnx.Module):
    """Notes its inputs and answers with zeros, or with a constant on the first frame."""

    def __init__(self, first_frame=0.0):
        self.first_frame = first_frame

    def __call__(self, x, t, text, pooled, condition, guidance):
        self.seen = nnx.data({"x": x, "t": t, "text": text, "condition": condition, "guidance": guidance})
        return jnp.zeros_like(x).at[:, 0].set(self.first_frame)


def test_rows_lose_each_text_independently_at_the_given_rate():
    goal, rows = objective(t5=0.25, clip=0.5), batch(20_000)
    inputs = goal.inputs(rows, goal.draw(rows, jax.random.key(1)))
    no_text, no_pooled = np.asarray(inputs.text[:, 0, 0]) == -1, np.asarray(inputs.pooled[:, 0]) == -2
    assert no_text.mean() == pytest.approx(0.25, abs=0.01)
    assert no_pooled.mean() == pytest.approx(0.5, abs=0.01)
    assert (no_text & no_pooled).mean() == pytest.approx(0.125, abs=0.01)
    np.testing.assert_array_equal(
        inputs.text[no_text], jnp.broadcast_to(NULL.text, (no_text.sum(), 3, 2))
    )  # whole rows


def test_a_short_null_text_repeats_its_last_embedding_and_a_long_one_is_refused():
    goal, rows = objective(t5=1.0), batch(tokens=5)
    text = goal.inputs(rows, goal.draw(rows, KEY)).text
    np.testing.assert_array_equal(text[1, :, 0], [-1, -1, -3, -3, -3])
    with pytest.raises(ValueError, match="The null text has 3 tokens, the texts have 2"):
        NULL.padded(2)


def test_the_model_sees_the_point_of_its_time_on_the_path():
    model, rows = Model(), batch()
    value, _ = value_of(objective(), model, rows)
    t = flow.per_sample(model.seen["t"], model.seen["x"])
    noise = (model.seen["x"] - (1 - t) * rows["latent"]) / (1 - (1 - flow.SIGMA_MIN) * (1 - t))
    np.testing.assert_allclose(value, np.mean((flow.target(rows["latent"], noise)) ** 2), rtol=1e-3)
    np.testing.assert_array_equal(model.seen["text"], rows["text"])
    assert model.seen["condition"] is None
    assert model.seen["guidance"] is None


def test_times_move_to_noise_with_the_size_of_a_bucket():
    times = FlowConfig("logit_normal", stratified=True, flow_shift=None)
    # 129 frames of 192 x 336
    assert objective(times).shift((1, 33, 24, 42, 16)) == pytest.approx(5.7326, abs=1e-4)
    assert objective(replace(times, flow_shift=2.5)).shift((1, 33, 24, 42, 16)) == 2.5
    small = {"latent": jnp.zeros((4001, 4, 2, 2, 1))}
    shift = objective(times).shift((4001, 4, 2, 2, 1))
    assert np.median(objective(times).draw(small, KEY).t) == pytest.approx(shift / (1 + shift), abs=1e-3)


def test_a_latent_of_a_cache_in_bfloat16_gives_float32_inputs():
    rows = {name: value.astype(jnp.bfloat16) for name, value in batch().items()}
    goal = objective(weights={"i2v_head": 1})
    inputs = goal.inputs(rows | {CONDITION: jnp.full(4, NAMES.index("i2v_head"))}, goal.draw(rows, KEY))
    assert inputs.x.dtype == inputs.condition.dtype == jnp.float32


def test_each_sample_is_shown_its_own_condition():
    names = ("t2v", "i2v_head", "i2v_loop", "i2v_tail")
    rows = batch() | {CONDITION: jnp.asarray([NAMES.index(name) for name in names])}
    model = Model()
    value_of(objective(weights=dict.fromkeys(names, 1), guidance=3.5), model, rows)
    mask, shown = np.split(np.asarray(model.seen["condition"]), [1], axis=-1)
    np.testing.assert_array_equal(mask[:, :, 0, 0, 0], [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(shown[:, :, 1, 1, 3], [[0, 0, 0], [10, 0, 0], [10, 0, 20], [0, 0, 20]])
    np.testing.assert_array_equal(model.seen["guidance"], [3.5] * 4)


def test_a_reference_that_a_condition_shows_must_be_in_the_batch():
    rows = {name: value for name, value in batch().items() if name != "tail"}
    with pytest.raises(KeyError, match="tail"):
        value_of(objective(weights={"i2v_tail": 1}), Model(), rows | {CONDITION: jnp.zeros(4, jnp.int32)})


def test_given_images_leave_the_loss_where_the_config_says_so():
    rows = batch() | {CONDITION: jnp.full(4, NAMES.index("i2v_head"))}
    weights = {"i2v_head": 1}
    losses = [
        [value_of(objective(weights=weights, no_i2v_ref_loss=masked), Model(first), rows)[0] for first in (0.0, 50.0)]
        for masked in (True, False)
    ]
    assert losses[0][0] == losses[0][1]  # whatever the first frame is
    assert losses[1][1] > losses[1][0] + 500
    rest = {"latent": rows["latent"][:, 1:], "text": rows["text"], "pooled": rows["pooled"]}
    draws = objective().draw(rows, KEY)
    value, _ = objective()(Model(), rest, draws._replace(noise=draws.noise[:, 1:]))
    np.testing.assert_allclose(losses[0][0], value, rtol=1e-6)


def test_a_model_that_takes_other_inputs_is_refused():
    def check(goal, cond_embed=False, guidance_embed=False):
        goal.check({"a": batch()}, cond_embed=cond_embed, guidance_embed=guidance_embed)

    check(objective(), cond_embed=True)  # it is shown nothing
    check(objective(guidance=4.0), guidance_embed=True)
    with pytest.raises(UserError, match=r"guidance_embed=True: set --config\.guidance=4\.0"):
        check(objective(), guidance_embed=True)
    with pytest.raises(UserError, match="cond_embed=False"):
        check(objective(weights={"i2v_head": 1}))
