"""What a denoiser's training reads: samples in the order of a plan, with the condition each is trained with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import pyarrow as pa
from jax.sharding import Mesh

from opensora_jax.data.loader import Batch, LoaderConfig, Source, example_batches, make_loader
from opensora_jax.data.plan.auto import BucketConfig
from opensora_jax.data.plan.plan import Assigner, Plan
from opensora_jax.parallel.batch import abstract_batch, data_share
from opensora_jax.training.conditions import ConditionMix
from opensora_jax.training.diffusion import NullText


class Feed(NamedTuple):
    """What training reads: a plan's table and buckets, samples, and how a batch on the devices is encoded."""

    table: pa.Table
    buckets: Callable[[BucketConfig], Assigner]
    source: Source
    null: NullText
    key: str  # of what latents and texts are made of
    latent_frames: Callable[[dict[str, Any]], int]
    encode: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch
    abstract: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch


@dataclass(frozen=True)
class Batches:
    """This host's batches of a plan, with the condition of each sample; called with the first step and the last."""

    feed: Feed
    plan: Plan
    mix: ConditionMix
    mesh: Mesh
    loader: LoaderConfig

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        """Returns the batches of steps start .. stop - 1."""
        host, source = data_share(self.mesh), self.feed.source
        loader = make_loader(self.plan, source, start_step=start, num_steps=stop - start, host=host, config=self.loader)
        return map(self._conditioned, loader)

    def examples(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Returns bucket -> shapes of what a step reads."""
        found = example_batches(self.plan, self.feed.source, host=data_share(self.mesh))
        placed = {name: abstract_batch(self._conditioned(batch), self.mesh) for name, batch in found.items()}
        return {name: self.feed.abstract(batch) for name, batch in placed.items()}

    def _conditioned(self, batch: Batch) -> Batch:
        return self.mix.add(batch, self.plan.seed, self.feed.latent_frames(batch))
