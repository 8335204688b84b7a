"""Small random text encoders with tokenizers learnt from the captions at hand: nothing has to be downloaded.

Frozen random networks tell the captions of a small data set apart, provided that the pooled vector is
standardised per dimension: raw, it is nearly the same for all of them, and a prototype of the demo then moved
its shapes in the right direction in 25-46% of the samples only.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.inference.prompt import TextEncoderConfig, load_encoder
from opensora_jax.models.clip import CLIPTextConfig
from opensora_jax.models.t5 import T5Config
from opensora_jax.weights.files import save_safetensors
from opensora_jax.weights.pretrained import TEXT_ENCODERS
from opensora_jax.weights.rename import published_shapes

WIDTH, LAYERS, HEADS = 64, 2, 4
VOCABULARY = 4096  # at most; 256 of them are single bytes, so that any text has tokens
FARTHEST_NULL = 6.0  # bound on |pooled vector of ""|, in standard deviations of the captions
SMALLEST_DEVIATION = 0.1  # what varies less among the captions is not blown up for prompts that do vary there
TABLES = ("shared.weight", "_embedding.weight", "relative_attention_bias.weight")
VERSION = 1


def write_local_encoders(folder: str | Path, captions: list[str], *, seed: int, text_length: int) -> Path:
    """Returns `folder` with `t5` and `clip` in it, Hugging Face folders for texts of `text_length` tokens.

    The result depends on the distinct captions, `seed` and `text_length` alone; a finished folder of the same
    three is left as it is, one of others is replaced. Raises: UserError without captions, for a `text_length`
    below 3, or for a folder that holds something else.
    """
    folder, captions = Path(folder), sorted(set(captions))
    if not captions:
        raise UserError("The text encoders need captions: got none. Give a table with at least one usable video.")
    if text_length < 3:
        raise UserError(f"text_length is at least 3 (start, one token, end): got {text_length}.")
    manifest = _manifest(captions, seed, text_length)
    if _is_finished(folder, manifest):
        return folder
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    _write_t5(unfinished / "t5", captions, seed, text_length)
    _write_clip(unfinished / "clip", captions, seed, text_length)
    write_json(unfinished / "manifest.json", manifest)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def _manifest(captions: list[str], seed: int, text_length: int) -> dict[str, str | int]:
    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    return {"version": VERSION, "captions": digest, "seed": seed, "text_length": text_length}


def _is_finished(folder: Path, manifest: dict[str, str | int]) -> bool:
    if not folder.exists():
        return False
    strange = {path.name for path in folder.iterdir()} - {"t5", "clip", "manifest.json"}
    if strange:
        raise UserError(f"{folder} holds something else ({min(strange)}); give an empty or new folder.")
    path = folder / "manifest.json"
    return path.is_file() and json.loads(path.read_text()) == manifest


def _write_t5(folder: Path, captions: list[str], seed: int, text_length: int) -> None:
    tokenizer = _learn_tokenizer(captions, ["<pad>", "</s>", "<unk>"], lowercase=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
    )
    _write_tokenizer(folder, tokenizer, roles, text_length)
    write_json(folder / "config.json", {"model_type": "t5"} | asdict(config))
    save_safetensors(folder / "model.safetensors", _random_weights("t5", config, seed))


def _write_clip(folder: Path, captions: list[str], seed: int, text_length: int) -> None:
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = _learn_tokenizer(captions, [start, end], lowercase=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
    )
    config = CLIPTextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=text_length,
        eos_token_id=1,
    )
    weights = _random_weights("clip", config, seed)
    # Start, end and positions add nothing of their own: so the empty text is the origin, near all captions.
    weights["text_model.embeddings.token_embedding.weight"][:2] = 0.0
    weights["text_model.embeddings.position_embedding.weight"][:] = 0.0
    _write_tokenizer(folder, tokenizer, {"bos_token": start, "eos_token": end, "pad_token": end}, text_length)
    write_json(folder / "config.json", {"model_type": "clip_text_model"} | asdict(config))
    save_safetensors(folder / "model.safetensors", weights)
    _calibrate(folder, weights, captions, text_length)


def _calibrate(folder: Path, weights: dict[str, np.ndarray], captions: list[str], text_length: int) -> None:
    """Rewrite the final norm: pooled vectors of the captions get mean 0 and deviation 1 in every dimension.

    Where the empty text, which text dropout and guidance use, would lie beyond `FARTHEST_NULL` deviations,
    a larger deviation is taken.
    """
    encoder = load_encoder("clip", TextEncoderConfig(str(folder), text_length), jnp.float32)
    null, *pooled = encoder.encode(["", *captions], batch_size=64)
    mean = np.mean(pooled, axis=0)
    deviation = np.maximum(np.std(pooled, axis=0), np.abs(null - mean) / FARTHEST_NULL)
    gain = 1.0 / np.maximum(deviation, SMALLEST_DEVIATION)
    weights["text_model.final_layer_norm.weight"] = gain
    weights["text_model.final_layer_norm.bias"] = -mean * gain
    save_safetensors(folder / "model.safetensors", weights)


def _random_weights(kind: str, config: T5Config | CLIPTextConfig, seed: int) -> dict[str, np.ndarray]:
    """Returns a published state dict: norms 1, biases 0, tables N(0, 1), matrices with torch's deviation."""
    abstract = nnx.eval_shape(lambda: TEXT_ENCODERS[kind][1](config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    weights = {}
    for key, shape in published_shapes(kind, nnx.state(abstract, nnx.Param)).items():
        if len(shape) == 1:
            value = np.full(shape, key.endswith(".weight"))
        else:
            deviation = 1.0 if key.endswith(TABLES) else (3 * shape[1]) ** -0.5
            value = deviation * rng.standard_normal(shape)
        weights[key] = value.astype(np.float32)
    return weights


def _learn_tokenizer(captions: list[str], special_tokens: list[str], *, lowercase: bool) -> Tokenizer:
    """Returns byte-level BPE: frequent words become one token, unseen ones pieces or single bytes."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, roles: dict[str, str], text_length: int) -> None:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text_length}
    write_json(folder / "tokenizer_config.json", fields | roles)
