"""Flux's layout and Open-Sora's turn into each other bit by bit; only what is asked for is read."""

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.weights.layouts import to_fused, to_split

HEADS, SIZE, HIDDEN = 3, 4, 7
WIDTH = HEADS * SIZE


def flux():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    block = "double_blocks.0.img_attn."
    return {
        "img_in.weight": draw(WIDTH, 5),
        f"{block}qkv.weight": draw(3 * WIDTH, WIDTH),
        f"{block}qkv.bias": draw(3 * WIDTH),
        f"{block}norm.query_norm.scale": draw(SIZE),
        f"{block}norm.key_norm.scale": draw(SIZE),
        f"{block}proj.weight": draw(WIDTH, WIDTH),
        "single_blocks.11.linear1.weight": draw(3 * WIDTH + HIDDEN, WIDTH),
        "single_blocks.11.linear1.bias": draw(3 * WIDTH + HIDDEN),
        "single_blocks.11.norm.query_norm.scale": draw(SIZE),
        "single_blocks.11.norm.key_norm.scale": draw(SIZE),
    }


def test_a_head_gets_its_even_channels_first_in_queries_keys_and_norms():
    fused = flux()
    split = {key: np.asarray(tensor) for key, tensor in to_split(fused, HEADS).items()}
    block = "double_blocks.0.img_attn."
    for head in range(HEADS):
        for new, old in enumerate((0, 2, 1, 3)):
            row = fused[f"{block}qkv.weight"][WIDTH + head * SIZE + old]
            np.testing.assert_array_equal(split[f"{block}k_proj.weight"][head * SIZE + new], row)
    scale = fused[f"{block}norm.query_norm.scale"]
    np.testing.assert_array_equal(split[f"{block}norm.query_norm.scale"], scale[[0, 2, 1, 3]])
    np.testing.assert_array_equal(split[f"{block}v_proj.bias"], fused[f"{block}qkv.bias"][2 * WIDTH :])
    np.testing.assert_array_equal(
        split["single_blocks.11.v_mlp.weight"], fused["single_blocks.11.linear1.weight"][2 * WIDTH :]
    )
    np.testing.assert_array_equal(split[f"{block}proj.weight"], fused[f"{block}proj.weight"])


def test_there_and_back_changes_no_bit():
    fused = flux()
    back = to_fused(to_split(fused, HEADS), HEADS)
    assert back.keys() == fused.keys()
    for key, value in fused.items():
        assert back[key].shape == value.shape
        np.testing.assert_array_equal(np.asarray(back[key]), value)


@pytest.mark.parametrize("rows", [slice(0, 5), slice(7, 20), slice(WIDTH, 2 * WIDTH), slice(2 * WIDTH - 1, None)])
def test_a_part_of_a_converted_tensor_is_that_part_of_the_whole(rows):
    fused = flux()
    split = to_split(fused, HEADS)
    for tensors in (split, to_fused(split, HEADS)):
        for tensor in tensors.values():
            index = (rows, slice(1, 4))[: len(tensor.shape)]
            np.testing.assert_array_equal(tensor[index], np.asarray(tensor)[index])


def test_weights_in_the_other_layout_already_are_refused():
    split = to_split(flux(), HEADS)
    with pytest.raises(UserError, match="not in the layout of Flux"):
        to_split(split, HEADS)
    with pytest.raises(UserError, match="not in the layout of Open-Sora v2"):
        to_fused(flux(), HEADS)


def test_a_part_that_is_missing_is_named():
    split = to_split(flux(), HEADS)
    del split["single_blocks.11.v_mlp.bias"]
    with pytest.raises(UserError, match=r"lacks single_blocks\.11\.v_mlp\.bias"):
        to_fused(split, HEADS)
