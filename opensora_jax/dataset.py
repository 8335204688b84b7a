"""Makes and describes data: `python -m opensora_jax.dataset VERB --flags`.

demo   writes the demo set of moving shapes with captions (data/shapes.py)
meta   probes a folder or a CSV of videos into a table (data/records.py); a second run probes only what is new
text   makes small tokenizers and text encoders from a table's captions (inference/local_encoders.py)
encode caches the latents and text embeddings that a training config asks for (inference/encode.py)
"""

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from absl import flags
from tqdm import tqdm

from opensora_jax.config.build import build
from opensora_jax.config.command import Main, run_verbs
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import config_flag
from opensora_jax.data import records, shapes

REASONS_SHOWN = 5


def demo(output: Path, num_clips: int, size: int, num_frames: int, fps: int, seed: int) -> Path:
    """Writes the demo set, or finds it finished; returns its folder."""
    shapes.write_dataset(output, num_clips, size, num_frames, fps, seed)
    print(f"{output}: {num_clips} clips in captions.csv, held-out clips in held_out.csv, prompts in prompts.txt")
    return output


def meta(source: Path, output: Path, num_workers: int) -> Path:
    """Writes the table of all files of `source`; returns its folder. Raises UserError if none is usable."""
    known = _unchanged_rows(output) if output.exists() else {}
    rows = _describe_all(records.list_videos(source), known, num_workers)
    bad = [row for row in rows if row["status"] != "ok"]
    reasons = "; ".join(f"{row['path']}: {row['reason']}" for row in bad[:REASONS_SHOWN])
    if len(bad) == len(rows):
        raise UserError(f"None of the {len(rows)} files of {source} is a usable video ({reasons}). Give others.")
    records.write_table(pa.Table.from_pylist(rows, schema=records.SCHEMA), output)
    print(f"{output}: {len(rows) - len(bad)} ok, {len(bad)} bad" + (f" ({reasons})" if bad else ""))
    return output.parent


def _unchanged_rows(table: Path) -> dict[str, dict[str, Any]]:
    """Usable rows of an earlier run whose file has kept its time and size; bad files get a second chance."""
    rows = records.read_table(table).select(records.SCHEMA.names).to_pylist()
    fine = (row for row in rows if row["status"] == "ok")
    return {row["path"]: row for row in fine if (row["mtime_ns"], row["size_bytes"]) == records.file_stamp(row["path"])}


def _describe_all(pairs: list[tuple[str, str]], known: dict[str, dict[str, Any]], num_workers: int) -> list[dict]:
    def row_of(pair: tuple[str, str]) -> dict[str, Any]:
        path, text = pair
        return known[path] | {"text": text} if path in known else records.describe(path, text)

    with ThreadPoolExecutor(num_workers) as pool:
        return list(tqdm(pool.map(row_of, pairs), total=len(pairs), desc="probe", unit="file"))


def _define_demo() -> None:
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_integer("num_clips", 960, "clips for training", lower_bound=1)
    flags.DEFINE_integer("size", 32, "height and width in pixels")
    flags.DEFINE_integer("frames", 9, "frames per clip")
    flags.DEFINE_integer("fps", 8, "frames per second")
    flags.DEFINE_integer("seed", 0, "another seed gives other paths, sizes and order", lower_bound=0)


def _define_meta() -> None:
    flags.DEFINE_string("input", None, "folder of videos, or a .csv or .parquet with path,text", required=True)
    flags.DEFINE_string("output", None, "table to write: .parquet or .csv", required=True)
    flags.DEFINE_integer("num_workers", (os.cpu_count() or 1) + 1, "files probed at a time", lower_bound=1)


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
    return meta(Path(given.input), Path(given.output), given.num_workers)


def _run_text(argv: list[str]) -> Path:
    from opensora_jax.inference.local_encoders import write_local_encoders  # brings JAX, which probing needs not

    given = flags.FLAGS
    captions = records.read_table(given.meta)["text"].to_pylist()
    write_local_encoders(Path(given.output), captions, seed=given.seed, text_length=given.text_length)
    print(f"{given.output}: small text encoders in t5 and clip")
    return Path(given.output).parent


def _run_encode(argv: list[str]) -> Path:
    from opensora_jax.inference import encode

    config = flags.FLAGS.config
    sections = {field.name: config[field.name] for field in dataclasses.fields(encode.EncodeJob)}
    return encode.run(build(encode.EncodeJob, sections, "config")).folder.parent


DEFINE_FLAGS: dict[str, Callable[[], object]] = {
    "demo": _define_demo,
    "meta": _define_meta,
    "text": _define_text,
    "encode": config_flag,
}
VERBS: dict[str, Main] = {"demo": _run_demo, "meta": _run_meta, "text": _run_text, "encode": _run_encode}


if __name__ == "__main__":
    run_verbs(VERBS, DEFINE_FLAGS)
