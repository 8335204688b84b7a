"""What goldens do not say of the discriminator (tests/parity has those): sizes, dropout, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.discriminator import Discriminator, DiscriminatorConfig

CONFIG = DiscriminatorConfig(input_nc=3, ndf=2, n_layers=2, dropout=0.25)


def test_layers_grow_eightfold_at_most_and_shrink_time_twice():
    config = DiscriminatorConfig(3, 64, 5, 0.3)
    assert config.widths == (64, 128, 256, 512, 512, 512)
    assert config.strides == ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2), (1, 1, 1))
    assert DiscriminatorConfig(3, 64, 1, 0.3).strides == ((2, 2, 2), (1, 1, 1))


def test_masks_keep_what_dropout_does_not_take_and_follow_their_key():
    model = nnx.eval_shape(lambda: Discriminator(CONFIG, rngs=nnx.Rngs(0)))
    shape = (5, 7, 65, 47, 3)
    masks, again, other = (model.draw_masks(jax.random.key(seed), shape) for seed in (0, 0, 1))
    assert [mask.shape for mask in masks] == [(5, 2, 17, 12, 4), (5, 2, 17, 12, 8)]
    for mask, same, different in zip(masks, again, other, strict=True):
        assert mask.mean() == pytest.approx(0.75, abs=0.02)
        np.testing.assert_array_equal(mask, same)
        assert (mask != different).any()
    rest = 1 - masks[0][..., :4] * 1.0, 1 - masks[1][..., :4] * 1.0
    assert abs(np.corrcoef(rest[0].ravel(), rest[1].ravel())[0, 1]) < 0.05  # layers are independent


def test_training_leaves_the_module_as_it_was_and_returns_its_next_statistics():
    model = Discriminator(CONFIG, rngs=nnx.Rngs(0))
    video = jax.random.normal(jax.random.key(0), (2, 5, 9, 7, 3))
    logits, after = jax.jit(lambda video: model.in_training(video, None))(video)
    assert logits.shape == (2, 2, 3, 2, 1)
    before = nnx.state(model, nnx.BatchStat)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
    for value, start in ((before["main"]["3"]["running_mean"], 0), (before["main"]["3"]["running_var"], 1)):
        np.testing.assert_array_equal(value[...], start)


@pytest.mark.parametrize(
    ("change", "why"), [({"n_layers": 0}, "n_layers is at least 1"), ({"dropout": 1.0}, "below 1: got 1.0")]
)
def test_impossible_networks_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        DiscriminatorConfig(**(CONFIG.__dict__ | change))


def test_an_image_is_a_short_clip():
    model = Discriminator(CONFIG, rngs=nnx.Rngs(0))
    assert jax.jit(model)(jnp.zeros((1, 1, 8, 8, 3))).shape == (1, 1, 2, 2, 1)
