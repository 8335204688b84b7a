"""What an autoencoder makes of your videos: `python -m opensora_jax.vae VERB --config=configs/vae/inference/demo.py`.

encode       latents of all clips, in shards of a bounded size, in save_dir/latents
reconstruct  clips beside what is left of them after encoding and decoding, as mp4, with PSNR, SSIM and LPIPS per clip
stats        exact mean and standard deviation of each latent channel, in save_dir/stats.json
A killed run continues where it stopped, with the same command. Several processes share the clips: each does every n-th
(of `encode`, every n-th shard) and tells the others nothing; who finds the work of all of them done, finishes it.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from absl import logging
from flax import nnx

from opensora_jax.config.build import build
from opensora_jax.config.command import Main, run_verbs
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.config.flag import config_flag
from opensora_jax.data.cache.cache_key import FACTS, Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CacheInfo
from opensora_jax.data.clip_source import ClipSource
from opensora_jax.data.clips import ClipDataset, assigned_rows
from opensora_jax.data.plan.auto import with_ones
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.data.plan.digests import digest
from opensora_jax.inference import outputs
from opensora_jax.inference.latents import (
    ClipWork,
    Host,
    LatentConfig,
    Rows,
    by_reason,
    check_sizes,
    finish,
    latents_identity,
    this_host,
    write_latents,
)
from opensora_jax.models.codec import Codec
from opensora_jax.models.lpips import SMALLEST
from opensora_jax.parallel.distributed import DistributedConfig, connect
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training import reconstruction, scores
from opensora_jax.training.latent_sums import Summed
from opensora_jax.training.perceptual import FrameDistance
from opensora_jax.training.reconstruction import NORMALISATION
from opensora_jax.weights.pretrained import (
    AUTOENCODERS,
    create,
    find_weights,
    fingerprint,
    load,
    parse_dtype,
    parse_model,
)

CONFIG = config_flag()
LONGEST = 150  # bytes of a clip's name in those of its files: file systems take 255 with all that is added


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
    distributed: DistributedConfig


@dataclass(frozen=True)
class Work:
    """An autoencoder and the clips to use it on, both loaded, and what their latents depend on."""

    config: VAEConfig
    codec: Codec
    table: pa.Table
    source: ClipSource
    rows: Rows
    identity: Identity
    distance: FrameDistance | None  # None: without LPIPS

    def share(self, host: Host) -> Rows:
        """Returns the clips of a process: every n-th."""
        return self.rows[host[0] :: host[1]]

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
            "fps": fps if fps > 0 else None,  # an image has none
        }

    def stem(self, bucket: Bucket, row: int) -> str:
        """Returns the name of a clip's files; it stays when the table gets other rows."""
        path = Path(str(self.source.paths[row]))
        which = [str(path), self.table["record"][row].as_py(), bucket.num_frames, bucket.height, bucket.width]
        return f"{path.stem.encode()[:LONGEST].decode(errors='ignore')}_{digest(json.dumps(which))[:8]}"

    def key(self, bucket: Bucket, row: int) -> str:
        """Returns a hash of all that a clip's reconstruction and its scores depend on."""
        facts = [self.table[name][row].as_py() for name in FACTS]
        return digest(self._networks, self.stem(bucket, row), json.dumps(facts))

    @cached_property
    def _networks(self) -> str:
        settings = {name: value for name, value in self.identity.settings.items() if not name.startswith("encode.")}
        lpips = fingerprint(self.distance.lpips) if self.distance else None
        return digest(json.dumps([self.identity.digests["autoencoder weights"], settings, lpips], sort_keys=True))


def prepare(*, there_and_back: bool = False) -> Work:
    """Returns the work of the config, with what measures reconstructions where clips go `there_and_back`.

    Raises: UserError for sizes or weights that do not fit, before any is loaded.
    """
    config = build(VAEConfig, CONFIG.value, "config")
    if config.num_samples is not None and config.num_samples < 1:
        raise UserError(f"config.num_samples is at least 1, or None for all clips: got {config.num_samples}")
    connect(config.distributed, apart=True)
    module, fields = parse_model(config.model, AUTOENCODERS, "config.model")
    table = config.dataset.table()
    buckets = config.dataset.buckets(with_ones(config.bucket_config))
    rows = assigned_rows(table, buckets, config.encode.seed)[: config.num_samples]
    check_sizes(nnx.eval_shape(lambda: module(fields, rngs=nnx.Rngs(0))), rows, there_and_back=there_and_back)
    mesh, dtype = make_mesh(config.mesh, jax.local_devices()), parse_dtype(config.dtype)
    measures = there_and_back and config.lpips["from_pretrained"]
    if measures:
        find_weights(config.lpips["from_pretrained"], "config.lpips")
    if not config.model["from_pretrained"]:
        logging.warning("config.model.from_pretrained is empty: the autoencoder has random weights")
        model: Any = create(config.model, AUTOENCODERS, "config.model", dtype=dtype, mesh=mesh, seed=config.encode.seed)
    else:
        model = load(config.model, AUTOENCODERS, "config.model", dtype=dtype, mesh=mesh)
    identity = latents_identity(model, config.dtype, config.encode, config.dataset, table, rows)
    distance = FrameDistance.load(config.lpips, mesh) if measures else None
    return Work(config, Codec(model, mesh), table, config.dataset.source(table), rows, identity, distance)


def encode(work: Work, host: Host) -> Path | None:
    """Writes the latents that are missing; returns save_dir, or None while other processes are at work."""
    config, settings = work.config, work.config.encode
    stored = (settings.dtype or config.dtype, len(work.rows), settings.shard_clips, 0, 1)
    writer = LatentWriter(config.save_dir / "latents", CacheInfo("vae encode", work.identity, *stored))
    writer.start()
    new = write_latents(writer, ClipWork(work.codec, work.source, work.rows, settings), host)
    return config.save_dir if finish(writer, new) else None


def reconstruct(work: Work, host: Host) -> Path | None:
    """Writes the reconstructions that are missing, and the table of all; returns as `encode` does.

    Raises: UserError when there is no reconstruction at all.
    """
    folder = work.config.save_dir / "reconstructions"
    folder.mkdir(parents=True, exist_ok=True)
    todo = {row: bucket for bucket, row in work.share(host) if _find(work, folder, bucket, row) is None}
    pairs = [(bucket, row) for row, bucket in todo.items()]
    for row, clip, made in reconstruction.reconstruct(work.codec, work.source, pairs, work.config.encode.batch_size):
        bucket = todo.pop(row)
        record = work.about(bucket, row) | _scores(work.distance, clip, made) | {"key": work.key(bucket, row)}
        sides, fps = np.concatenate([clip, made], axis=2), reconstruction.shown_fps(work.source, row)
        outputs.save(folder, work.stem(bucket, row), sides, fps, record)
    for row, bucket in todo.items():
        reason = work.source.bad_clips[str(work.source.paths[row])]
        outputs.leave_out(folder, work.stem(bucket, row), reason, work.key(bucket, row))
    return work.config.save_dir if _finish_table(work, folder) else None


def stats(work: Work, host: Host) -> Path | None:
    """Writes the statistics of the latent's channels; returns as `encode` does.

    Raises: UserError when no clip has a latent.
    """
    (work.config.save_dir / "stats").mkdir(parents=True, exist_ok=True)
    path, mine, key = _sums_path(work, host), work.share(host), work.identity.key
    summed, source = Summed.read(path, key), work.source
    before, place = summed.left_out, {row: number for number, (_, row) in enumerate(mine)}
    left, batch_size = mine[summed.next :], work.config.encode.batch_size
    for ids, mean, variance in reconstruction.clip_moments(work.codec, source, left, batch_size):
        summed = summed.add(mean, variance, 1 + place[ids[-1]])  # batches come in the order of the rows
        summed = replace(summed, left_out=(*before, *source.bad_clips.items()))
        summed.write(path, key)
    replace(summed, next=len(mine), left_out=(*before, *source.bad_clips.items())).write(path, key)
    return work.config.save_dir if _finish_sums(work, host[1]) else None


def _find(work: Work, folder: Path, bucket: Bucket, row: int) -> dict[str, Any] | None:
    """Returns a clip's line of the table if its reconstruction is there; its row and text may be others than then."""
    record = outputs.find(folder, work.stem(bucket, row), work.key(bucket, row))
    return record and record | work.about(bucket, row)


def _scores(distance: FrameDistance | None, clip: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """Returns the measures of a reconstruction that frames of this size have, as means over frames."""
    found = scores.measure(clip, made)
    if distance and min(clip.shape[1:3]) >= SMALLEST:
        found["lpips"] = float(distance(clip[None], made[None]).mean())
    return found


def _finish_table(work: Work, folder: Path) -> bool:
    """Writes the table when all clips are reconstructed or left out, and returns whether they are."""
    found, left_out, missing = [], [], 0
    for bucket, row in sorted(work.rows, key=lambda pair: pair[1]):
        if line := _find(work, folder, bucket, row):
            found.append(line)
        elif reason := outputs.why_left_out(folder, work.stem(bucket, row), work.key(bucket, row)):
            left_out.append((str(work.source.paths[row]), reason))
        else:
            missing += 1
    if missing:
        print(f"{folder}: {missing} of {len(work.rows)} clips are still to come")
        return False
    reasons = list(by_reason(left_out))
    if not found:
        raise UserError(f"none of the {len(work.rows)} clips could be reconstructed: {'; '.join(reasons)}")
    totals = scores.summary(found)
    scores.write_scores(work.config.save_dir / "reconstructions.csv", found)
    write_json(work.config.save_dir / "reconstructions.json", totals | {"left_out": len(left_out)})
    print(scores.as_text(found))
    said = f"{folder}: {len(found)} clips, source on the left; {scores.describe(totals)}"
    print(said, *reasons, sep="\n  left out: ")
    return True


def _sums_path(work: Work, host: Host) -> Path:
    return work.config.save_dir / "stats" / f"{host[0]:05d}-of-{host[1]:05d}.json"


def _finish_sums(work: Work, processes: int) -> bool:
    """Writes the statistics when all processes have summed up their clips, and returns whether they have."""
    folder, hosts = work.config.save_dir, [(index, processes) for index in range(processes)]
    summed = reduce(Summed.plus, (Summed.read(_sums_path(work, host), work.identity.key) for host in hosts))
    if summed.next < len(work.rows):
        print(f"{folder / 'stats'}: {len(work.rows) - summed.next} of {len(work.rows)} clips are still to come")
        return False
    reasons = list(by_reason(summed.left_out))
    if not summed.clips:
        raise UserError(f"none of the {len(work.rows)} clips has a latent to measure: {'; '.join(reasons)}")
    mean, std = summed.sums.result()
    fields = NORMALISATION[work.config.model["type"]](mean, std)
    write_json(folder / "stats.json", {"mean": mean, "std": std} | fields | {"clips": summed.clips})
    for channel, (shift, deviation) in enumerate(zip(mean, std, strict=True)):
        print(f"channel {channel:>3}  mean {shift:>9.4f}  deviation {deviation:>9.4f}")
    print(f"{folder / 'stats.json'}: {len(mean)} channels over {summed.clips} clips", *reasons, sep="\n  left out: ")
    return True


VERBS: dict[str, Main] = {
    "encode": lambda argv: encode(prepare(), this_host()),
    "reconstruct": lambda argv: reconstruct(prepare(there_and_back=True), this_host()),
    "stats": lambda argv: stats(prepare(), this_host()),
}


if __name__ == "__main__":
    run_verbs(VERBS)
