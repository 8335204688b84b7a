"""What an autoencoder makes of your videos: `python -m opensora_jax.vae VERB --config=configs/vae/inference/demo.py`.

encode       latents of all clips, in shards of a bounded size, in save_dir/latents
reconstruct  clips beside what is left of them after encoding and decoding, as mp4, with PSNR, SSIM and LPIPS per clip
stats        exact mean and standard deviation of each latent channel, in save_dir/stats.json
A killed run continues where it stopped, with the same command.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from absl import logging
from flax import nnx
from pyarrow.csv import write_csv

from opensora_jax.config.build import build
from opensora_jax.config.command import Main, run_verbs
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.config.flag import config_flag
from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CacheInfo
from opensora_jax.data.clip_source import ClipSource
from opensora_jax.data.clips import ClipDataset, assigned_rows, read_once
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.inference import outputs
from opensora_jax.inference.latents import (
    ClipWork,
    LatentConfig,
    Rows,
    check_sizes,
    finish,
    latents_identity,
    this_host,
    write_latents,
)
from opensora_jax.models.codec import Codec, to_pixels
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training.quality import psnr_db, ssim
from opensora_jax.training.reconstruction import LatentSums
from opensora_jax.weights.pretrained import AUTOENCODERS, CRITICS, create, load, parse_dtype, parse_model

CONFIG = config_flag()


@dataclass(frozen=True)
class VAEConfig:
    """A config of configs/vae/inference; names are the original's."""

    folder: str
    save_dir: Path
    dtype: str
    model: dict[str, Any]  # type, where its weights are (empty: random ones), and the fields of that type
    lpips: dict[str, Any]  # where the weights of the perceptual distance are (empty: it is left out)
    dataset: ClipDataset
    bucket_config: dict[str, dict[int, Any]]
    encode: LatentConfig
    num_samples: int | None  # clips used; None for all
    mesh: MeshConfig


@dataclass(frozen=True)
class Work:
    """An autoencoder and the clips to use it on, both loaded, and what their latents depend on."""

    config: VAEConfig
    codec: Codec
    table: pa.Table
    source: ClipSource
    rows: Rows
    identity: Identity

    @property
    def key(self) -> str:
        """A hash of the autoencoder, the clips and the settings."""
        return self.identity.key

    def batches(self, rows: Rows, title: str) -> Iterator[tuple[Bucket, list[int], np.ndarray]]:
        """Yields (bucket, rows, clips), the last clips of a short batch being copies."""
        return read_once(self.source, rows, self.config.encode.batch_size, title)

    def stem(self, row: int) -> str:
        """Returns the name of a clip's files."""
        return f"{row:05d}_{Path(str(self.source.paths[row])).stem}"

    def about(self, bucket: Bucket, row: int) -> dict[str, Any]:
        """Returns what a clip is."""
        fps = self.source.facts["fps"][row].item()
        return {
            "row": row,
            "path": str(self.source.paths[row]),
            "text": self.table["text"][row].as_py(),
            "num_frames": bucket.num_frames,
            "height": bucket.height,
            "width": bucket.width,
            "fps": fps,
        }


def prepare() -> Work:
    """Returns the work of the config. Raises: UserError for sizes or weights that do not fit, before any is loaded."""
    config = build(VAEConfig, CONFIG.value, "config")
    module, fields = parse_model(config.model, AUTOENCODERS, "config.model")
    table = config.dataset.table()
    buckets = config.dataset.buckets(config.bucket_config)
    rows = assigned_rows(table, buckets, config.encode.seed)[: config.num_samples]
    check_sizes(nnx.eval_shape(lambda: module(fields, rngs=nnx.Rngs(0))), rows)
    mesh, dtype = make_mesh(config.mesh, jax.local_devices()), parse_dtype(config.dtype)
    if not config.model["from_pretrained"]:
        logging.warning("config.model.from_pretrained is empty: the autoencoder has random weights")
        model: Any = create(config.model, AUTOENCODERS, "config.model", dtype=dtype, mesh=mesh, seed=config.encode.seed)
    else:
        model = load(config.model, AUTOENCODERS, "config.model", dtype=dtype, mesh=mesh)
    identity = latents_identity(model, config.dtype, config.encode, config.dataset, table, rows)
    return Work(config, Codec(model, mesh), table, config.dataset.source(table), rows, identity)


def encode(argv: list[str]) -> Path | None:
    """Writes the latents that are missing; returns save_dir, or None while other processes are at work."""
    work, host = prepare(), this_host()
    config, settings = work.config, work.config.encode
    stored = (settings.dtype or config.dtype, len(work.rows), settings.shard_clips, 0, 1)
    writer = LatentWriter(config.save_dir / "latents", CacheInfo("vae encode", work.identity, *stored))
    writer.start()
    new = write_latents(writer, ClipWork(work.codec, work.source, work.rows, settings), host)
    return config.save_dir if finish(writer, new) else None


def reconstruct(argv: list[str]) -> Path:
    """Writes the reconstructions that are missing and the table of all; returns save_dir."""
    work = prepare()
    folder = work.config.save_dir / "reconstructions"
    folder.mkdir(parents=True, exist_ok=True)
    distance = make_lpips(work.config)
    done = {row: found for _, row in work.rows if (found := outputs.find(folder, work.stem(row), work.key)) is not None}
    for bucket, ids, clips in work.batches([pair for pair in work.rows if pair[1] not in done], "reconstruct"):
        decoded = np.asarray(work.codec.decode(work.codec.encode(clips), bucket.num_frames))
        far = distance(clips, decoded)
        for place, row in enumerate(ids):
            about = work.about(bucket, row)
            about |= measure(clips[place], decoded[place]) | {name: value[place] for name, value in far.items()}
            sides = np.concatenate([clips[place], decoded[place]], axis=2)
            fps = 1.0 if math.isnan(about["fps"]) else about["fps"]
            done[row] = outputs.save(folder, work.stem(row), sides, fps, about | {"key": work.key})
    if not done:
        raise UserError(f"none of the {len(work.rows)} clips can be read: see the warnings above")
    lines = [{name: value for name, value in done[row].items() if name != "key"} for row in sorted(done)]
    found = summary(lines)
    write_csv(pa.Table.from_pylist(lines), work.config.save_dir / "reconstructions.csv")
    write_json(work.config.save_dir / "reconstructions.json", found)
    print(f"{folder}: {len(lines)} clips, source on the left; {describe(found)}")
    return work.config.save_dir


def stats(argv: list[str]) -> Path:
    """Writes the statistics of the latent's channels; returns save_dir."""
    work = prepare()
    folder, partial = work.config.save_dir, work.config.save_dir / "stats.partial.json"
    folder.mkdir(parents=True, exist_ok=True)
    sums, start = LatentSums(), 0
    if partial.is_file() and (saved := json.loads(partial.read_text()))["key"] == work.key:
        sums, start = LatentSums(**saved["sums"]), saved["next"]
    place = {row: number for number, (_, row) in enumerate(work.rows)}
    for _, ids, clips in work.batches(work.rows[start:], "latent statistics"):
        mean, variance = (np.asarray(part)[: len(ids)] for part in work.codec.moments(clips))
        sums = sums.add(mean, variance)
        start = 1 + place[ids[-1]]  # batches come in the order of the rows
        write_json(partial, {"key": work.key, "next": start, "sums": sums.to_dict()})
    shift, deviation = sums.result()
    scale = (1 / np.asarray(deviation)).tolist()
    found = {"shift_factor": shift, "scale_factor": scale, "mean": shift, "std": deviation, "clips": start}
    write_json(folder / "stats.json", found)
    partial.unlink(missing_ok=True)
    for channel, pair in enumerate(zip(shift, deviation, strict=True)):
        print(f"channel {channel:>3}  mean {pair[0]:>9.4f}  deviation {pair[1]:>9.4f}")
    print(f"{folder / 'stats.json'}: {len(shift)} channels over {start} clips")
    return folder


def make_lpips(config: VAEConfig) -> Callable[[np.ndarray, np.ndarray], dict[str, list[float]]]:
    """Returns what maps two batches of bytes to {"lpips": one per clip}, or to nothing without weights."""
    if not config.lpips["from_pretrained"]:
        return lambda a, b: {}
    kinds, mesh = {"lpips": CRITICS["lpips"]}, make_mesh(config.mesh)
    graph, params = nnx.split(load(config.lpips, kinds, "config.lpips", dtype=jnp.float32, mesh=mesh))

    def distance(a: np.ndarray, b: np.ndarray) -> dict[str, list[float]]:
        frames = nnx.merge(graph, params)(to_pixels(jnp.asarray(a)), to_pixels(jnp.asarray(b)))
        return {"lpips": np.asarray(frames).mean(-1).tolist()}

    return distance


def measure(clip: np.ndarray, reconstruction: np.ndarray) -> dict[str, float]:
    """Returns how close a reconstruction is, as means over frames; frames below 11 pixels have no SSIM."""
    a, b = clip / np.float32(255), reconstruction / np.float32(255)
    found = {"psnr_db": float(psnr_db(a, b).mean())}
    return found | ({"ssim": float(ssim(a, b).mean())} if min(clip.shape[1:3]) >= 11 else {})


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns mean and worst of every measure over the clips that have it."""
    found: dict[str, Any] = {"clips": len(lines)}
    for name, worst in (("psnr_db", min), ("ssim", min), ("lpips", max)):
        values = [line[name] for line in lines if name in line]
        if values:
            found |= {name: float(np.mean(values)), f"{name}_worst": worst(values)}
    return found


def describe(found: dict[str, Any]) -> str:
    """Returns a summary as text."""
    names = [name for name in ("psnr_db", "ssim", "lpips") if name in found]
    return ", ".join(f"{name} {found[name]:.3f} (worst {found[f'{name}_worst']:.3f})" for name in names)


VERBS: dict[str, Main] = {"encode": encode, "reconstruct": reconstruct, "stats": stats}


if __name__ == "__main__":
    run_verbs(VERBS)
