"""Numbers that no network can have are refused by the name of their field, before anything is built."""

from dataclasses import replace

import pytest

from opensora_jax.models.clip import CLIPTextConfig
from opensora_jax.models.sizes import check_normaliser
from tests.models.tiny import AUTOENCODERS, CRITICS

HUNYUAN, DC_AE, OPENSORA = (AUTOENCODERS[name] for name in ("hunyuan_vae", "dc_ae", "opensora_vae"))


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (HUNYUAN, {"norm_num_groups": 0}),
        (HUNYUAN, {"layers_per_block": 0}),
        (HUNYUAN, {"block_out_channels": (4, 0, 8)}),
        (HUNYUAN, {"block_out_channels": ()}),
        (OPENSORA.vae_2d, {"norm_num_groups": 0}),
        (OPENSORA.vae_2d, {"block_out_channels": ()}),
        (OPENSORA.vae_temporal, {"num_res_blocks": -3}),  # it would make one
        (OPENSORA.vae_temporal, {"num_groups": 0}),
        (DC_AE, {"latent_channels": 0}),
        (DC_AE.encoder, {"width_list": (8, 0)}),
        (CRITICS["discriminator"], {"ndf": 0}),
        (CLIPTextConfig(9, 6, 8, 1, 3, 7, 2), {"num_attention_heads": 0}),
    ],
)
def test_what_is_below_one_is_named(config, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is at least 1: got "):
        replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 3}, r"norm_num_groups divides all of block_out_channels: got 3 and \(4, 4, 8\)"),
        ({"block_out_channels": (4, 8), "spatial_compression_ratio": 4}, "2 levels .* shrink time by 2: got .* of 4"),
        ({"time_compression_ratio": 8, "spatial_compression_ratio": 4}, "shrink time by 4: got .* of 8"),
        ({"scale_factor": 0.0}, "scale_factor is finite and not 0: got 0.0"),
        ({"shift_factor": float("nan")}, "shift_factor is finite: got nan"),
    ],
)
def test_a_hunyuan_autoencoder_is_what_its_config_says(change, message):
    with pytest.raises(ValueError, match=message):
        replace(HUNYUAN, **change)


def test_a_normaliser_has_a_number_for_all_channels_or_for_each():
    check_normaliser(
        replace(HUNYUAN, scale_factor=(1.0, 2.0), shift_factor=0.0), 2, factor="scale_factor", shift="shift_factor"
    )
    with pytest.raises(ValueError, match="scale has one number or 2, one a channel: got 3"):
        replace(OPENSORA, scale=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"scale is finite and not 0: got \(0.0, 1.0\)"):
        replace(OPENSORA, scale=(0.0, 1.0))
