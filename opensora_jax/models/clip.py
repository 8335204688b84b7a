"""The text tower of CLIP, whose pooled vector modulates every block of the denoiser.

Its projection into the space shared with images is not used, so it is not here.
Source: Radford et al. 2021 (arXiv 2103.00020); names as in `openai/clip-vit-large-patch14`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from opensora_jax.kernels.attention import attention
from opensora_jax.models.sizes import check_least
from opensora_jax.nn.linear import Embedding, Linear
from opensora_jax.nn.norm import LayerNorm
from opensora_jax.nn.stack import Stack


@dataclass(frozen=True)
class CLIPTextConfig:
    """Field names of a Hugging Face `config.json`; the defaults are those that such a file may leave out."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    eos_token_id: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        """Check what the layers below rely on."""
        check_least(self, 1, "vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")
        if self.hidden_act != "quick_gelu":
            raise ValueError(f"CLIP needs hidden_act 'quick_gelu': got {self.hidden_act!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "CLIP needs a hidden_size divisible by num_attention_heads: "
                f"got {self.hidden_size} and {self.num_attention_heads}."
            )

    @property
    def width(self) -> int:
        """Channels of the pooled vector."""
        return self.hidden_size


class CLIPText(nnx.Module):
    """Token ids to the hidden states and to the one at the end of the text."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.token_embedding = Embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.layers = Stack(lambda rngs: CLIPBlock(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, rngs=rngs)
        self.final_layer_norm = LayerNorm(width, eps=config.layer_norm_eps, rngs=rngs)

    def __call__(self, ids: Int[Array, "B S"]) -> tuple[Float[Array, "B S D"], Float[Array, "B D"]]:
        """Returns (hidden states, pooled), both after the final norm."""
        positions = jnp.arange(ids.shape[1])
        causal = (positions[:, None] >= positions[None, :])[None, None]
        x = self.token_embedding(ids) + self.position_embedding(positions)
        x = self.final_layer_norm(self.layers(x, causal))
        return x, x[jnp.arange(len(ids)), end_of_text(ids, self.config.eos_token_id)]


class CLIPBlock(nnx.Module):
    """Causal self-attention, then a feed-forward layer, each on normed input and with a residual."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.self_attn = CLIPAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.mlp = CLIPFeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], causal: Bool[Array, "1 1 S S"]) -> Float[Array, "B S D"]:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nnx.Module):
    """Four projections with biases around one attention call."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = Linear(width, width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k_proj = Linear(width, width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v_proj = Linear(width, width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out_proj = Linear(width, width, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], causal: Bool[Array, "1 1 S S"]) -> Float[Array, "B S D"]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rearrange(to(x), "B S (N K) -> B S N K", N=self.heads) for to in projections)
        return self.out_proj(rearrange(attention(q, k, v, mask=causal), "B S N K -> B S (N K)"))


class CLIPFeedForward(nnx.Module):
    """Two dense layers around x * sigmoid(1.702 x), CLIP's cheap approximation of GELU."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, ("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = self.fc1(x)
        return self.fc2(x * jax.nn.sigmoid(1.702 * x))


def end_of_text(ids: Int[Array, "B S"], eos_token_id: int) -> Int[Array, "B"]:
    """Returns the position of the first end token of each row.

    An `eos_token_id` of 2, as in OpenAI's published configs, is not the id in use: there the end token is the
    largest id of the vocabulary, so the first largest id of the row is meant.
    """
    return jnp.argmax(ids if eos_token_id == 2 else ids == eos_token_id, axis=-1)
