"""Patterns of published names: what they match, and what is said of those that match nothing."""

import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.models.mmdit import MMDiT
from opensora_jax.weights.choice import choose, choose_parameters
from tests.models.tiny import mmdit

NAMES = {
    ("in",): ("in.weight",),
    ("blocks", "kernel"): ("block.0.lin.weight", "block.1.lin.weight", "block.2.lin.weight"),
    ("blocks", "bias"): ("block.0.lin.bias", "block.1.lin.bias", "block.2.lin.bias"),
    ("out",): ("out.bias",),
}


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        (("in",), {("in",)}),
        (("block",), {("blocks", "kernel"), ("blocks", "bias")}),
        (("block.*.weight",), {("blocks", "kernel")}),
        (("*.bias",), {("blocks", "bias"), ("out",)}),
        (("block.[01].lin", "block.2"), {("blocks", "kernel"), ("blocks", "bias")}),
        ((), set()),
    ],
)
def test_a_pattern_names_a_parameter_or_what_holds_it(patterns, paths):
    assert choose(NAMES, patterns, "config.optim.freeze") == paths


@pytest.mark.parametrize(
    ("patterns", "complaint"),
    [
        (
            ("in", "blok.*.lin"),
            r"config.optim.freeze: 'blok\.\*\.lin' names nothing here; near it are block\.\*\.lin, ",
        ),
        (("lin",), "'lin' names nothing here; near it are in"),  # names count from their start
        (("zzz",), "'zzz' names nothing here; there are block, in, out"),
        (("block.1",), r"block\.1 name 1 of the 3 layers of block\.\*\.lin\.weight, which are stored as one"),
    ],
)
def test_a_pattern_that_fits_nothing_or_a_part_of_a_stack_is_refused_in_one_line(patterns, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        choose(NAMES, patterns, "config.optim.freeze")
    assert "\n" not in str(error.value)


def test_parameters_of_a_model_go_by_their_published_names():
    config = mmdit()
    params = nnx.state(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))), nnx.Param)
    chosen = choose_parameters("mmdit", params, ("double_blocks.*.img_mlp.0", "cond_in"), "config.optim.freeze")
    assert chosen == {
        ("double_blocks", "blocks", "img_mlp", "in_layer", "kernel"),
        ("double_blocks", "blocks", "img_mlp", "in_layer", "bias"),
        ("cond_in", "kernel"),
        ("cond_in", "bias"),
    }
