"""The encoder half of T5 v1.1, whose token embeddings are the text that the denoiser attends to.

Open-Sora runs it without a mask: padding is attended to and its outputs are kept, so none is applied here.
Source: Raffel et al. 2020 (arXiv 1910.10683), gated GELU of Shazeer 2020; names as in `google/t5-v1_1-xxl`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from opensora_jax.kernels.attention import attention
from opensora_jax.nn.linear import Embedding, Linear
from opensora_jax.nn.norm import RMSNorm
from opensora_jax.nn.stack import Stack


@dataclass(frozen=True)
class T5Config:
    """Field names of a Hugging Face `config.json`; the defaults are those that such a file may leave out."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    feed_forward_proj: str
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        """Refuse the T5 of version 1.0, which has another feed-forward layer."""
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(f"T5 needs feed_forward_proj 'gated-gelu' (v1.1): got {self.feed_forward_proj!r}.")

    @property
    def width(self) -> int:
        """Channels of a token embedding."""
        return self.d_model


class T5Encoder(nnx.Module):
    """Token ids to one embedding per token, padding included."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        self.relative_attention_bias = Embedding(
            config.relative_attention_num_buckets, config.num_heads, dtype=dtype, rngs=rngs
        )
        self.block = Stack(lambda rngs: T5Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs=rngs)
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, rngs=rngs)

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        buckets = relative_position_buckets(
            ids.shape[1],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        bias = rearrange(self.relative_attention_bias(jnp.asarray(buckets)), "L S N -> 1 N L S")
        return self.final_layer_norm(self.block(self.shared(ids), bias))


class T5Block(nnx.Module):
    """Self-attention, then the gated feed-forward layer, each on normed input and with a residual."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention = T5Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward = T5FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], bias: Float[Array, "1 N S S"]) -> Float[Array, "B S D"]:
        x = x + self.attention(x, bias)
        return x + self.feed_forward(x)


class T5Attention(nnx.Module):
    """Attention with a learnt bias per distance and without scaling of the logits."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.layer_norm = RMSNorm(width, eps=config.layer_norm_epsilon, rngs=rngs)
        self.q = Linear(width, inner, ("embed", "heads"), bias=False, dtype=dtype, rngs=rngs)
        self.k = Linear(width, inner, ("embed", "heads"), bias=False, dtype=dtype, rngs=rngs)
        self.v = Linear(width, inner, ("embed", "heads"), bias=False, dtype=dtype, rngs=rngs)
        self.o = Linear(inner, width, ("heads", "embed"), bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], bias: Float[Array, "1 N S S"]) -> Float[Array, "B S D"]:
        x = self.layer_norm(x)
        q, k, v = (rearrange(to(x), "B S (N K) -> B S N K", N=self.heads) for to in (self.q, self.k, self.v))
        return self.o(rearrange(attention(q, k, v, bias=bias, scale=1.0), "B S N K -> B S (N K)"))


class T5FeedForward(nnx.Module):
    """GELU (tanh form) of one projection times another, projected back."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, rngs=rngs)
        self.wi_0 = Linear(config.d_model, config.d_ff, ("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs)
        self.wi_1 = Linear(config.d_model, config.d_ff, ("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, ("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = self.layer_norm(x)
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "L S"]:
    """Returns the bucket of every (query, key) pair: keys after the query use the upper half of the buckets.

    In each half the nearest distances have a bucket each; the others share buckets whose width grows with the
    logarithm, and everything from `max_distance` on falls into the last one.
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    growth = np.log(np.maximum(distance, exact).astype(np.float32) / exact) / math.log(max_distance / exact)
    shared = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    return np.where(distance < exact, distance, shared) + half * (offset > 0)
