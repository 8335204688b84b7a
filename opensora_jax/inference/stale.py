"""Whether a latent cache is what a config would make now: training refuses one that is not, and runs no encoder for it.

Settings, captions and clips are compared as `dataset encode` does. Weights are told by the stamps that it leaves in
cache.json; they are read only where those differ, as after a copy without the times of files.
"""

from collections.abc import Callable

from absl import logging

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latents import LatentCache, Origin, other_things
from opensora_jax.data.clips import assigned_rows
from opensora_jax.data.text import Texts
from opensora_jax.inference.encode import EncodeJob, captions_digest, stamps, text_settings
from opensora_jax.inference.latents import clip_digests, latent_settings
from opensora_jax.inference.prompt import encoders_identity
from opensora_jax.parallel.mesh import this_process
from opensora_jax.weights.pretrained import (
    AUTOENCODERS,
    LATENT_FIELDS,
    fingerprint,
    load,
    parse_dtype,
    parse_measured,
)

EARLIER = (
    "clips, captions and weights, of which a cache of an earlier version notes too little (`dataset encode` adds it)"
)


def refuse_stale(cache: LatentCache, job: EncodeJob, *, clips: bool = True) -> None:
    """Raises: UserError naming what a cache is made of and `job` says otherwise.

    Without `clips` the cache is one of others, drawn from the posterior as they may be. Logs in a line what cannot be
    compared. The dtype of the models is no difference (training has its own), nor are conditions and bucket_config.
    """
    unknown: list[str] = []
    if cache.info.origin == Origin():
        _refuse(cache, job, Identity({}, _settings_now(job, clips)))
        unknown = [EARLIER] if cache.info.identity.digests else []
    else:
        _refuse(cache, job, Identity(_clips_now(cache, job, unknown) if clips else {}, _settings_now(job, clips)))
        _refuse(cache, job, Identity(_weights_now(cache, job, unknown), {}))
    if unknown:
        logging.warning("%s: not compared with the config: %s", cache.folder, "; ".join(unknown))


def _refuse(cache: LatentCache, job: EncodeJob, now: Identity) -> None:
    """Raises: UserError unless the cache says the same, of what both know."""
    there = cache.info.identity
    digests = {name: there.digests[name] for name in now.digests if name in there.digests}
    settings = {name: there.settings[name] for name in now.settings if name in there.settings}
    shared = Identity({name: now.digests[name] for name in digests}, {name: now.settings[name] for name in settings})
    if differences := Identity(digests, settings).differences(shared):
        raise other_things(job.latents, differences, cache.info.command)


def _settings_now(job: EncodeJob, clips: bool) -> dict[str, object]:
    module, fields = parse_measured(job.ae, AUTOENCODERS, "config.ae")
    settings = latent_settings(module, fields, job.dtype, job.encode, job.dataset) | text_settings(job.encode)
    free = {"dtype"} | ({"encode.dtype"} if job.encode.dtype is None else set())
    free |= set() if clips else {"encode.posterior", "encode.seed"}
    if "autoencoder weights" not in stamps(job):
        free |= {f"autoencoder.{name}" for name in LATENT_FIELDS}  # measured, and lying beside them
    return {name: value for name, value in settings.items() if name not in free}


def _clips_now(cache: LatentCache, job: EncodeJob, unknown: list[str]) -> dict[str, str]:
    """Returns the digests of the rows that the cache's own bucket_config chooses: training may have another one."""
    origin = cache.info.origin
    try:
        table = job.dataset.table()
    except UserError as error:
        unknown.append(f"clips and captions: {error}")
        return {}
    try:
        rows = assigned_rows(table, job.dataset.buckets(origin.bucket_config), origin.seed)
    except UserError:  # none of them is left
        return {"clips": ""}
    texts = Texts.of(job.encode.texts(table, job.dataset.fps_max), [row for _, row in rows])
    return clip_digests(table, rows) | {"captions": captions_digest(texts)}


def _weights_now(cache: LatentCache, job: EncodeJob, unknown: list[str]) -> dict[str, str]:
    """Returns the digests of weights whose stamps differ."""
    found, here = {}, stamps(job)
    for name, stamp in cache.info.origin.stamps.items():
        if name not in here:
            unknown.append(f"{name}, which are not there")
        elif here[name] != stamp:
            logging.info("%s: the files of its %s have other times than noted: reading them", cache.folder, name)
            found[name] = READ[name](job, cache.info.identity.settings["dtype"])
    return found


def _read_autoencoder(job: EncodeJob, dtype: str) -> str:
    return fingerprint(load(job.ae, AUTOENCODERS, "config.ae", dtype=parse_dtype(dtype), mesh=this_process()))


def _read_texts(job: EncodeJob, dtype: str) -> str:
    return encoders_identity(job.t5, job.clip, parse_dtype(dtype))


READ: dict[str, Callable[[EncodeJob, str], str]] = {
    "autoencoder weights": _read_autoencoder,
    "text encoders": _read_texts,
}
