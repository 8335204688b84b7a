"""Our Hunyuan autoencoder at full width beside that of diffusers on PyTorch, in one process.

    pip install -e ".[bench]" && python benchmarks/autoencoder.py

Both hold the same weights and do the same work in turn, in float32; the table shows the median of each and the largest
difference of the results. The extra `bench` has torch and diffusers, which nothing else here needs.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from flax import nnx

from benchmarks.in_turn import median_seconds
from opensora_jax.config.flag import load_config
from opensora_jax.models.hunyuan_vae import HunyuanVAE
from opensora_jax.weights.params import load_params
from opensora_jax.weights.pretrained import AUTOENCODERS, parse_model

CONFIG = "configs/diffusion/inference/256px.py"


def theirs() -> AutoencoderKLHunyuanVideo:
    """Returns the peer with random weights, at its default width, which is that of the published weights."""
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo().eval()


def ours(peer: AutoencoderKLHunyuanVideo) -> HunyuanVAE:
    """Returns our autoencoder with the peer's weights; their names agree."""
    section = load_config(CONFIG).ae.to_dict() | {"scale_factor": 1.0, "use_spatial_tiling": False}
    _, config = parse_model(section, AUTOENCODERS, "config.ae")
    graph, shapes = nnx.split(nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, load_params("hunyuan_vae", {k: v.numpy() for k, v in peer.state_dict().items()}, shapes))


def work(peer: AutoencoderKLHunyuanVideo) -> dict[str, tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]]:
    """Returns name -> (ours, theirs), functions that do the work and return the result, channels last."""
    graph, params = nnx.split(ours(peer))
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 9, 64, 64, 3)).astype(np.float32)
    latent = rng.standard_normal((1, 3, 8, 8, 16)).astype(np.float32)
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x))
    decode = jax.jit(lambda params, z: nnx.merge(graph, params).decode(z))

    def in_torch(run: Callable, x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.moveaxis(run(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy(), 1, -1)

    return {
        "encode 1x9x64x64x3": (
            lambda: np.asarray(encode(params, jnp.asarray(video))),
            lambda: in_torch(lambda x: peer.encode(x).latent_dist.mode(), video),
        ),
        "decode 1x3x8x8x16": (
            lambda: np.asarray(decode(params, jnp.asarray(latent))),
            lambda: in_torch(lambda z: peer.decode(z).sample, latent),
        ),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; ours uses all cores of the machine")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}, {given.threads} threads")
    print(f"{'work':<22}{'ours s':>10}{'theirs s':>10}{'ratio':>8}{'difference':>12}")
    for name, runs in work(theirs()).items():
        results = [run() for run in runs]
        mine, peers = median_seconds(runs, given.runs)
        apart = np.abs(results[0] - results[1]).max() / np.abs(results[1]).max()
        print(f"{name:<22}{mine:>10.3f}{peers:>10.3f}{mine / peers:>8.2f}{apart:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
