"""Makes and describes data: `python -m opensora_jax.dataset VERB --flags`.

demo   writes the demo set of moving shapes with captions (data/shapes.py)
meta   probes a folder, a list or a TFDS set into a table (data/table/records.py); a second run probes only what is new
shard  copies the clips of a table into ArrayRecord shards, a TFDS data set (data/shards/shard_writer.py)
text   makes small tokenizers and text encoders from a table's captions (inference/local_encoders.py)
encode caches the latents and text embeddings that a training config asks for (inference/encode.py)
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

from absl import flags

from opensora_jax.config.build import build
from opensora_jax.config.command import Main, run_verbs
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import config_flag
from opensora_jax.config.stages import stage_names
from opensora_jax.data import shapes
from opensora_jax.data.table import beam_probing, probing, records, sources, survey


def demo(output: Path, num_clips: int, size: int, num_frames: int, fps: int, seed: int) -> Path:
    """Writes the demo set, or finds it finished; returns its folder."""
    shapes.write_dataset(output, num_clips, size, num_frames, fps, seed)
    print(f"{output}: {num_clips} clips in captions.csv, held-out clips in held_out.csv, prompts in prompts.txt")
    return output


def meta(
    source: Path,
    output: Path,
    num_workers: int,
    *,
    split: str = "train",
    fps: float | None = None,
    beam: str | None = None,
) -> Path:
    """Writes the table of all clips of `source`; returns its folder. Raises UserError if none is usable.

    `split`: of a TFDS set. `fps`: of its clips that are lists of stills. `beam`: options of Apache Beam, which then
    probes instead of worker processes.
    """
    records.check_suffix(output)  # before a long search
    found = sources.list_clips(source, split)
    clips, repeats = sources.drop_repeats(found.clips)
    if beam is None:
        run = functools.partial(probing.in_processes, num_workers=num_workers, fps=fps)
    else:
        beam_probing.check(beam)
        run = functools.partial(
            beam_probing.on_beam, folder=output.with_name(f"{output.name}.beam"), options=beam, fps=fps
        )
    table = survey.make_table(clips, output, run, num_workers, distrusted=fps is not None)
    print(f"{output}:", "\n".join(survey.summary(table, repeats, found.skipped)))
    print(f"next: name it in a config, --config.dataset.data_path={output}")
    return output.parent


def shard(meta: Path, output: Path, name: str, shard_mb: int, num_workers: int) -> Path:
    """Writes the shards of a table's clips, or finds them finished; returns their folder."""
    from opensora_jax.data.shards.shard_writer import write_shards  # brings TFDS, which the other verbs need not

    table = records.read_table(meta)
    done = write_shards(table, output, name=name, shard_bytes=shard_mb << 20, num_workers=num_workers)
    new = f"{done.new_shards} of them new" if done.new_shards else "all there already"
    print(f"{output}: {done.clips} clips in {done.shards} shards, {new}")
    for reason, count in done.left_out:
        print(f"  left out, {count}: {reason}")
    print(f"next: name it in a config, --config.dataset.data_path={output / 'meta.parquet'}")
    return output


def _define_demo() -> None:
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_integer("num_clips", 960, "clips for training", lower_bound=1)
    flags.DEFINE_integer("size", 32, "height and width in pixels")
    flags.DEFINE_integer("frames", 9, "frames per clip")
    flags.DEFINE_integer("fps", 8, "frames per second")
    flags.DEFINE_integer("seed", 0, "another seed gives other paths, sizes and order", lower_bound=0)


def _define_meta() -> None:
    flags.DEFINE_string("input", None, sources.WANTED, required=True)
    flags.DEFINE_string("output", None, "table to write: .parquet or .csv", required=True)
    flags.DEFINE_integer("num_workers", (os.cpu_count() or 1) + 1, "clips probed at a time", lower_bound=1)
    flags.DEFINE_string("split", "train", "of a TFDS set")
    flags.DEFINE_float("fps", None, "frames per second of videos that TFDS stores as stills", lower_bound=1e-3)
    flags.DEFINE_enum("runner", "processes", ["processes", "beam"], "what probes: this machine, or Apache Beam")
    flags.DEFINE_string("beam_options", "", "Apache Beam's own flags in one string")


def _define_shard() -> None:
    flags.DEFINE_string("meta", None, "table made by `dataset meta`", required=True)
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_string("name", "clips", "name of the data set, which its files carry")
    flags.DEFINE_integer("shard_mb", 256, "size of a shard in MiB", lower_bound=1)
    flags.DEFINE_integer("num_workers", 4, "shards written at a time", lower_bound=1)


def _define_text() -> None:
    flags.DEFINE_string("meta", None, "table whose captions make the vocabulary", required=True)
    flags.DEFINE_string("output", None, "folder to write: t5/ and clip/", required=True)
    flags.DEFINE_integer("text_length", 16, "tokens that CLIP can read", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "another seed gives other random weights", lower_bound=0)


def _run_demo(argv: list[str]) -> Path:
    given = flags.FLAGS
    return demo(Path(given.output), given.num_clips, given.size, given.frames, given.fps, given.seed)


def _run_meta(argv: list[str]) -> Path:
    given = flags.FLAGS
    if given.beam_options and given.runner != "beam":
        raise UserError("--beam_options goes with --runner=beam: give that too, or leave the options out.")
    beam = given.beam_options if given.runner == "beam" else None
    return meta(Path(given.input), Path(given.output), given.num_workers, split=given.split, fps=given.fps, beam=beam)


def _run_shard(argv: list[str]) -> Path:
    given = flags.FLAGS
    return shard(Path(given.meta), Path(given.output), given.name, given.shard_mb, given.num_workers)


def _run_text(argv: list[str]) -> Path:
    from opensora_jax.inference.local_encoders import write_local_encoders  # brings JAX, which probing needs not

    given = flags.FLAGS
    captions = records.read_table(given.meta)["text"].to_pylist()
    write_local_encoders(Path(given.output), captions, seed=given.seed, text_length=given.text_length)
    print(f"{given.output}: small text encoders in t5 and clip")
    return Path(given.output).parent


def _run_encode(argv: list[str]) -> Path | None:
    from opensora_jax.inference import encode

    config = flags.FLAGS.config
    if "stages" in config:
        raise UserError(
            f"each stage has a cache of its own: give the config of one of {', '.join(stage_names(config))}"
        )
    names = [field.name for field in dataclasses.fields(encode.EncodeJob)]
    sections = {name: config[name] for name in names if name in config}
    cache = encode.run(build(encode.EncodeJob, sections, "config"))
    return cache.folder.parent if cache else None


DEFINE_FLAGS: dict[str, Callable[[], object]] = {
    "demo": _define_demo,
    "meta": _define_meta,
    "shard": _define_shard,
    "text": _define_text,
    "encode": config_flag,
}
VERBS: dict[str, Main] = {
    "demo": _run_demo,
    "meta": _run_meta,
    "shard": _run_shard,
    "text": _run_text,
    "encode": _run_encode,
}


if __name__ == "__main__":
    run_verbs(VERBS, DEFINE_FLAGS)
