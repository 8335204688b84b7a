"""The loss on clips that are not trained on, at fixed times: a curve that chance does not move.

Training losses jump with the times that are drawn. Here every look takes the same clips, the same noise and the same
times, so that two looks differ by what was learnt between them.
"""

from collections import defaultdict
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import Array
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.parallel.batch import prefetch
from opensora_jax.training.accumulate import Batch
from opensora_jax.training.diffusion import Objective
from opensora_jax.training.feed import Batches
from opensora_jax.training.periodic import Seen
from opensora_jax.training.state import TrainState

LOSS = "validation_loss"


@dataclass(frozen=True)
class ValidationConfig:
    """A config's `validation` section: every so many steps (0: never), at most `batches` batches, at these `times`.

    The clips lie in `latents`, a cache, where training reads one, else in the table `data_path`.
    """

    every: int
    latents: str
    data_path: str
    batches: int
    times: tuple[float, ...]

    def __post_init__(self):
        """Refuse what measures nothing."""
        if self.every < 0 or self.batches < 1:
            raise ValueError(f"every is at least 0, batches at least 1: got {self.every} and {self.batches}.")
        if not self.times or not all(0 < time <= 1 for time in self.times):
            raise ValueError(f"times lie above 0 (data) and up to 1 (noise), one at least: got {self.times}.")

    def check(self, is_cached: bool) -> None:
        """Raises: UserError when it is not said which clips are to be validated on."""
        name, value = ("latents", self.latents) if is_cached else ("data_path", self.data_path)
        if self.every and not value:
            raise UserError(
                f"config.validation.every={self.every} needs clips that are not trained on: set "
                f"--config.validation.{name}=, or every=0"
            )


class Validation:
    """Looks at a state: the loss of its averaged parameters on the first batches of a plan."""

    def __init__(self, graphdef: nnx.GraphDef, objective: Objective, batches: Batches, config: ValidationConfig):
        self._batches, self._config = batches, config
        buckets = len(batches.plan.buckets)
        if buckets > config.batches:
            logging.warning(
                "validation looks at %d of %d buckets: validation.batches=%d is for all",
                config.batches,
                buckets,
                buckets,
            )

        @jax.jit
        def losses(params: nnx.State, batch: Batch, key: Array) -> Array:
            draws, model = objective.draw(batch, key), nnx.merge(graphdef, params)
            kept = jnp.zeros_like(draws.without_t5)
            draws = draws._replace(without_t5=kept, without_clip=kept)

            def at(time: Array) -> Array:
                return objective(model, batch, draws._replace(t=jnp.full_like(draws.t, time)))[0]

            return jax.lax.map(at, jnp.asarray(config.times, jnp.float32))

        self._losses = losses

    def __call__(self, state: TrainState) -> Seen:
        """Returns the mean loss, that of each time and, where there are several, that of each bucket."""
        plan, mesh, feed = self._batches.plan, self._batches.mesh, self._batches.feed
        count = min(self._config.batches, len(plan))
        by_bucket, params = defaultdict(list), state.averaged_params
        batches = prefetch(self._batches(0, count), mesh)
        for number, batch in enumerate(tqdm(batches, total=count, desc="validate", leave=False)):
            key = jax.random.fold_in(jax.random.key(plan.seed), number)
            by_bucket[str(plan[number].bucket)].append(np.asarray(self._losses(params, feed.encode(batch), key)))
        means = {bucket: np.mean(losses) for bucket, losses in by_bucket.items()}
        of_times = np.mean([loss for losses in by_bucket.values() for loss in losses], axis=0)
        found = {LOSS: float(of_times.mean())}
        found |= {f"{LOSS}_t{time:g}": float(loss) for time, loss in zip(self._config.times, of_times, strict=True)}
        found |= {f"{LOSS} of {bucket}": float(mean) for bucket, mean in means.items()} if len(means) > 1 else {}
        return Seen(found, {})
