"""MMDiT: text and video tokens in two streams, then in one, with joint attention, three-axis rope and adaptive norms.

Attribute names are those of the published weights, in both of their layouts: Open-Sora v2 (separate q, k, v; rotation
of channel halves) and Flux (fused, rotation of channel pairs).

Source: hpcaitech/Open-Sora, `opensora/models/mmdit/`; black-forest-labs/flux; Esser et al. 2024 (arXiv:2403.03206).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Num

from opensora_jax.models.sizes import check_least
from opensora_jax.nn.embed import MLPEmbedder, grid_ids, patchify, timestep_embedding, unpatchify
from opensora_jax.nn.linear import Linear, zeros
from opensora_jax.nn.norm import RMSNorm, standardize
from opensora_jax.nn.prologue import normed_and_rotated
from opensora_jax.nn.rope import Table, rope_table, rotate_half, rotate_pairs
from opensora_jax.nn.scaled import scaled
from opensora_jax.nn.stack import RematPolicy, Stack
from opensora_jax.parallel.gather import replicated
from opensora_jax.parallel.sequence import attend, per_device
from opensora_jax.parallel.tokens import SharedTokens

TIME_FEATURES = 256


@dataclass(frozen=True)
class MMDiTConfig:
    """Shape of the network, in the original's field names; `in_channels` counts a token: latent channels x patch^2.

    The last two are about memory alone: how many double and single blocks recompute their activations backwards, and
    what these keep (`nn.stack`).
    """

    in_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, int, int]
    theta: int
    qkv_bias: bool
    guidance_embed: bool
    cond_embed: bool
    fused_qkv: bool
    use_liger_rope: bool
    patch_size: int
    grad_ckpt_settings: tuple[int, int]
    remat_policy: RematPolicy

    def __post_init__(self):
        """Check what the layers below rely on."""
        widths = ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size")
        check_least(self, 1, *widths, "num_heads", "theta", "patch_size")
        check_least(self, 0, "depth", "depth_single_blocks", "axes_dim", "grad_ckpt_settings")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be divisible by num_heads: got {self.hidden_size} and {self.num_heads}."
            )
        if sum(self.axes_dim) != self.head_size or any(d % 2 for d in self.axes_dim):
            raise ValueError(f"axes_dim must be even and sum to the head size {self.head_size}: got {self.axes_dim}.")
        if self.in_channels % self.patch_size**2:
            raise ValueError(
                f"in_channels counts a token, so it is divisible by patch_size^2 = {self.patch_size**2}: "
                f"got {self.in_channels}."
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Hidden channels of the feed-forward part."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent that the model denoises."""
        return self.in_channels // self.patch_size**2

    @property
    def condition_channels(self) -> int:
        """Channels of one condition token: the mask and the masked latent."""
        return self.in_channels + self.patch_size**2


gelu = partial(jax.nn.gelu, approximate=True)
Heads = Float[Array, "B L N K"]


class QKNorm(nnx.Module):
    """RMS norms of queries and keys, per head and before rope, which it applies too."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.rotate = rotate_half if config.use_liger_rope else rotate_pairs
        self.query_norm = RMSNorm(config.head_size, rngs=rngs)
        self.key_norm = RMSNorm(config.head_size, rngs=rngs)

    def __call__(self, q: Heads, k: Heads, table: Table) -> tuple[Heads, Heads]:
        return (
            normed_and_rotated(q, self.query_norm, table, self.rotate),
            normed_and_rotated(k, self.key_norm, table, self.rotate),
        )


class StreamAttention(nnx.Module):
    """The projections of one stream around joint attention."""

    def __init__(self, config: MMDiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, linear = config.hidden_size, partial(Linear, dtype=dtype, rngs=rngs)
        self.heads, self.fused = config.num_heads, config.fused_qkv
        if self.fused:
            self.qkv = linear(width, 3 * width, ("embed", "heads"), bias=config.qkv_bias)
        else:
            self.q_proj = linear(width, width, ("embed", "heads"), bias=config.qkv_bias)
            self.k_proj = linear(width, width, ("embed", "heads"), bias=config.qkv_bias)
            self.v_proj = linear(width, width, ("embed", "heads"), bias=config.qkv_bias)
        self.norm = QKNorm(config, rngs=rngs)
        self.proj = linear(width, width, ("heads", "embed"))

    def project(self, x: Float[Array, "B L D"], table: Table) -> tuple[Heads, Heads, Heads]:
        """Returns queries, keys (both normalised and rotated) and values."""
        if self.fused:
            width = x.shape[-1]
            parts = self.qkv.split(x, [width, 2 * width])
        else:
            parts = [to(x) for to in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (rearrange(part, "B L (N K) -> B L N K", N=self.heads) for part in parts)
        return *self.norm(q, k, table), v


class MLP(nnx.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.in_layer = Linear(width, hidden, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.out_layer = Linear(hidden, width, ("mlp", "embed"), dtype=dtype, rngs=rngs)

    def gated(self, x: Float[Array, "B L D"], gate: Float[Array, "B 1 D"]) -> Float[Array, "B L D"]:
        """Returns the result times a gate."""
        return self.out_layer.gated([gelu(self.in_layer(x))], gate)


class Modulation(nnx.Module):
    """Returns `parts` vectors (shift, scale, gate, ...) made from the conditioning vector."""

    def __init__(self, width: int, parts: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.parts = parts
        self.lin = Linear(width, parts * width, dtype=dtype, rngs=rngs)

    def __call__(self, vec: Float[Array, "B D"]) -> list[Float[Array, "B 1 D"]]:
        return jnp.split(replicated(self.lin(jax.nn.silu(vec)))[:, None], self.parts, axis=-1)


def modulate(x: Float[Array, "B L D"], shift: Array, scale: Array) -> Float[Array, "B L D"]:
    """Returns the normalised `x`, scaled and shifted."""
    return replicated(scaled(standardize(x), 1 + scale) + shift)


class DoubleStreamBlock(nnx.Module):
    """Text and video keep weights of their own and meet in one attention."""

    def __init__(self, config: MMDiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.mlp_size
        self.img_mod = Modulation(width, 6, dtype=dtype, rngs=rngs)
        self.img_attn = StreamAttention(config, dtype=dtype, rngs=rngs)
        self.img_mlp = MLP(width, hidden, dtype=dtype, rngs=rngs)
        self.txt_mod = Modulation(width, 6, dtype=dtype, rngs=rngs)
        self.txt_attn = StreamAttention(config, dtype=dtype, rngs=rngs)
        self.txt_mlp = MLP(width, hidden, dtype=dtype, rngs=rngs)

    def __call__(
        self, streams: tuple[Array, Array], vec: Array, table: Table, shared: SharedTokens | None = None
    ) -> tuple[Array, Array]:
        img, txt = streams
        img_shift, img_scale, img_gate, *img_rest = self.img_mod(vec)
        txt_shift, txt_scale, txt_gate, *txt_rest = self.txt_mod(vec)
        txt_table, img_table = zip(*(jnp.split(part, [txt.shape[1]], axis=-2) for part in table), strict=True)
        img_qkv = self.img_attn.project(modulate(img, img_shift, img_scale), img_table)
        txt_qkv = self.txt_attn.project(modulate(txt, txt_shift, txt_scale), txt_table)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True))  # text first
        joint = attend(q, k, v, shared)
        joint = rearrange(joint, "B L N K -> B L (N K)")
        seen_txt, seen_img = joint[:, : txt.shape[1]], joint[:, txt.shape[1] :]
        img = self._finish(img, self.img_attn.proj.gated([seen_img], img_gate), self.img_mlp, img_rest)
        txt = self._finish(txt, self.txt_attn.proj.gated([seen_txt], txt_gate), self.txt_mlp, txt_rest)
        return img, txt

    @staticmethod
    def _finish(x: Array, update: Array, mlp: MLP, modulation: list[Array]) -> Array:
        shift, scale, gate = modulation
        x = replicated(x + update)
        return replicated(x + mlp.gated(modulate(x, shift, scale), gate))


class SingleStreamBlock(nnx.Module):
    """Attention and feed-forward side by side on the joint sequence, with one projection in and one out.

    Source: parallel layers of ViT-22B (Dehghani et al. 2023, arXiv:2302.05442), as in Flux.
    """

    def __init__(self, config: MMDiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        width, hidden, linear = config.hidden_size, config.mlp_size, partial(Linear, dtype=dtype, rngs=rngs)
        self.modulation = Modulation(width, 3, dtype=dtype, rngs=rngs)
        if config.fused_qkv:
            self.linear1 = linear(width, 3 * width + hidden, ("embed", "heads"))
        else:
            self.q_proj = linear(width, width, ("embed", "heads"))
            self.k_proj = linear(width, width, ("embed", "heads"))
            self.v_mlp = linear(width, width + hidden, ("embed", "heads"))
        self.linear2 = linear(width + hidden, width, ("mlp", "embed"))
        self.norm = QKNorm(config, rngs=rngs)

    def _project(self, x: Array) -> list[Array]:
        width = self.config.hidden_size
        if self.config.fused_qkv:
            return self.linear1.split(x, [width, 2 * width, 3 * width])
        return [self.q_proj(x), self.k_proj(x), *self.v_mlp.split(x, [width])]

    def __call__(
        self, x: Float[Array, "B L D"], vec: Array, table: Table, shared: SharedTokens | None = None
    ) -> Float[Array, "B L D"]:
        shift, scale, gate = self.modulation(vec)
        *qkv, mlp = self._project(modulate(x, shift, scale))
        q, k, v = (rearrange(part, "B L (N K) -> B L N K", N=self.config.num_heads) for part in qkv)
        seen = rearrange(attend(*self.norm(q, k, table), v, shared), "B L N K -> B L (N K)")
        return replicated(x + self.linear2.gated([seen, gelu(mlp)], gate))


class LastLayer(nnx.Module):
    """Adaptive norm and projection to token channels; zero at the start, so training begins at velocity 0."""

    def __init__(self, width: int, out_channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(width, out_channels, ("embed", None), kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.adaLN_modulation = Modulation(width, 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], vec: Float[Array, "B D"]) -> Float[Array, "B L C"]:
        return self.linear(modulate(x, *self.adaLN_modulation(vec)))


class MMDiT(nnx.Module):
    """The denoiser: noisy latent, time and text to the velocity of the flow."""

    def __init__(self, config: MMDiTConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        width = config.hidden_size
        embedder = partial(MLPEmbedder, width=width, dtype=dtype, rngs=rngs)
        self.img_in = Linear(config.in_channels, width, (None, "embed"), dtype=dtype, rngs=rngs)
        self.time_in = embedder(TIME_FEATURES)
        self.vector_in = embedder(config.vec_in_dim)
        self.guidance_in = embedder(TIME_FEATURES) if config.guidance_embed else None
        self.cond_in = (
            Linear(config.condition_channels, width, (None, "embed"), kernel_init=zeros, dtype=dtype, rngs=rngs)
            if config.cond_embed
            else None
        )
        self.txt_in = Linear(config.context_in_dim, width, (None, "embed"), dtype=dtype, rngs=rngs)
        remat_double, remat_single = config.grad_ckpt_settings
        self.double_blocks = Stack(
            lambda rngs: DoubleStreamBlock(config, dtype=dtype, rngs=rngs),
            config.depth,
            remat=remat_double,
            policy=config.remat_policy,
            rngs=rngs,
        )
        self.single_blocks = Stack(
            lambda rngs: SingleStreamBlock(config, dtype=dtype, rngs=rngs),
            config.depth_single_blocks,
            remat=remat_single,
            policy=config.remat_policy,
            rngs=rngs,
        )
        self.final_layer = LastLayer(width, config.in_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T H W C"],
        t: Float[Array, "B"],
        text: Float[Array, "B S E"],
        pooled: Float[Array, "B P"],
        condition: Float[Array, "B T H W M"] | None = None,
        guidance: Float[Array, "B"] | None = None,
    ) -> Float[Array, "B T H W C"]:
        """Returns the velocity, in float32.

        `t` is in [0, 1] with 1 = noise. `condition` is the mask (1 channel) and the masked latent (C channels); None
        means no condition. `guidance` is the distilled guidance scale, for models with that embedding.
        """
        B, T, H, W, _ = x.shape
        patch, S = self.config.patch_size, text.shape[1]
        if H % patch or W % patch:
            raise ValueError(f"A patch of {patch} needs a latent height and width divisible by it: got {H}x{W}.")
        grid = (T, H // patch, W // patch)
        tokens = None
        if self.cond_in is not None:
            if condition is None:
                condition = jnp.zeros((B, T, H, W, 1 + self.config.latent_channels), x.dtype)
            tokens = patchify(condition, patch)
        ids = np.concatenate([np.zeros((S, 3), np.int64), grid_ids(grid)])
        velocity = self.tokens(patchify(x, patch), jnp.asarray(ids), text, t, pooled, tokens, guidance)
        return unpatchify(velocity, grid, patch).astype(jnp.float32)

    def tokens(
        self,
        img: Float[Array, "B I C"],
        ids: Num[Array, "*B L 3"],
        txt: Float[Array, "B S E"],
        t: Float[Array, "B"],
        pooled: Float[Array, "B P"],
        condition: Float[Array, "B I M"] | None,
        guidance: Float[Array, "B"] | None,
    ) -> Float[Array, "B I C"]:
        """Returns the velocity of every video token; `ids` are (t, h, w) of text and then video tokens."""
        txt_ids, img_ids = jnp.split(ids, [txt.shape[1]], axis=-2)
        return per_device(MMDiT._tokens, self, (txt, txt_ids), (img, img_ids, condition), (t, pooled, guidance))

    def _tokens(self, text: tuple, video: tuple, samples: tuple, shared: SharedTokens | None) -> Float[Array, "B I C"]:
        (txt, txt_ids), (img, img_ids, condition), (t, pooled, guidance) = text, video, samples
        img, txt, vec = self.embed(img, txt, t, pooled, condition, guidance)
        ids = jnp.concatenate([txt_ids, img_ids], axis=-2)
        table = rope_table(ids, self.config.axes_dim, float(self.config.theta))
        img, txt = self.double_blocks((img, txt), vec, table, shared)
        joint = self.single_blocks(jnp.concatenate([txt, img], axis=1), vec, table, shared)
        return self.final_layer(joint[:, txt.shape[1] :], vec)

    def embed(
        self, img: Array, txt: Array, t: Array, pooled: Array, condition: Array | None, guidance: Array | None
    ) -> tuple[Float[Array, "B I D"], Float[Array, "B S D"], Float[Array, "B D"]]:
        """Returns video tokens, text tokens and the conditioning vector at model width."""
        img = self.img_in(img)
        if self.cond_in is not None:
            if condition is None:
                raise ValueError("A model with cond_embed needs a condition; zeros mean text to video.")
            img = img + self.cond_in(condition)
        vec = self.time_in(timestep_embedding(t.astype(self.dtype), TIME_FEATURES))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("A model with guidance_embed needs a guidance scale per sample.")
            vec = vec + self.guidance_in(timestep_embedding(guidance.astype(self.dtype), TIME_FEATURES))
        return img, self.txt_in(txt), vec + self.vector_in(pooled)
