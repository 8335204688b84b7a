"""Samples: `python -m opensora_jax.sample --config=configs/diffusion/inference/demo.py --prompt="..."`.

Prompts come from --prompt (repeatable), --prompts (a text file, one a line) or config.dataset.data_path (a
table with a `text` column). Each becomes `<index>_<words>.mp4` in config.save_dir, with its record beside it;
samples.json and contact_sheet.png cover the whole run. Videos that are there already, from the same settings
and weights, are kept. On several hosts all run the same command; the first of them writes.
"""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from opensora_jax.config.build import build
from opensora_jax.config.command import run
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.config.flag import config_flag
from opensora_jax.data.text import add_fps, add_motion_score
from opensora_jax.inference import outputs, prompt_list
from opensora_jax.inference.contact_sheet import FRAMES, write_contact_sheet
from opensora_jax.inference.pipeline import TextEncoder, check_batch_sizes
from opensora_jax.inference.prompt import TextEncoderConfig, TextEncoders, read_shape
from opensora_jax.inference.references import check_references
from opensora_jax.inference.request import Request, SamplingOption, slug
from opensora_jax.inference.stage import Network, Stage, image_option
from opensora_jax.parallel.distributed import DistributedConfig, connect, from_first
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights.pretrained import parse_dtype

SHEET_VIDEOS = 48  # more do not fit a picture that one can look at
MOTION_SCORES = range(1, 16)  # what the original asks for


@dataclass(frozen=True)
class DatasetConfig:
    """Where prompts come from when no flag gives them."""

    data_path: str | None


@dataclass(frozen=True)
class SampleConfig:
    """A config of configs/diffusion/inference; names are the original's."""

    folder: str
    save_dir: Path
    batch_size: int  # videos denoised together
    decode_batch_size: int  # videos decoded together
    dtype: str
    cond_type: str
    dataset: DatasetConfig
    start_index: int
    num_samples: int | None  # prompts used, from start_index on; None for all
    num_sample: int  # videos for each prompt, with seeds one apart
    sampling_option: SamplingOption
    add_fps_to_text: bool
    motion_score: str | None
    fps_save: float
    mesh: MeshConfig
    distributed: DistributedConfig
    model: dict[str, Any]  # type, where its weights are, and the fields of that type
    ae: dict[str, Any]
    t5: TextEncoderConfig
    clip: TextEncoderConfig
    use_t2i2v: bool  # first an image of each prompt, by img_flux, then a video that begins with it
    img_flux: dict[str, Any] | None
    img_flux_ae: dict[str, Any] | None
    img_resolution: str | None

    def __post_init__(self):
        """Check what no other section knows."""
        score, scores = self.motion_score, [str(score) for score in MOTION_SCORES]
        if score is not None and score not in scores:
            raise ValueError(f"motion_score is a whole number from {scores[0]} to {scores[-1]}, or None: got {score!r}")
        if self.num_sample < 1 or self.fps_save <= 0:
            raise ValueError(
                f"num_sample is at least 1 and fps_save above 0: got {self.num_sample} and {self.fps_save}"
            )
        if self.use_t2i2v and None in (self.img_flux, self.img_flux_ae, self.img_resolution):
            raise ValueError(
                "use_t2i2v needs img_flux, img_flux_ae and img_resolution: start from "
                "configs/diffusion/inference/t2i2v_256px.py"
            )
        if self.use_t2i2v and self.cond_type != "i2v_head":
            raise ValueError(f"use_t2i2v makes the first frame: cond_type is i2v_head then: got {self.cond_type!r}")

    @property
    def video_stage(self) -> Stage:
        """Returns what makes the videos."""
        return Stage(Network("model", self.model), Network("ae", self.ae), self.sampling_option, self.cond_type)

    @property
    def image_stage(self) -> Stage | None:
        """Returns what makes the images that videos begin with, where they do."""
        if not self.use_t2i2v:
            return None
        assert self.img_flux is not None
        assert self.img_flux_ae is not None
        assert self.img_resolution is not None
        networks = Network("img_flux", self.img_flux), Network("img_flux_ae", self.img_flux_ae)
        return Stage(*networks, image_option(self.sampling_option, self.img_resolution), "t2v")


@dataclass(frozen=True)
class Job:
    """A request, the name of its files, and what tells whether they are up to date."""

    request: Request
    stem: str
    prompt: str  # as the user wrote it
    key: str


def main(argv: list[str]) -> Path | None:
    """Samples what is missing and returns the folder with everything; None on all hosts but the first."""
    config = build(SampleConfig, flags.FLAGS.config, "config")
    connect(config.distributed)
    given = flags.FLAGS
    prompts = prompt_list.from_source(given.prompt, given.prompts, config.dataset.data_path, given.ref)
    requests = make_requests(config, prompt_list.select(prompts, config.start_index, config.num_samples))
    check(config, [request for request, _, _ in requests])
    settings = make_settings(config)
    jobs = [Job(r, stem, text, outputs.request_key(r, settings)) for r, stem, text in requests]
    records, todo = find(config.save_dir, jobs, "videos")
    if todo:
        records |= sample(config, todo)
    is_first = jax.process_index() == 0
    if is_first:
        summarize(config.save_dir, settings, [records[job.stem] for job in jobs])
        kept = len(jobs) - len(todo)
        print(f"{config.save_dir}: {len(todo)} new videos, {kept} kept, contact_sheet.png, samples.json")
    from_first(None)  # the others wait: processes end together
    return config.save_dir if is_first else None


def summarize(folder: Path, settings: dict[str, Any], samples: list[dict]) -> None:
    """Writes the list of all videos, and a picture of the first of them."""
    write_json(folder / "samples.json", {"settings": settings, "samples": samples})
    shown = samples[:SHEET_VIDEOS]
    videos = [outputs.read(folder / record["file"], FRAMES) for record in shown]
    write_contact_sheet(folder / "contact_sheet.png", videos, [record["prompt"] for record in shown])


def make_requests(config: SampleConfig, prompts: list[prompt_list.Prompt]) -> list[tuple[Request, str, str]]:
    """Returns (request, file stem, prompt as written) of every video; a missing seed is drawn once a run."""
    first = config.sampling_option.seed
    first = from_first(secrets.randbelow(2**31)) if first is None else first
    requests = []
    for prompt in prompts:
        text = add_fps(prompt.text, f"{config.fps_save:g}") if config.add_fps_to_text else prompt.text
        text = text if config.motion_score is None else add_motion_score(text, config.motion_score)
        for n in range(config.num_sample):
            request = Request(text, prompt.index, first + n, prompt.references, prompt.negative)
            stem = f"{prompt.index:04d}_{slug(prompt.text)}" + (f"_{n}" if n else "")
            requests.append((request, stem, prompt.text))
    return requests


def check(config: SampleConfig, requests: Sequence[Request]) -> None:
    """Raises: UserError for what the models, the mesh or the references do not fit; no weights are read for it."""
    parse_dtype(config.dtype)
    mesh = make_mesh(config.mesh)
    check_batch_sizes(mesh, config.batch_size, config.decode_batch_size)
    autoencoder = config.video_stage.check()
    if config.image_stage is None:
        check_references(requests, config.cond_type, autoencoder)
    else:
        config.image_stage.check()
        if any(request.references for request in requests):
            raise UserError("use_t2i2v makes the first frame: leave out --ref, or set --config.use_t2i2v=False.")
    stages = [stage for stage in (config.video_stage, config.image_stage) if stage is not None]
    for stage in stages:
        stage.check_heads(mesh)
        stage.check_weights()
    widths = read_shape("t5", config.t5).width, read_shape("clip", config.clip).width
    for stage in stages:
        stage.check_text(*widths)


def make_settings(config: SampleConfig) -> dict[str, Any]:
    """Returns what a video depends on besides its request: options, models, identity of the weights."""
    texts = {"t5": asdict(config.t5), "clip": asdict(config.clip)}
    settings = config.video_stage.settings(**texts) | {"dtype": config.dtype, "fps_save": config.fps_save}
    if config.image_stage is not None:
        settings["image"] = config.image_stage.settings(**texts) | {"dtype": config.dtype}
    return settings


def find(folder: Path, jobs: list[Job], what: str) -> tuple[dict[str, dict], list[Job]]:
    """Returns the records of the jobs that are done, by stem, and the other jobs: what the first host sees."""
    records = from_first({job.stem: record for job in jobs if (record := outputs.find(folder, job.stem, job.key))})
    todo = [job for job in jobs if job.stem not in records]
    if records:
        logging.info("%d of %d %s are in %s already and are kept", len(records), len(jobs), what, folder)
    return records, todo


def sample(config: SampleConfig, jobs: list[Job]) -> dict[str, dict]:
    """Writes the videos of `jobs`, after the images they begin with, and returns their records by stem."""
    texts = TextEncoders.load(config.t5, config.clip, parse_dtype(config.dtype), make_mesh(config.mesh))
    if config.image_stage is not None:
        jobs = with_images(config, config.image_stage, jobs, texts.encode)
    return write(config, config.video_stage, jobs, texts.encode)


def with_images(config: SampleConfig, stage: Stage, jobs: list[Job], encode_text: TextEncoder) -> list[Job]:
    """Returns the jobs with images of their prompts as references, made now where they are not there yet."""
    settings = make_settings(config)["image"]
    images = []
    for job in jobs:
        request = Request(job.prompt, job.request.index, job.request.seed)
        images.append(Job(request, f"{job.stem}_image", job.prompt, outputs.request_key(request, settings)))
    records, todo = find(config.save_dir, images, "images")
    if todo:
        records |= write(config, stage, todo, encode_text)
    paths = [config.save_dir / records[image.stem]["file"] for image in images]
    return [
        replace(job, request=replace(job.request, references=(path,))) for job, path in zip(jobs, paths, strict=True)
    ]


def write(config: SampleConfig, stage: Stage, jobs: list[Job], encode_text: TextEncoder) -> dict[str, dict]:
    """Writes what a stage makes of `jobs` and returns the records by stem; its networks leave memory again.

    The first host writes; the others learn of it when everything is there.
    """
    sizes = (config.batch_size, config.decode_batch_size)
    pipeline = stage.load(encode_text, make_mesh(config.mesh), parse_dtype(config.dtype), sizes)
    by_request, is_first = {job.request: job for job in jobs}, jax.process_index() == 0
    if is_first:
        config.save_dir.mkdir(parents=True, exist_ok=True)
    records = {}
    for request, frames in pipeline(list(by_request), stage.option, stage.cond_type):
        job = by_request[request]
        record = {"prompt": job.prompt, "text": request.prompt, "index": request.index, "seed": request.seed}
        if is_first:
            record = outputs.save(config.save_dir, job.stem, frames, config.fps_save, record | {"key": job.key})
        records[job.stem] = record
    return from_first(records)


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag()
    flags.DEFINE_multi_string("prompt", [], "prompt; repeat the flag for more")
    flags.DEFINE_string("prompts", None, "text file with one prompt a line")
    flags.DEFINE_string("ref", None, "images or videos for cond_type other than t2v, separated by ';'")


if __name__ == "__main__":
    define_flags()
    run(main)
