"""Samples: `python -m opensora_jax.sample --config=configs/diffusion/inference/demo.py --prompt="..."`.

Prompts come from --prompt (repeatable), --prompts (a text file, one a line) or config.dataset.data_path (a
table with a `text` column). Each becomes `<index>_<words>.mp4` in config.save_dir, with its record beside it;
samples.json and contact_sheet.png cover the whole run. Videos that are there already, from the same settings
and weights, are kept.
"""

import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from opensora_jax.config.build import build
from opensora_jax.config.command import run
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.config.flag import config_flag
from opensora_jax.data.text import add_fps, add_motion_score
from opensora_jax.inference import outputs, prompt_list
from opensora_jax.inference.contact_sheet import write_contact_sheet
from opensora_jax.inference.pipeline import Pipeline
from opensora_jax.inference.prompt import TextEncoderConfig, TextEncoders
from opensora_jax.inference.request import Request, SamplingOption, check_condition, slug
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights.pretrained import AUTOENCODERS, DENOISERS, load, parse_dtype

SHEET_VIDEOS = 48  # more do not fit a picture that one can look at


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
    model: Any  # type, from_pretrained and the fields of that type
    ae: Any
    t5: TextEncoderConfig
    clip: TextEncoderConfig


@dataclass(frozen=True)
class Job:
    """A request, the name of its files, and what tells whether they are up to date."""

    request: Request
    stem: str
    prompt: str  # as the user wrote it
    key: str


def main(argv: list[str]) -> Path:
    """Samples what is missing and returns the folder with everything."""
    config = build(SampleConfig, flags.FLAGS.config, "config")
    requests = list(make_requests(config, read_prompts(config)))
    check_condition(config.sampling_option, config.cond_type, [request for request, _, _ in requests])
    settings = make_settings(config)
    jobs = [Job(r, stem, text, outputs.request_key(r, settings)) for r, stem, text in requests]
    folder = config.save_dir
    folder.mkdir(parents=True, exist_ok=True)
    found = {job: record for job in jobs if (record := outputs.find(folder, job.stem, job.key))}
    todo = [job for job in jobs if job not in found]
    if len(todo) < len(jobs):
        logging.info("%d of %d videos are in %s already and are kept", len(jobs) - len(todo), len(jobs), folder)
    if todo:
        found |= sample(config, todo)
    records = [found[job] for job in jobs]
    write_json(folder / "samples.json", {"settings": settings, "samples": records})
    shown = records[:SHEET_VIDEOS]
    videos = [outputs.read(folder / record["file"]) for record in shown]
    write_contact_sheet(folder / "contact_sheet.png", videos, [record["prompt"] for record in shown])
    print(f"{folder}: {len(todo)} new videos, {len(jobs) - len(todo)} kept, contact_sheet.png, samples.json")
    return folder


def read_prompts(config: SampleConfig) -> list[prompt_list.Prompt]:
    """Returns the selected prompts of the one source that is given. Raises: UserError for none or several."""
    strings, file, table = flags.FLAGS.prompt, flags.FLAGS.prompts, config.dataset.data_path
    if strings and file:
        raise UserError("Both --prompt and --prompts are given. Use one of them.")
    if flags.FLAGS.ref and not strings:
        raise UserError("--ref goes with --prompt. In a table, give references in its column 'ref'.")
    if strings:
        prompts = prompt_list.from_strings(strings, flags.FLAGS.ref)
    elif file:
        prompts = prompt_list.from_file(Path(file))
    elif table:
        prompts = prompt_list.from_table(Path(table))
    else:
        prompts = []
    if not prompts:
        raise UserError('There is no prompt. Give --prompt="..." (repeatable), --prompts=FILE or dataset.data_path.')
    return prompt_list.select(prompts, config.start_index, config.num_samples)


def make_requests(config: SampleConfig, prompts: list[prompt_list.Prompt]) -> Iterator[tuple[Request, str, str]]:
    """Yields (request, file stem, prompt as written) of every video; a missing seed is drawn once a run."""
    first = config.sampling_option.seed
    first = secrets.randbelow(2**31) if first is None else first
    for prompt in prompts:
        for n in range(config.num_sample):
            text = prompt.text if not config.add_fps_to_text else add_fps(prompt.text, config.fps_save)
            if config.motion_score is not None:
                text = add_motion_score(text, config.motion_score)
            request = Request(text, prompt.index, first + n, prompt.references, prompt.negative)
            yield request, f"{prompt.index:04d}_{slug(prompt.text)}" + (f"_{n}" if n else ""), prompt.text


def make_settings(config: SampleConfig) -> dict[str, Any]:
    """Returns what a video depends on besides its request: options, models, identity of the weights."""
    sections = {"model": config.model, "ae": config.ae, "t5": asdict(config.t5), "clip": asdict(config.clip)}
    return {
        "cond_type": config.cond_type,
        "sampling_option": asdict(config.sampling_option) | {"seed": None},  # each request has its own
        "dtype": config.dtype,
        "fps_save": config.fps_save,
        "sections": sections,
        "weights": {n: outputs.weights_identity(s["from_pretrained"]) for n, s in sections.items()},
    }


def sample(config: SampleConfig, jobs: list[Job]) -> dict[Job, dict]:
    """Loads the models, writes the videos of `jobs` and returns their records."""
    pipeline = load_pipeline(config)
    by_request = {job.request: job for job in jobs}
    records = {}
    for request, frames in pipeline(list(by_request), config.sampling_option, config.cond_type):
        job = by_request[request]
        record = {"prompt": job.prompt, "text": request.prompt, "index": request.index, "seed": request.seed}
        record = outputs.save(config.save_dir, job.stem, frames, config.fps_save, record | {"key": job.key})
        records[job] = record
    return records


def load_pipeline(config: SampleConfig) -> Pipeline:
    """Returns the pipeline, models loaded onto the mesh. Raises: UserError for weights that do not fit."""
    dtype, mesh = parse_dtype(config.dtype), make_mesh(config.mesh)
    denoiser = load(ConfigDict(config.model), DENOISERS, "config.model", dtype=dtype, mesh=mesh)
    autoencoder = load(ConfigDict(config.ae), AUTOENCODERS, "config.ae", dtype=dtype, mesh=mesh)
    text = TextEncoders.load(config.t5, config.clip, dtype)
    sizes = (config.batch_size, config.decode_batch_size)
    return Pipeline(denoiser, autoencoder, text.encode, mesh, *sizes)


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag()
    flags.DEFINE_multi_string("prompt", [], "prompt; repeat the flag for more")
    flags.DEFINE_string("prompts", None, "text file with one prompt a line")
    flags.DEFINE_string("ref", None, "images or videos for cond_type other than t2v, separated by ';'")


if __name__ == "__main__":
    define_flags()
    run(main)
