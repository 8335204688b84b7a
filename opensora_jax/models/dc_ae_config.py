"""What a DC-AE consists of: fields with the original's names and defaults, and the published network under its name.

Fields that no published network sets and that the original cannot run (a stage without blocks, a norm before the
latent, widths that do not match) are left out.
Source: hpcaitech/Open-Sora, `opensora/models/dc_ae/models/dc_ae.py` and `ae_model_zoo.py`.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, TypeVar

from opensora_jax.models.sizes import check_least
from opensora_jax.nn.conv3d import Triple
from opensora_jax.nn.efficient_vit import HEAD_SIZE
from opensora_jax.nn.tiling import Tiling

T = TypeVar("T")
Norm = Literal["rms2d", "rms3d", "ln2d"] | None
Act = Literal["relu", "silu"]
BlockType = Literal["ResBlock", "EViT_GLU", "EViTS5_GLU"]
FOR_IMAGES: set[str | None] = {"ConvPixelUnshuffle", "ConvPixelShuffle", "rms2d", "ln2d"}


@dataclass(frozen=True)
class Stages:
    """What encoder and decoder share: stages from fine to coarse; norms, activations and types of all, or of each."""

    width_list: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    depth_list: tuple[int, ...] = (2, 2, 2, 2, 2, 2)
    block_type: BlockType | tuple[BlockType | tuple[BlockType, ...], ...] = "ResBlock"  # or of each block of a stage
    norm: Norm | tuple[Norm, ...] = "rms2d"
    act: Act | tuple[Act, ...] = "silu"
    is_video: bool = False

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norm of every stage."""
        return _spread(self.norm, len(self.width_list))

    @property
    def acts(self) -> tuple[Act, ...]:
        """The activation of every stage."""
        return _spread(self.act, len(self.width_list))

    @property
    def blocks(self) -> tuple[tuple[BlockType, ...], ...]:
        """The kind of every block of every stage."""
        given = self.block_type
        stages = given if isinstance(given, tuple) else (given,) * len(self.width_list)
        pairs = zip(stages, self.depth_list, strict=True)
        return tuple(stage if isinstance(stage, tuple) else (stage,) * depth for stage, depth in pairs)

    @property
    def rank(self) -> int:
        """How many axes convolutions see: with 2, every frame is an image."""
        return 3 if self.is_video else 2

    def check(self, in_time: tuple[bool, ...], norms: tuple[Norm, ...], resampling: str, shortcut: str | None) -> None:
        """Raises: ValueError for stages that do not fit each other, or parts for images in a network for videos."""
        stages = len(self.width_list)
        lengths = [len(self.depth_list), len(in_time)]
        lengths += [len(given) for given in (self.block_type, self.norm, self.act) if isinstance(given, tuple)]
        check_least(self, 1, "width_list")
        if set(lengths) != {stages}:
            raise ValueError(f"every list has one entry a stage: width_list has {stages}, others have {lengths}.")
        if min(self.depth_list) < 1 or [len(kinds) for kinds in self.blocks] != list(self.depth_list):
            raise ValueError(f"a stage has 1 block or more, and a type for each: got depths {self.depth_list}.")
        for width, kinds in zip(self.width_list, self.blocks, strict=True):
            if width < HEAD_SIZE and set(kinds) != {"ResBlock"}:
                raise ValueError(f"a stage with attention has a width of {HEAD_SIZE} or more: got {width}.")
        for fine, coarse in pairwise(self.width_list):
            if shortcut and 4 * fine % coarse:
                raise ValueError(f"a {shortcut} shortcut needs a width that divides 4 x {fine}: got {coarse}.")
        found = {*norms, resampling}
        if self.is_video and found & FOR_IMAGES:
            raise ValueError(f"is_video=True goes without {_listed(FOR_IMAGES)}: got {_listed(found & FOR_IMAGES)}.")
        if not self.is_video and ("rms3d" in found or any(in_time)):
            raise ValueError("is_video=False goes with norms rms2d or ln2d, and no changes in time.")


@dataclass(frozen=True)
class EncoderConfig(Stages):
    """After each stage but the last, rows and columns halve, and frames where `temporal_downsample` says so."""

    downsample_block_type: Literal["Conv", "ConvPixelUnshuffle"] = "ConvPixelUnshuffle"
    downsample_shortcut: Literal["averaging"] | None = "averaging"
    out_shortcut: Literal["averaging"] | None = "averaging"
    temporal_downsample: tuple[bool, ...] = ()

    def __post_init__(self):
        """Check what the layers rely on."""
        self.check(self.in_time, self.norms, self.downsample_block_type, self.downsample_shortcut)

    @property
    def in_time(self) -> tuple[bool, ...]:
        """Whether frames halve after each stage."""
        return self.temporal_downsample or (False,) * len(self.width_list)


@dataclass(frozen=True)
class DecoderConfig(Stages):
    """Before each stage but the last, with which it starts, rows and columns double, and frames where so flagged."""

    in_shortcut: Literal["duplicating"] | None = "duplicating"
    upsample_block_type: Literal["ConvPixelShuffle", "InterpolateConv"] = "ConvPixelShuffle"
    upsample_shortcut: Literal["duplicating"] | None = "duplicating"
    out_norm: Norm = "rms2d"
    out_act: Act = "relu"
    temporal_upsample: tuple[bool, ...] = ()

    def __post_init__(self):
        """Check what the layers rely on."""
        norms = (*self.norms, self.out_norm)
        self.check(self.in_time, norms, self.upsample_block_type, self.upsample_shortcut)

    @property
    def in_time(self) -> tuple[bool, ...]:
        """Whether frames double before each stage."""
        return self.temporal_upsample or (False,) * len(self.width_list)


def _spread(value: T | tuple[T, ...], count: int) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,) * count


def _listed(names: set[str | None]) -> str:
    return ", ".join(sorted(map(str, names)))


F32_BLOCKS: tuple[BlockType, ...] = ("ResBlock", "ResBlock", "ResBlock", "EViTS5_GLU", "EViTS5_GLU", "EViTS5_GLU")
F32_IN_TIME = (False, False, False, True, True, False)
PUBLISHED: dict[str, dict[str, Any]] = {
    "dc-ae-f32t4c128": {
        "latent_channels": 128,
        "time_compression_ratio": 4,
        "spatial_compression_ratio": 32,
        "encoder": EncoderConfig(
            depth_list=(2, 2, 2, 3, 3, 3),
            block_type=F32_BLOCKS,
            norm="rms3d",
            downsample_block_type="Conv",
            is_video=True,
            temporal_downsample=F32_IN_TIME,
        ),
        "decoder": DecoderConfig(
            depth_list=(3, 3, 3, 3, 3, 3),
            block_type=F32_BLOCKS,
            norm="rms3d",
            upsample_block_type="InterpolateConv",
            out_norm="rms3d",
            is_video=True,
            temporal_upsample=F32_IN_TIME,
        ),
    }
}


@dataclass(frozen=True)
class DCAEConfig:
    """A published network by `model_name`, or with None the one that the other fields describe.

    `encode` divides by `scaling_factor` and `decode` multiplies, None is 1; both work in tiles where tiling is used.
    """

    model_name: str | None
    in_channels: int = 3
    latent_channels: int = 32
    time_compression_ratio: int = 1
    spatial_compression_ratio: int = 32
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    scaling_factor: float | None = None
    from_scratch: bool = True
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    spatial_tile_size: int = 256
    temporal_tile_size: int = 32
    tile_overlap_factor: float = 0.25

    def __post_init__(self):
        """Fill in the published network, and check what the layers and tiling rely on."""
        if self.model_name is not None:
            self._fill_in(self.model_name)
        check_least(self, 1, "in_channels", "latent_channels", "time_compression_ratio", "spatial_compression_ratio")
        if not self.from_scratch:
            raise ValueError("from_scratch=False would look for weights by model_name: name them in from_pretrained.")
        if self.scaling_factor is not None and self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor is above 0, or None: got {self.scaling_factor}.")
        stages = len(self.encoder.width_list)
        if len(self.decoder.width_list) != stages or self.decoder.is_video != self.encoder.is_video:
            raise ValueError("encoder and decoder have equally many stages and the same is_video.")
        for part in (self.encoder, self.decoder):
            if self.strides != (2 ** sum(part.in_time[:-1]), 2 ** (stages - 1), 2 ** (stages - 1)):
                raise ValueError(
                    f"{stages} stages with {sum(part.in_time[:-1])} changes in time do not make a "
                    f"time_compression_ratio of {self.time_compression_ratio} and a spatial_compression_ratio of "
                    f"{self.spatial_compression_ratio}."
                )
        last = (self.encoder.out_shortcut, self.encoder.width_list), (self.decoder.in_shortcut, self.decoder.width_list)
        if any(shortcut and widths[-1] % self.latent_channels for shortcut, widths in last):
            raise ValueError(f"latent_channels divide the last widths around a shortcut: got {self.latent_channels}.")
        _ = self.tiling

    @property
    def strides(self) -> Triple:
        """Pixels (frames, rows, columns) for one latent position."""
        return self.time_compression_ratio, self.spatial_compression_ratio, self.spatial_compression_ratio

    @property
    def is_video(self) -> bool:
        """Whether convolutions and attention see time; else every frame is an image."""
        return self.encoder.is_video

    @property
    def tiling(self) -> Tiling:
        """How `encode` and `decode` cut; tiles of latents follow from those of pixels."""
        return Tiling(
            self.strides,
            is_causal=False,
            use_spatial_tiling=self.use_spatial_tiling,
            use_temporal_tiling=self.use_temporal_tiling,
            spatial_tile_size=self.spatial_tile_size,
            temporal_tile_size=self.temporal_tile_size,
            tile_overlap_factor=self.tile_overlap_factor,
        )

    def _fill_in(self, name: str) -> None:
        if name not in PUBLISHED:
            raise ValueError(f"model_name is one of {', '.join(PUBLISHED)}, or None: got {name!r}.")
        defaults = {field.name: field.default for field in fields(self)}
        for field, value in PUBLISHED[name].items():
            if getattr(self, field) not in (value, defaults[field]):
                raise ValueError(f"{name} has its own {field}: leave it out, or set model_name to None.")
            object.__setattr__(self, field, value)
