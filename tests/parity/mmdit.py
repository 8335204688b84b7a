"""MMDiT cases: the whole network with intermediate values and gradients, its embeddings and its single layers."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from opensora_jax.models.mmdit import MLP, LastLayer, MMDiT, MMDiTConfig, Modulation, gelu
from opensora_jax.nn.embed import MLPEmbedder, timestep_embedding
from opensora_jax.nn.norm import RMSNorm, standardize
from opensora_jax.nn.rope import rope_table, rotate_half, rotate_pairs
from opensora_jax.nn.stack import Stack
from opensora_jax.weights.params import export_params, load_params
from tests.parity.golden import Golden, Tolerance, absolute, beyond_bfloat16, bfloat16_steps, relative_l2

OUTPUT = Tolerance(1e-4)
GRADIENT = Tolerance(5e-4)
BFLOAT16 = Tolerance(1.5e-2, relative_l2)  # 0.9e-2 on a CPU; 5e-2 if 1000 t were not rounded
LAYER = Tolerance(1e-5)
TABLE = Tolerance(2e-5, absolute)

DEFAULTS = {"cond_embed": False, "fused_qkv": True, "use_liger_rope": False, "patch_size": 2}  # the original's
RECOMPUTED = (1, 100)  # one double block and all single blocks: rematerialisation changes no number
NO_SHAPE = {"from_pretrained", "cache_dir", "type", "grad_ckpt_settings", "remat_policy"}


class Network(NamedTuple):
    """A model split into its structure, one object for each file and config, and its parameters."""

    config: MMDiTConfig
    graphdef: nnx.GraphDef
    params: nnx.State


def config_of(fields: dict[str, Any]) -> MMDiTConfig:
    """Returns the config of a json, with the original's defaults."""
    known = DEFAULTS | {name: value for name, value in fields.items() if name not in NO_SHAPE}
    known |= {"axes_dim": tuple(known["axes_dim"]), "grad_ckpt_settings": RECOMPUTED, "remat_policy": "full"}
    return MMDiTConfig(**known)


def load(golden: Golden, config: str = "config") -> Network:
    """Returns the network of a case; cases that share weights share it, and so what is compiled for it."""
    path, _ = golden.params()
    return _load(path, json.dumps(golden.about[config]), golden.about["dtype"])


@cache
def _load(path: Path, fields: str, dtype: str) -> Network:
    config = config_of(json.loads(fields))
    return build(config, Golden(path.with_suffix(".json"), ()).part("param/"), dtype)


def build(config: MMDiTConfig, weights: dict[str, np.ndarray], dtype: str) -> Network:
    """Returns a network that computes in `dtype` with published weights."""
    abstract = nnx.eval_shape(lambda: MMDiT(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(abstract)
    return Network(config, graphdef, load_params("mmdit", weights, shapes))


def network(golden: Golden) -> None:
    """Drive `mmdit_*`: output, intermediate values, loss mean(output^2) and its gradients."""
    net = load(golden)
    inputs = {name: jnp.asarray(value) for name, value in golden.part("in/").items()}
    found, gradients = _run(net.graphdef, net.params, inputs, bool(golden.part("grad/")))
    if golden.about["dtype"] == "bfloat16":
        golden.compare("out/output", found["out/output"], BFLOAT16)
    golden.compare_found(found, OUTPUT)
    if gradients is not None:
        exported = export_params("mmdit", gradients)
        norm = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in exported.values()))
        golden.compare_found({"out/grad_global_norm": norm}, OUTPUT)
        golden.compare_found({f"grad/{name}": value for name, value in exported.items()}, GRADIENT)


def tokens(model: MMDiT, inputs: dict[str, Array]) -> Array:
    """Returns the velocity of every token for the inputs of a case."""
    names = ("img", "txt", "timesteps", "y_vec", "cond", "guidance")
    img, txt, t, pooled, condition, guidance = (inputs.get(name) for name in names)
    ids = jnp.concatenate([inputs["txt_ids"], inputs["img_ids"]], axis=1)
    return model.tokens(img, ids, txt, t, pooled, condition, guidance)


def _run(graphdef: nnx.GraphDef, params: nnx.State, inputs: dict[str, Array], with_gradients: bool):
    """Returns what the network computes and, if wanted, the gradients of the loss."""

    def measure(params):
        output = tokens(nnx.merge(graphdef, params), inputs)
        return jnp.mean(output.astype(jnp.float32) ** 2), output

    @jax.jit
    def run(params):
        inner = _intermediates(nnx.merge(graphdef, params), inputs)
        if not with_gradients:
            (loss, output), gradients = measure(params), None
        else:
            (loss, output), gradients = jax.value_and_grad(measure, has_aux=True)(params)
        return {"out/output": output, "out/loss": loss} | inner, gradients

    return run(params)


def _intermediates(model: MMDiT, inputs: dict[str, Array]) -> dict[str, Array]:
    names = ("img", "txt", "timesteps", "y_vec", "cond", "guidance")
    img, txt, vec = model.embed(*(inputs.get(name) for name in names))
    ids = jnp.concatenate([inputs["txt_ids"], inputs["img_ids"]], axis=1)
    table = rope_table(ids, model.config.axes_dim, float(model.config.theta))
    found = {"out/img_embedded": img, "out/vec": vec} | _rope(table)
    double_img, double_txt = first(model.double_blocks)((img, txt), vec, table)
    img, txt = model.double_blocks((img, txt), vec, table)
    single = first(model.single_blocks)(jnp.concatenate([txt, img], axis=1), vec, table)
    return found | {"out/double0_img": double_img, "out/double0_txt": double_txt, "out/single0": single}


def first(stack: Stack) -> Any:
    """Returns the first block of a stack."""
    graphdef, layers = nnx.split(stack.blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], layers))


def _rope(table: tuple[Array, Array]) -> dict[str, Array]:
    """Returns the table in the original's two forms: one rotation matrix a pair, and both halves of a head."""
    cos, sin = table
    matrices = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    halves = {f"out/pe_{name}": jnp.concatenate([part, part], -1) for name, part in (("cos", cos), ("sin", sin))}
    return {"out/pe": matrices[:, None]} | halves


def embeddings(golden: Golden) -> None:
    """Drive `mmdit_embeddings`: sinusoids of time, and both rotary layouts on given positions."""
    inputs = golden.part("in/")
    for name in [name for name in golden.values if name.startswith("out/timestep_embedding_")]:
        _sinusoids(golden, name, inputs["t"])
    table = rope_table(jnp.asarray(inputs["ids"]), tuple(golden.about["axes_dim"]), golden.about["theta"])
    found = {name.replace("pe_", ""): value for name, value in _rope(table).items()}
    found["out/pe_interleaved"] = found.pop("out/pe")
    for name, rotate in (("liger", rotate_half), ("interleaved", rotate_pairs)):
        for side in ("q", "k"):
            turned = rotate(jnp.asarray(rearrange(inputs[side], "B N L K -> B L N K")), table)
            found[f"out/{side}_{name}"] = rearrange(turned, "B L N K -> B N L K")
    golden.compare_found(found, TABLE)


def _sinusoids(golden: Golden, name: str, t: np.ndarray) -> None:
    """Compare one width of the embedding; an ulp in a frequency counts 1000 t times, so limits follow the time."""
    size, _, kind = name.removeprefix("out/timestep_embedding_").partition("_")
    ours = timestep_embedding(jnp.asarray(t, jnp.bfloat16 if kind == "bf16in" else jnp.float32), int(size))
    theirs, measure = golden.take(name), beyond_bfloat16 if kind == "bf16in" else absolute
    for rows, limit, label in ((t <= 1, 1.5e-4, "t <= 1"), (t > 1, 1.5e-3, "t > 1")):
        golden.check(f"{name}, {label}", np.asarray(ours)[rows], theirs[rows], Tolerance(limit, measure))


def small_layers(golden: Golden) -> None:
    """Drive `mmdit_small_layers`: each layer on its own, on inputs that are large or near its epsilon."""
    inputs = {name: jnp.asarray(value) for name, value in golden.part("in/").items()}
    scales = sorted({match[1] for name in golden.values if (match := re.search(r"_scale([\d.e-]+)$", name))})
    graphdef, params = nnx.split(_layers(golden.part("param/")))
    run = jax.jit(lambda params, inputs: _run_layers(nnx.merge(graphdef, params), inputs, scales))
    found = run(params, inputs)
    golden.compare("out/rms_bf16", found["out/rms_bf16"], Tolerance(1, bfloat16_steps))
    golden.compare_found(found, LAYER)


def _run_layers(layers: nnx.Dict, inputs: dict[str, Array], scales: list[str]) -> dict[str, Array]:
    y, open_gate = inputs["y"], jnp.ones_like(inputs["y"][:, :1])
    found = {"emb": layers.emb(inputs["e"]), "mlp": layers.img_mlp.gated(y, open_gate)}
    found |= {"gelu_tanh": gelu(inputs["lin"]), "silu": jax.nn.silu(inputs["lin"])}
    parts = [f"mod{i}_{part}" for i in (1, 2) for part in ("shift", "scale", "gate")]
    found |= dict(zip(parts, layers.mod(inputs["vec"]), strict=True))
    rms = layers.norm.query_norm
    for scale in scales:
        y = inputs["y"] * float(scale)
        found |= {f"layernorm_scale{scale}": standardize(y), f"last_scale{scale}": layers.last(y, inputs["vec"])}
        found[f"rms_scale{scale}"] = rms(inputs["x"] * float(scale))
    found["rms_bf16"] = rms(inputs["x_bf16"])
    return {f"out/{name}": value for name, value in found.items()}


def _layers(weights: dict[str, np.ndarray]) -> nnx.Dict:
    """Returns the layers of the case, under names that the rename table knows."""
    widths = {name: value.shape for name, value in weights.items()}
    width, features = widths["emb/in_layer.weight"]
    hidden, outputs = widths["mlp/0.weight"][0], widths["last/linear.weight"][0]

    def make():
        kinds = {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        return nnx.Dict(
            emb=MLPEmbedder(features, width, **kinds),
            img_mlp=MLP(width, hidden, **kinds),
            mod=Modulation(width, 6, **kinds),
            last=LastLayer(width, outputs, **kinds),
            norm=nnx.Dict(query_norm=RMSNorm(*widths["rms/scale"], rngs=nnx.Rngs(0))),
        )

    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    places = {"mlp/": "img_mlp.", "rms/": "norm.query_norm.", "/": "."}
    published = {}
    for name, value in weights.items():
        old = next(old for old in places if old in name)
        published[name.replace(old, places[old])] = value
    return nnx.merge(graphdef, load_params("mmdit", published, shapes))
