"""Prompts to what the denoiser reads: T5 embeddings per token and CLIP's pooled vector.

Both encoders come from local folders in Hugging Face's layout, the published ones as well as the small ones
that `inference.local_encoders` makes.
Source: hpcaitech/Open-Sora, `opensora/models/text/conditioner.py` (HFEmbedder).
"""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from opensora_jax.config.errors import UserError
from opensora_jax.models.clip import CLIPTextConfig
from opensora_jax.models.t5 import T5Config
from opensora_jax.parallel.batch import to_host
from opensora_jax.parallel.mesh import one_device
from opensora_jax.parallel.rules import param_shardings
from opensora_jax.weights.files import open_checkpoint, read_config
from opensora_jax.weights.params import load_params
from opensora_jax.weights.pretrained import TEXT_ENCODERS

PUBLISHED = {"t5": "google/t5-v1_1-xxl", "clip": "openai/clip-vit-large-patch14"}
READ_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")  # config, tokenizer, weights
VOCABULARIES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))  # any of these


@dataclass(frozen=True)
class TextEncoderConfig:
    """A config's `t5` or `clip` section: a local folder, and the tokens to which texts are padded or cut."""

    from_pretrained: str
    max_length: int

    def __post_init__(self):
        """Refuse lengths that leave no room for a token and the end mark."""
        if self.max_length < 2:
            raise ValueError(f"max_length is at least 2: got {self.max_length}")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a text encoder's folder; it may be called from many threads."""

    max_length: int
    model: Callable[..., Any]
    lock: threading.Lock

    @classmethod
    def load(cls, config: TextEncoderConfig) -> "Tokenizer":
        """Returns the one that a config names. Raises: UserError when its files cannot be read."""
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it advises to install torch
        from transformers import AutoTokenizer  # a second of import that only encoding needs

        folder = Path(config.from_pretrained)
        try:
            _check_vocabulary(folder)
            model = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} has no tokenizer that can be read ({reason}); download it again.") from error
        return cls(config.max_length, model, threading.Lock())

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "B S"]:
        """Returns ids, cut to and padded to `max_length`."""
        with self.lock:  # it sets its padding at every call
            rows = self.model(list(texts), truncation=True, max_length=self.max_length, padding="max_length")
        return np.asarray(rows["input_ids"], np.int32)


@dataclass(frozen=True)
class Tokenizers:
    """What turns a caption into the ids of both encoders, in the loader's threads."""

    t5: Tokenizer
    clip: Tokenizer

    def __call__(self, text: str) -> dict[str, Int[np.ndarray, " S"]]:
        """Returns `t5_ids` and `clip_ids`."""
        return {"t5_ids": self.t5([text])[0], "clip_ids": self.clip([text])[0]}


@dataclass(frozen=True)
class TextEncoder:
    """One frozen encoder with its tokenizer; `forward(params, ids)` is compiled once per batch size."""

    tokenizer: Tokenizer
    params: nnx.State
    forward: Callable[[nnx.State, Array], Array]

    def encode(self, texts: Sequence[str], batch_size: int) -> Float[np.ndarray, "B ..."]:
        """Returns the outputs in float32, computed `batch_size` texts at a time."""
        ids = self.tokenizer(texts)
        padded = np.resize(ids, (-(-len(ids) // batch_size) * batch_size, ids.shape[1]))
        batches = jnp.split(jnp.asarray(padded), len(padded) // batch_size)
        return np.concatenate([to_host(self.forward(self.params, batch)) for batch in batches])[: len(ids)]


class TextEncoders:
    """T5 and CLIP together; texts are encoded in batches of one size, so that each compiles once."""

    def __init__(self, t5: TextEncoder, clip: TextEncoder, *, batch_size: int = 8):
        self.t5, self.clip, self.batch_size = t5, clip, batch_size

    @classmethod
    def load(
        cls, t5: TextEncoderConfig, clip: TextEncoderConfig, dtype: DTypeLike, mesh: Mesh | None = None
    ) -> "TextEncoders":
        """Returns both encoders read from their folders. Raises: UserError, see `load_encoder`."""
        return cls(load_encoder("t5", t5, dtype, mesh), load_encoder("clip", clip, dtype, mesh))

    def encode(self, texts: Sequence[str]) -> tuple[Float[Array, "B S D"], Float[Array, "B P"]]:
        """Returns (token embeddings, pooled vectors) in float32; S is T5's `max_length`."""
        tokens, pooled = (encoder.encode(texts, self.batch_size) for encoder in (self.t5, self.clip))
        return jnp.asarray(tokens), jnp.asarray(pooled)


def encoders_identity(t5: TextEncoderConfig, clip: TextEncoderConfig, dtype: DTypeLike) -> str:
    """Returns a hash of all that the outputs of both depend on: weights, configs, tokenizers, lengths, dtype.

    Files are read, nothing is loaded. Raises: UserError, see `load_encoder`.
    """
    parts = [jnp.dtype(dtype).name]
    for kind, config in ("t5", t5), ("clip", clip):
        read_shape(kind, config)
        parts += [str(config.max_length), *_file_hashes(Path(config.from_pretrained))]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def load_encoder(kind: str, config: TextEncoderConfig, dtype: DTypeLike, mesh: Mesh | None = None) -> TextEncoder:
    """Returns the "t5" or "clip" encoder of a folder, its weights held in `dtype`, in which it also computes.

    With a mesh its weights are split over it, else they lie on one device.

    Raises: UserError for a folder that is missing or incomplete, or a `max_length` beyond CLIP's positions.
    """
    shape, folder = read_shape(kind, config), Path(config.from_pretrained)
    tokenizer = Tokenizer.load(config)  # before the weights, which take minutes
    _, module = TEXT_ENCODERS[kind]
    abstract = nnx.eval_shape(lambda: module(shape, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract)
    shardings = param_shardings(params, mesh or one_device())
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), params, shardings)
    params = load_params(kind, open_checkpoint(folder), params)
    return TextEncoder(tokenizer, params, _forward(kind, graphdef))


def read_shape(kind: str, config: TextEncoderConfig) -> T5Config | CLIPTextConfig:
    """Returns the network of the "t5" or "clip" encoder in a folder, from its `config.json` alone.

    Raises: UserError, see `load_encoder`.
    """
    folder = Path(config.from_pretrained)
    if not folder.is_dir():
        raise UserError(
            f"{kind}.from_pretrained: there is no folder {folder}; download {PUBLISHED[kind]} into it, "
            "or make small encoders with `python -m opensora_jax.dataset text`."
        )
    config_class, _ = TEXT_ENCODERS[kind]
    shape: T5Config | CLIPTextConfig = read_config(folder, config_class)
    if isinstance(shape, CLIPTextConfig) and config.max_length > shape.max_position_embeddings:
        longest = shape.max_position_embeddings
        raise UserError(f"clip.max_length is at most {longest} for {folder}: got {config.max_length}; use {longest}.")
    return shape


def _check_vocabulary(folder: Path) -> None:
    """Raises: OSError for a folder without one; transformers would make a tokenizer that knows no word."""
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        raise OSError(f"it lacks {', or '.join(' and '.join(names) for names in VOCABULARIES)}")


def _forward(kind: str, graphdef: nnx.GraphDef) -> Callable[[nnx.State, Array], Array]:
    @jax.jit
    def forward(params: nnx.State, ids: Array) -> Array:
        output = nnx.merge(graphdef, params)(ids)
        return (output[1] if kind == "clip" else output).astype(jnp.float32)

    return forward


def _file_hashes(folder: Path) -> list[str]:
    hashes = []
    for path in sorted({path for pattern in READ_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            hashes.append(f"{path.name} {hashlib.file_digest(file, 'blake2b').hexdigest()}")
    return hashes
