"""Small networks for tests; each changes what it is about."""

from dataclasses import replace
from typing import Any

from opensora_jax.models.dc_ae_config import DCAEConfig, DecoderConfig, EncoderConfig
from opensora_jax.models.discriminator import DiscriminatorConfig
from opensora_jax.models.flux_ae import FluxAEConfig
from opensora_jax.models.hunyuan_vae import HunyuanVAEConfig
from opensora_jax.models.lpips import LPIPSConfig
from opensora_jax.models.mmdit import MMDiTConfig
from opensora_jax.models.opensora_vae import OpenSoraVAEConfig, SpatialVAEConfig
from opensora_jax.models.temporal_vae import TemporalVAEConfig

MMDIT = MMDiTConfig(
    in_channels=8,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=24,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 4, 4),
    theta=100,
    qkv_bias=True,
    guidance_embed=False,
    cond_embed=True,
    fused_qkv=False,
    use_liger_rope=True,
    patch_size=2,
    grad_ckpt_settings=(0, 0),
    remat_policy="full",
)


def mmdit(**changes: Any) -> MMDiTConfig:
    """Returns the small one with other values."""
    return replace(MMDIT, **changes)


BLOCKS = ("ResBlock", ("EViTS5_GLU",))
AUTOENCODERS: dict[str, Any] = {
    "hunyuan_vae": HunyuanVAEConfig(3, 3, 2, (4, 4, 8), 1, 2, 4, 8, True, 0.5, 0.1),
    "flux_ae": FluxAEConfig(8, 3, 32, 3, (1, 2), 1, 5, 0.5, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "dc_ae": DCAEConfig(
        None,
        latent_channels=4,
        time_compression_ratio=2,
        spatial_compression_ratio=2,
        encoder=EncoderConfig(
            (8, 32), (1, 1), BLOCKS, "rms3d", "silu", True, "Conv", temporal_downsample=(True, False)
        ),
        decoder=DecoderConfig(
            *((8, 32), (1, 1), BLOCKS, "rms3d", "silu", True),
            upsample_block_type="InterpolateConv",
            out_norm="rms3d",
            temporal_upsample=(True, False),
        ),
    ),
    "opensora_vae": OpenSoraVAEConfig(
        vae_2d=SpatialVAEConfig(3, 3, (2, 4), 1, 3, 2),
        vae_temporal=TemporalVAEConfig(3, 5, 2, 2, 1, (1, 2, 2), (True, True), 2),
        micro_frame_size=4,
        micro_batch_size=2,
        shift=(1.0, 2.0),
        scale=(3.0, 4.0),
    ),
}
CRITICS: dict[str, Any] = {
    "discriminator": DiscriminatorConfig(input_nc=3, ndf=4, n_layers=2, dropout=0.3),
    "lpips": LPIPSConfig(widths=(2, 3, 4, 5, 6)),
}
