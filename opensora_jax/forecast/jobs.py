"""From a config to jobs: one for each line of `bucket_config`, or for each program of sampling."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.config.stages import stage_names
from opensora_jax.data.plan.auto import auto_lines, with_ones
from opensora_jax.data.plan.buckets import Bucket, Buckets
from opensora_jax.forecast import programs
from opensora_jax.forecast.job import Job
from opensora_jax.forecast.topology import Topology
from opensora_jax.inference.prompt import PUBLISHED, TextEncoderConfig, read_shape
from opensora_jax.inference.stage import image_option
from opensora_jax.models.clip import CLIPTextConfig
from opensora_jax.models.t5 import T5Config
from opensora_jax.parallel.mesh import MeshConfig, make_mesh

Line = tuple[str, int]  # resolution, frames
PUBLISHED_TEXT: dict[str, T5Config | CLIPTextConfig] = {  # google/t5-v1_1-xxl, openai/clip-vit-large-patch14
    "t5": T5Config(32128, 4096, 64, 10240, 24, 64, "gated-gelu"),
    "clip": CLIPTextConfig(49408, 768, 3072, 12, 12, 77, 2),
}


@dataclass(frozen=True)
class Wanted:
    """A job, and how often a whole unit of work runs it: 1 for a training step; for a video its steps and chunks."""

    job: Job
    times: int


@dataclass(frozen=True)
class Group:
    """Jobs that belong together: a training step alone, or all that makes a batch of videos."""

    title: str
    wanted: tuple[Wanted, ...]
    videos: int = 0  # of a group that samples
    is_image: bool = False  # its videos have one frame


def parse_lines(given: Sequence[str]) -> list[Line]:
    """Returns lines of a bucket_config written "768px,129". Raises: UserError for what is none."""
    found = []
    for text in given:
        parsed = re.fullmatch(r"\s*([^,\s]+)\s*,\s*(\d+)\s*", text)
        if parsed is None:
            raise UserError(f"--buckets takes a resolution and frames, as in --buckets=768px,129: got {text!r}")
        found.append((parsed[1], int(parsed[2])))
    return found


def make_groups(config: ConfigDict, topology: Topology, lines: Sequence[Line], options: dict[str, Any]) -> list[Group]:
    """Returns what to forecast for a config; `lines` narrows it down, or, of sampling, names other sizes.

    Raises: UserError for configs and lines that do not fit, and for a mesh that does not fit the topology.
    """
    if "stages" in config:
        found = [
            replace(group, title=f"{name}, {group.title}")
            for name in stage_names(config)
            for group in _training(config[name], topology, options, f"config.{name}")
        ]
        return _narrowed(found, lines)
    if "bucket_config" in config and "flow" in config:
        return _narrowed(list(_training(config, topology, options, "config")), lines)
    if "sampling_option" in config:
        return list(_sampling(config, topology, lines, options))
    raise UserError("plan takes configs of configs/diffusion/train and configs/diffusion/inference: this is neither")


def _training(config: ConfigDict, topology: Topology, options: dict[str, Any], where: str) -> Iterator[Group]:
    values = config.to_dict()
    sections = build(programs.TrainSections, picked(values, programs.TrainSections), where)
    mesh = sizes_on(sections.mesh, topology)
    for bucket in largest_buckets(sections):
        subject = asdict(bucket)
        kept = picked(values, programs.TrainSections) | {"bucket_config": {}, "mesh": mesh}
        title = f"{bucket.resolution} {bucket.aspect_ratio}, {_frames(bucket.num_frames)} of {_size(bucket)}"
        job = Job("train", title, str(topology), kept, subject, options)
        yield Group(title, (Wanted(job, 1),))


def largest_buckets(sections: programs.TrainSections) -> list[Bucket]:
    """Returns of every line of the bucket_config the bucket with the most pixels; "auto" counts as 1 sample."""
    pixels = sections.dataset
    every = Buckets(with_ones(sections.bucket_config), spatial_unit=pixels.spatial_unit, fps_max=pixels.fps_max).buckets
    found: dict[Line, Bucket] = {}
    for bucket in every:
        line = bucket.resolution, bucket.num_frames
        if line not in found or bucket.height * bucket.width > found[line].height * found[line].width:
            found[line] = bucket
    return list(found.values())


def has_auto(config: ConfigDict) -> bool:
    """Returns whether lines leave their batch size to the memory, in a config or in one of its stages."""
    if "stages" in config:
        return any(has_auto(config[name]) for name in stage_names(config))
    return "bucket_config" in config and bool(auto_lines(config.bucket_config.to_dict()))


def _sampling(
    config: ConfigDict, topology: Topology, lines: Sequence[Line], options: dict[str, Any]
) -> Iterator[Group]:
    values = config.to_dict()
    build(programs.SampleSections, picked(values, programs.SampleSections) | {"text_networks": {}}, "config")
    every: list[Line | None] = [*lines] or [None]
    for line in every:
        for name, part in _sampling_parts(values, line):
            sections = build(programs.SampleSections, part, "config")
            part = part | {"mesh": sizes_on(sections.mesh, topology)}
            option = sections.sampling_option
            size = option.resolution or f"{option.height}x{option.width}"
            title = f"{name}{size} {option.aspect_ratio or ''}".strip() + f", {_frames(option.num_frames)}"
            branches = programs.sampling_steps(sections)
            wanted = [
                Wanted(Job("sample", f"step with {' + '.join(b)}", str(topology), part, list(b), options), count)
                for b, count in branches.items()
            ]
            chunks = -(-sections.batch_size // min(sections.decode_batch_size, sections.batch_size))
            wanted.append(Wanted(Job("decode", "decode", str(topology), part, None, options), chunks))
            yield Group(title, tuple(wanted), sections.batch_size, option.num_frames == 1)


def _sampling_parts(values: dict[str, Any], line: Line | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the sections of what makes the images that videos begin with, where a config has that, and the videos."""
    with_images = values.get("use_t2i2v") and (line is None or line[1] > 1)
    if with_images and values["cond_type"] != "i2v_head":
        raise UserError(f"use_t2i2v makes the first frame: cond_type is i2v_head then: got {values['cond_type']!r}")
    if line is not None:
        size = {"resolution": line[0], "num_frames": line[1], "height": None, "width": None}
        size["aspect_ratio"] = values["sampling_option"].get("aspect_ratio") or "16:9"
        values = values | {"sampling_option": values["sampling_option"] | size}
        if line[1] == 1:
            values = values | {"cond_type": "t2v"}
    part = picked(values, programs.SampleSections) | {"text_networks": text_networks(values)}
    if with_images:
        option = build(programs.SampleSections, part, "config").sampling_option
        denoiser, autoencoder, resolution = (values.get(f"img_{name}") for name in ("flux", "flux_ae", "resolution"))
        if denoiser is None or autoencoder is None or resolution is None:
            raise UserError("use_t2i2v needs config.img_flux, config.img_flux_ae and config.img_resolution")
        image = asdict(image_option(option, resolution))
        networks = {"model": denoiser, "ae": autoencoder}
        yield "image, ", part | networks | {"sampling_option": image, "cond_type": "t2v"}
        yield "video, ", part
    else:
        yield "", part


def text_networks(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns kind -> fields of the text encoders: those in their folders, or published ones that are not there yet.

    Raises: UserError for a config that lacks one.
    """
    found = {}
    for kind in PUBLISHED_TEXT:
        config = build(TextEncoderConfig, values.get(kind) or {}, f"config.{kind}")
        if Path(config.from_pretrained).is_dir():
            found[kind] = asdict(read_shape(kind, config))
        elif Path(config.from_pretrained).name == Path(PUBLISHED[kind]).name:
            found[kind] = asdict(PUBLISHED_TEXT[kind])
    return found


def missing_text_encoders(config: ConfigDict) -> dict[str, str]:
    """Returns kind -> folder of the text encoders of a config that samples which nothing is known of."""
    if "sampling_option" not in config or "flow" in config:
        return {}
    known = text_networks(config.to_dict())
    return {kind: config[kind].from_pretrained for kind in PUBLISHED_TEXT if kind not in known}


def picked(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Returns the sections of a config that a dataclass names, and of those it takes a part of that part."""
    partial = {
        "dataset": programs.Pixels,
        "encode": programs.Stored,
        "loop": programs.Length,
        "t5": programs.TextLength,
    }
    found = {}
    for name in (field.name for field in fields(cls) if field.name in values):
        section = values[name]
        if name in partial and isinstance(section, Mapping):
            section = {field.name: section[field.name] for field in fields(partial[name]) if field.name in section}
        found[name] = section
    return found


def sizes_on(config: MeshConfig, topology: Topology) -> dict[str, Any]:
    """Returns the fields of a mesh on a topology, none of them -1. Raises: UserError for one that does not fit it."""
    sizes, count = list(config.sizes), topology.devices
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
        known = count
    if min(sizes) < 1 or known != count:
        make_mesh(config, jax.devices()[:1] * count)  # says what is wrong
    return dict(zip(("data", "fsdp", "seq", "tensor"), sizes, strict=True)) | {"seq_method": config.seq_method}


def _narrowed(groups: list[Group], lines: Sequence[Line]) -> list[Group]:
    if not lines:
        return groups
    subjects = [(group, group.wanted[0].job.subject) for group in groups]
    known = {(subject["resolution"], subject["num_frames"]) for _, subject in subjects}
    for line in lines:
        if line not in known:
            there = "; ".join(f"{name},{frames}" for name, frames in sorted(known))
            raise UserError(f"--buckets={line[0]},{line[1]} is no line of bucket_config: there are {there}")
    return [group for group, subject in subjects if (subject["resolution"], subject["num_frames"]) in lines]


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _size(bucket: Bucket) -> str:
    return f"{bucket.height}x{bucket.width}"
