"""What judges reconstructions: LPIPS, the discriminator, and the loss of autoencoders made of terms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.models.discriminator import Discriminator, DiscriminatorConfig
from opensora_jax.models.lpips import LPIPS, PLACES, LPIPSConfig, to_vgg
from opensora_jax.models.posterior import Posterior
from opensora_jax.training.vae import VAELossConfig, measure
from opensora_jax.weights.params import export_params, load_params
from opensora_jax.weights.rename import published_shapes
from tests.parity.golden import Golden, Tolerance, channels_first, channels_last

DISTANCE, DISTANCE_GRADIENT = Tolerance(1e-4), Tolerance(1e-4)
LOGITS, LOGITS_GRADIENT = Tolerance(2e-5), Tolerance(1e-4)
LOSS, LOSS_GRADIENT = Tolerance(1e-5), Tolerance(1e-4)
LOGGED = {"recon": "l1", "perceptual": "perceptual"}  # their name of a loss: our term


def lpips_small(golden: Golden) -> None:
    """Drive `lpips_small*`: the distance, its parts and the features below them."""
    graphdef, params = _load_lpips(golden, LPIPSConfig(tuple(golden.about["config"]["widths"])))
    x, y = _images(golden)
    _compare_distances(golden, graphdef, params, x, y)
    distance = jax.jit(lambda params, x, y: nnx.merge(graphdef, params)(x, y))
    golden.compare("out/value_old_path", _column(distance(params, x, y)), DISTANCE)
    golden.compare("out/value_xx", _column(distance(params, x, x)))
    golden.compare("out/scaled_x", channels_first(to_vgg(x))[0].swapaxes(0, 1), DISTANCE)
    for i, features in enumerate(jax.jit(lambda params, x: _features(nnx.merge(graphdef, params), x))(params, x)):
        stored = golden.values[f"out/feat{i}_x"].shape[1]  # so many channels
        golden.compare(f"out/feat{i}_x", np.moveaxis(features[0], -1, 1)[:, :stored], DISTANCE)


def lpips_full(golden: Golden) -> None:
    """Drive `lpips_full_seeded*`: VGG16 at full width, its weights drawn by the scheme that the json states."""
    config = LPIPSConfig()
    shapes = nnx.state(nnx.eval_shape(lambda: LPIPS(config, rngs=nnx.Rngs(0))))
    weights = _seeded(published_shapes("lpips", shapes), golden.about["config"]["weight_seed"])
    sums = np.array([value.sum(dtype=np.float64) for value in weights.values()])
    golden.compare("out/check_weight_sums", sums, Tolerance(1e-6))
    _compare_distances(golden, *_load_lpips(golden, config, weights), *_images(golden))


def _seeded(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Returns a state dict in the order of the original: convolutions by place, weight before bias, then distances."""
    convs = [f"net.slice{i + 1}.{place}" for i, places in enumerate(PLACES) for place in places]
    order = [f"{conv}.{leaf}" for conv in convs for leaf in ("weight", "bias")]
    order += [f"lin{i}.model.1.weight" for i in range(len(PLACES))]
    rng, weights = np.random.default_rng(seed), {}
    for key in order:
        drawn, fan_in = rng.standard_normal(shapes[key]), np.prod(shapes[key][1:])
        if key.startswith("lin"):
            value = np.abs(drawn) / fan_in
        else:
            value = drawn * 0.05 if key.endswith("bias") else drawn * np.sqrt(2 / fan_in)
        weights[key] = value.astype(np.float32)
    return weights


def _load_lpips(
    golden: Golden, config: LPIPSConfig, weights: dict[str, np.ndarray] | None = None, prefix: str = ""
) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: LPIPS(config, rngs=nnx.Rngs(0))))
    given = golden.params()[1] if weights is None else weights
    found = {key.removeprefix(prefix): _wide(value) for key, value in given.items() if key.startswith(prefix)}
    return graphdef, load_params("lpips", found, shapes)


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)  # stored in float16


def _images(golden: Golden) -> tuple[Array, Array]:
    """Returns x and y as frames of one video."""
    inputs = golden.part("in/")
    return jnp.asarray(np.moveaxis(inputs["x"], 1, -1)[None]), jnp.asarray(np.moveaxis(inputs["y"], 1, -1)[None])


def _column(distance: Array) -> np.ndarray:
    return np.asarray(distance).reshape(-1, 1, 1, 1)


def _compare_distances(golden: Golden, graphdef: nnx.GraphDef, params: nnx.State, x: Array, y: Array) -> None:
    @jax.jit
    def run(params, x, y):
        def total(y):
            parts = nnx.merge(graphdef, params).distances(x, y)
            return sum(parts).sum(), (sum(parts), parts)

        return jax.value_and_grad(total, has_aux=True)(y)

    (_, (value, parts)), by_y = run(params, x, y)
    golden.compare("out/value", _column(value), DISTANCE)
    for i, part in enumerate(parts):
        golden.compare(f"out/layer{i}_avg", _column(part), DISTANCE)
    golden.compare("grad/__input_y", np.moveaxis(by_y[0], -1, 1), DISTANCE_GRADIENT)


def _features(model: LPIPS, x: Array) -> list[Array]:
    found, x = [], to_vgg(x)
    for i in range(len(PLACES)):
        found.append(x := model.net.slice(i, x))
    return found


def discriminator(golden: Golden) -> None:
    """Drive `discriminator*`: with running statistics, with those of the batch, and with given dropouts."""
    config = DiscriminatorConfig(**golden.about["config"]["model"])
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Discriminator(config, rngs=nnx.Rngs(0))))
    state = load_params("discriminator", {key: _wide(value) for key, value in golden.params()[1].items()}, shapes)
    inputs = golden.part("in/")
    x, kept = channels_last(inputs["x"]), [name for name in inputs if name.startswith("dropout_keep.")]
    masks = [channels_last(inputs[f"dropout_keep.{i}"]).astype(bool) for i in range(len(kept))]
    drawn = nnx.merge(graphdef, state).draw_masks(jax.random.key(0), x.shape)
    golden.check("shapes of masks", [list(m.shape) for m in drawn], [list(m.shape) for m in masks])

    graphdef, params, stats = nnx.split(nnx.merge(graphdef, state), nnx.Param, nnx.BatchStat)
    run = partial(_run_discriminator, golden, graphdef, params)
    run("eval", lambda model, x: (model(x), stats), x, stats)
    after = run("train_nodrop", lambda model, x: model.in_training(x, None), x, stats)
    _compare_statistics(golden, "after1", after)
    again = run(None, lambda model, x: model.in_training(x, None), 0.5 * x + 0.1, after)
    _compare_statistics(golden, "after2", again)
    run("train_drop", lambda model, x: model.in_training(x, masks), x, stats)


def _run_discriminator(
    golden: Golden, graphdef: nnx.GraphDef, params: nnx.State, mode: str | None, call: Any, x: Array, stats: nnx.State
) -> nnx.State:
    """Compare the logits of a mode and the gradients of mean(logits^2); returns the statistics after it."""

    @jax.jit
    def run(params, stats, x):
        def loss(params, x):
            logits, after = call(nnx.merge(graphdef, params, stats), x)
            return jnp.mean(logits**2), (logits, after)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (by_params, by_x), (logits, after) = run(params, stats, x)
    if mode is not None:
        golden.compare(f"out/{mode}_logits", channels_first(logits), LOGITS)
        found = export_params("discriminator", by_params) | {"__input_x": channels_first(by_x)}
        golden.compare_found({f"grad/{mode}:{key}": value for key, value in found.items()}, LOGITS_GRADIENT)
    return after


def _compare_statistics(golden: Golden, label: str, statistics: nnx.State) -> None:
    found = export_params("discriminator", statistics)
    golden.compare_found({f"out/{label}:{key}": value for key, value in found.items()}, LOGITS)


def vae_loss(golden: Golden) -> None:
    """Drive `vae_loss*`: every variant's terms, and gradients of their sum."""
    config = golden.about["config"]
    graphdef, params = _load_lpips(golden, LPIPSConfig(tuple(config["widths"])), prefix="lpips.")
    lpips = nnx.merge(graphdef, params)
    inputs = {name: channels_last(value) for name, value in golden.part("in/").items()}
    for name, variant in config["variants"].items():
        _compare_variant(golden, name, variant, lpips, inputs)


def _compare_variant(
    golden: Golden, name: str, variant: dict[str, Any], lpips: LPIPS, inputs: dict[str, Array]
) -> None:
    weights = {field: float(variant[field]) for field in ("perceptual_loss_weight", "kl_loss_weight", "logvar_init")}
    config = VAELossConfig(l1_loss_weight=1.0, l2_loss_weight=0.0, reduction="sum", **weights)
    video = inputs["video"]

    def terms(recon: Array, logvar: Array, moments: Array):
        posterior = _posterior(variant["posterior"], moments)
        nll, kl, metrics = measure(config, video, recon, posterior, lpips, logvar)
        found = {"nll_loss": nll, "kl_loss": jnp.asarray(kl)}
        found |= {f"{name}_loss": metrics[term] * video[0, 0].size for name, term in LOGGED.items()}
        return nll + kl, found

    arguments = (inputs["recon"], jnp.asarray(config.logvar_init), inputs["moments"])
    (_, found), gradients = jax.jit(jax.value_and_grad(terms, argnums=(0, 1, 2), has_aux=True))(*arguments)
    for term, value in found.items():
        golden.compare(f"out/{name}.{term}", value, LOSS)
    by_recon, by_logvar, by_moments = gradients
    found = {"__recon": channels_first(by_recon), "__logvar": by_logvar, "__moments": channels_first(by_moments)}
    golden.compare_found({f"grad/{name}.{key}": value for key, value in found.items()}, LOSS_GRADIENT)


def _posterior(kind: str, moments: Array) -> Posterior | None:
    """Returns the posterior of a variant: of clips, of frames, or none."""
    if kind.startswith("flux"):
        moments = moments.reshape(-1, *moments.shape[2:])
    return None if kind == "none" else Posterior.of(moments)
