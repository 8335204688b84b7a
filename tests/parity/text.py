"""Text encoders: T5, which attends to padding, and CLIP with both meanings of its end token."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.models.clip import CLIPText, CLIPTextConfig
from opensora_jax.models.t5 import T5Config, T5Encoder
from opensora_jax.weights.params import load_params
from tests.parity.golden import Golden, Tolerance

ENCODER = Tolerance(2e-5)
PAD = 0  # T5's padding id


def _load(kind: str, module: type[nnx.Module], golden: Golden, config: object) -> Callable[[np.ndarray], Any]:
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    params = load_params(kind, golden.params()[1], shapes)
    run = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))
    return lambda ids: run(params, jnp.asarray(ids, jnp.int32))


def t5(golden: Golden) -> None:
    """Drive `text_t5*`; the original may lengthen the ids, so that text and video tokens together are aligned."""
    encode = _load("t5", T5Encoder, golden, T5Config(**golden.about["config"]))
    ids = golden.part("in/")["input_ids"]
    plain = np.asarray(encode(ids))
    golden.compare("out/last_hidden_state", plain, ENCODER)
    for name in sorted(golden.left):
        if aligned := re.fullmatch(r"out/(\w+)_added(\d+)_align(\d+)", name):
            what, added, multiple = aligned[1], int(aligned[2]), int(aligned[3])
            longer = np.pad(ids, ((0, 0), (0, -(added + ids.shape[1]) % multiple)), constant_values=PAD)
            output = np.asarray(encode(longer))
            stored = output[:, :: _stored_stride(golden)]
            golden.compare(name, output.shape if what == "shape" else stored, ENCODER)
        elif name.endswith("_attention_mask_NOT_used"):
            rows = len(golden.values[name])
            assert (ids[:rows] == PAD).any(), "a mask matters only where there is padding"
            golden.differs(name, plain[:rows], Tolerance(100 * ENCODER.limit))


def _stored_stride(golden: Golden) -> int:
    """Returns every how many positions of the lengthened output are stored."""
    stride = re.search(r"every (\d+)\w\w position stored", golden.about["remarks"])
    return int(stride[1]) if stride else 1


def clip(golden: Golden) -> None:
    """Drive `text_clip_*`: hidden states and the pooled one."""
    encode = _load("clip", CLIPText, golden, CLIPTextConfig(**golden.about["config"]))
    hidden, pooled = encode(golden.part("in/")["input_ids"])
    golden.compare("out/last_hidden_state", hidden, ENCODER)
    golden.compare("out/pooler_output", pooled, ENCODER)
