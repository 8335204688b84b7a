"""A pair of networks and the option they sample with: checked from the config alone, told apart, then loaded.

Text to video is one stage. Text to image to video is two with the same text encoders: an image of each prompt,
then videos that begin with it. Checks come first, because loading 11B parameters takes minutes.
Source: Open-Sora 2.0, `scripts/diffusion/inference.py` and `opensora/utils/inference.py` (modify_option_to_t2i).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from opensora_jax.config.errors import UserError
from opensora_jax.inference import outputs
from opensora_jax.inference.pipeline import Pipeline, TextEncoder
from opensora_jax.inference.request import LatentGeometry, SamplingOption, check_condition, latent_shape
from opensora_jax.parallel.mesh import check_heads
from opensora_jax.weights.pretrained import AUTOENCODERS, DENOISERS, find_weights, load, parse_model

IMAGE_GUIDANCE = 4.0  # of the distilled text-to-image model


class Network(NamedTuple):
    """A section of the config and what the user calls it, such as "model"."""

    name: str
    section: dict[str, Any]

    @property
    def where(self) -> str:
        """Returns the section's name in messages."""
        return f"config.{self.name}"


@dataclass(frozen=True)
class Stage:
    """A denoiser, its autoencoder, and what they are to do with every prompt."""

    denoiser: Network
    autoencoder: Network
    option: SamplingOption
    cond_type: str

    def check(self) -> LatentGeometry:
        """Returns the autoencoder without its weights, all that could be wrong with the config having been checked.

        Raises: UserError for networks that are unknown or do not fit each other, and for sizes, frame counts and
        conditions that they cannot take.
        """
        check_condition(self.option, self.cond_type)
        _, denoiser = parse_model(self.denoiser.section, DENOISERS, self.denoiser.where)
        module, config = parse_model(self.autoencoder.section, AUTOENCODERS, self.autoencoder.where)
        autoencoder: Any = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
        channels = autoencoder.latent_channels * denoiser.patch_size**2
        if denoiser.in_channels != channels:
            raise UserError(
                f"{self.denoiser.where}.in_channels is {denoiser.in_channels}, but the latents of "
                f"{self.autoencoder.where} need {channels}: set --{self.denoiser.where}.in_channels={channels}, "
                "or use the autoencoder that the model was trained with"
            )
        if self.cond_type != "t2v" and not denoiser.cond_embed:
            raise UserError(
                f"cond_type {self.cond_type} needs a model that sees references: {self.denoiser.where}.cond_embed is "
                "False. Use t2v, or another model."
            )
        latent_shape(self.option, self.cond_type, autoencoder, denoiser.patch_size)
        return autoencoder

    def check_weights(self) -> None:
        """Raises: UserError unless there is a file or folder where each network has its weights."""
        for network in (self.denoiser, self.autoencoder):
            find_weights(network.section.get("from_pretrained"), network.where)

    def check_text(self, width: int, pooled_width: int) -> None:
        """Raises: UserError unless the denoiser takes text embeddings of these widths."""
        _, denoiser = parse_model(self.denoiser.section, DENOISERS, self.denoiser.where)
        for field, found, encoder in (("context_in_dim", width, "t5"), ("vec_in_dim", pooled_width, "clip")):
            if getattr(denoiser, field) != found:
                raise UserError(
                    f"{self.denoiser.where}.{field} is {getattr(denoiser, field)}, but config.{encoder} gives {found}: "
                    "use the text encoders that the model was trained with"
                )

    def check_heads(self, mesh: Mesh) -> None:
        """Raises: UserError unless the mesh can split the denoiser's attention heads as it has to."""
        _, denoiser = parse_model(self.denoiser.section, DENOISERS, self.denoiser.where)
        check_heads(denoiser.num_heads, mesh)

    def settings(self, **shared: Any) -> dict[str, Any]:
        """Returns what a sample depends on besides its request; `shared` holds the sections of the text encoders."""
        sections = {self.denoiser.name: self.denoiser.section, self.autoencoder.name: self.autoencoder.section}
        sections |= shared
        return {
            "cond_type": self.cond_type,
            "sampling_option": asdict(self.option) | {"seed": None},  # each request has its own
            "sections": sections,
            "weights": {
                f"{name}.{field}": outputs.weights_identity(section[field])
                for name, section in sections.items()
                for field in ("from_pretrained", "adapter")
                if section.get(field)
            },
        }

    def load(self, encode_text: TextEncoder, mesh: Mesh, dtype: DTypeLike, batch_sizes: tuple[int, int]) -> Pipeline:
        """Returns the pipeline, its networks' weights on the mesh. Raises: UserError for weights that do not fit."""
        sections = ((self.autoencoder, AUTOENCODERS), (self.denoiser, DENOISERS))  # the small one first
        autoencoder, denoiser = (
            load(network.section, kinds, network.where, dtype=dtype, mesh=mesh) for network, kinds in sections
        )
        return Pipeline(denoiser, autoencoder, encode_text, mesh, *batch_sizes)


def image_option(option: SamplingOption, resolution: str) -> SamplingOption:
    """Returns the option of the images that videos begin with: one frame of the same shape, distilled guidance.

    Raises: UserError for a size in pixels, which has no shape to keep.
    """
    if option.aspect_ratio is None:
        raise UserError(
            "use_t2i2v needs sampling_option.resolution and aspect_ratio, which its image shares: got height and width"
        )
    return replace(
        option,
        resolution=resolution,
        num_frames=1,
        method="distill",
        guidance=IMAGE_GUIDANCE,
        guidance_img=None,  # this and the rest say nothing to a distilled model
        text_osci=False,
        image_osci=False,
        scale_temporal_osci=False,
        training_sizes=True,  # as the original does
    )
