"""A small MMDiT for tests; each changes what it is about."""

from dataclasses import replace
from typing import Any

from opensora_jax.models.mmdit import MMDiTConfig

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
