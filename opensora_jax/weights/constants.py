"""What published files hold beside parameters: buffers that follow from the config or from the network's definition.

We do not store them. A file that is exported has them all the same, since PyTorch's strict load wants every key.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.models.discriminator import DiscriminatorConfig
from opensora_jax.models.lpips import SCALE, SHIFT, LPIPSConfig
from opensora_jax.models.opensora_vae import OpenSoraVAEConfig

CONFIGS: dict[str, type] = {
    "opensora_vae": OpenSoraVAEConfig,
    "discriminator": DiscriminatorConfig,
    "lpips": LPIPSConfig,
}


def stored_constants(meta: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Returns the constants of a checkpoint's network, given its metadata: `type`, `model`, and what is `free` in it.

    Raises: UserError for metadata without a field that is needed.
    """
    config_class = CONFIGS.get(meta["type"])
    return {} if config_class is None else constants(build(config_class, meta["model"] | meta.get("free", {}), where))


def constants(config: Any) -> dict[str, np.ndarray]:
    """Returns published key -> value of the buffers of a network; counts of batches that were seen are 0."""
    if isinstance(config, OpenSoraVAEConfig):
        shape = (1, config.vae_temporal.embed_dim, 1, 1, 1)
        return {
            name: np.broadcast_to(np.asarray(value, np.float32).reshape(1, -1, 1, 1, 1), shape)
            for name, value in (("scale", config.scale), ("shift", config.shift))
        }
    if isinstance(config, DiscriminatorConfig):
        return {f"main.{4 * i - 1}.num_batches_tracked": np.zeros((), np.int64) for i in range(1, len(config.widths))}
    if isinstance(config, LPIPSConfig):
        values = {"shift": SHIFT, "scale": SCALE}
        return {
            f"scaling_layer.{name}": np.asarray(value, np.float32).reshape(1, 3, 1, 1) for name, value in values.items()
        }
    return {}


def check_constants(config: Any, checkpoint: Mapping[str, Any], where: str) -> None:
    """Raises: UserError for a file that normalises its latents otherwise than the config says."""
    if not isinstance(config, OpenSoraVAEConfig):
        return
    for name, ours in constants(config).items():
        if name not in checkpoint:
            continue
        theirs = np.asarray(checkpoint[name])
        if not np.array_equal(np.broadcast_to(theirs.reshape(1, -1, 1, 1, 1), ours.shape), ours.astype(theirs.dtype)):
            found = f"({', '.join(f'{value:.6g}' for value in theirs.ravel().tolist())})"
            raise UserError(
                f"{where}.{name} is {getattr(config, name)} and the file has {found}: set --{where}.{name}={found!r}, "
                "or use other weights"
            )
