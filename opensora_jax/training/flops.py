"""Floating-point operations of a denoiser, counted from its shape, and what devices can do at most.

A product of matrices (m, k) and (k, n) counts 2 m k n; norms, activations, rotations and biases count nothing. A
training step counts three times the forward pass: backwards takes two. Recomputed activations are not counted, so that
utilisation (MFU) says how fast the model learns and not how busy the device is.
Source for the convention: PaLM, appendix B (Chowdhery et al. 2022, arXiv:2204.02311).
"""

from opensora_jax.models.mmdit import TIME_FEATURES, MMDiTConfig

# device kind as JAX names it: dense bfloat16 operations per second and device
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # one of a chip's two
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def forward_flops(config: MMDiTConfig, img_tokens: int, txt_tokens: int) -> int:
    """Returns the operations of one forward pass over one sample."""
    h, m, L = config.hidden_size, config.mlp_size, img_tokens + txt_tokens
    attention = 4 * L**2 * h  # scores, and their product with the values
    double = 2 * L * (4 * h * h + 2 * h * m) + attention + 2 * 2 * 6 * h * h
    single = 2 * L * (4 * h * h + 2 * h * m) + attention + 2 * 3 * h * h
    vectors = 2 * (TIME_FEATURES + config.vec_in_dim + 2 * h) * h + 2 * 2 * h * h
    vectors += 2 * (TIME_FEATURES + h) * h if config.guidance_embed else 0
    ends = 2 * img_tokens * config.in_channels * 2 * h + 2 * txt_tokens * config.context_in_dim * h
    ends += 2 * img_tokens * config.condition_channels * h if config.cond_embed else 0
    return config.depth * double + config.depth_single_blocks * single + vectors + ends


def training_flops(config: MMDiTConfig, img_tokens: int, txt_tokens: int) -> int:
    """Returns the operations of a training step for one sample: forwards once, backwards twice that."""
    return 3 * forward_flops(config, img_tokens, txt_tokens)
