"""Validation: a mean over fixed clips, noise and times, of the averaged parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.data.loader import LoaderConfig
from opensora_jax.data.plan.buckets import Assignment, Bucket
from opensora_jax.data.plan.plan import Rounds
from opensora_jax.diffusion import flow
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training.conditions import ConditionMix
from opensora_jax.training.diffusion import DropoutRatio, FlowConfig, NullText, Objective
from opensora_jax.training.feed import Batches, Feed
from opensora_jax.training.state import TrainState
from opensora_jax.training.validation import Validation, ValidationConfig

BUCKETS = Bucket("8px", "1:1", 5, 8, 8, 1), Bucket("8px", "3:2", 1, 12, 8, 1)
ROWS = 22
NULL = NullText(jnp.zeros((3, 7)), jnp.zeros(5))


class Two:
    """Sorts rows into two buckets by their number."""

    def assign(self, table, *, seed):
        return Assignment(np.arange(len(table)) % 2, BUCKETS, ())


class Latents:
    """Latents of noise drawn by the number of their row."""

    def read(self, sample_id, bucket, seed):
        draw = np.random.default_rng(sample_id)
        shape = (1 + bucket.num_frames // 4, bucket.height // 4, bucket.width // 4, 3)
        sizes = {"latent": shape, "text": (3, 7), "pooled": (5,)}
        return {name: draw.standard_normal(size).astype(np.float32) for name, size in sizes.items()}

    def refuse(self, sample_id, error):
        raise error


class Model(nnx.Module):
    """A velocity that tells what it was given."""

    def __init__(self):
        self.gain = nnx.Param(jnp.float32(1.0))

    def __call__(self, x, t, text, pooled, condition, guidance):
        seen = text.mean((1, 2)) + pooled.mean(1) + t
        return self.gain[...] * (x + seen[:, None, None, None, None])


def look(mesh, times=(0.25, 1.0), count=3, gain=0.5):
    feed = Feed(pa.table({"row": range(ROWS)}), Two(), Latents(), NULL, "", lambda batch: batch["latent"].shape[1])
    plan = Rounds(feed.table, feed.buckets, seed=0, data_shards=4, small_buckets="repeat")
    mix = ConditionMix.parse({"t2v": 1.0}, True)
    objective = Objective(FlowConfig("uniform", False, None), DropoutRatio(1.0, 1.0), NULL, mix, None, False)
    config = ValidationConfig(1, "cache", "", count, times)
    graphdef, params = nnx.split(Model())
    average = jax.tree.map(lambda leaf: gain * leaf, params)
    zero = jnp.int32(0)
    state = TrainState(zero, params, average, None, zero, None)
    validation = Validation(graphdef, objective, Batches(feed, plan, mix, mesh, LoaderConfig(1, 1)), config)
    with jax.set_mesh(mesh):
        return validation(state).scalars, plan


def test_it_is_the_mean_over_batches_and_times_without_dropped_text():
    found, plan = look(make_mesh(MeshConfig(2, 2, 1, 2)))
    losses = []
    for number in range(3):
        batch = [Latents().read(row, plan[number].bucket, 0) for row in plan[number].sample_ids]
        latent, text, pooled = (jnp.stack([one[name] for one in batch]) for name in ("latent", "text", "pooled"))
        key = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 3)[1]
        noise = jax.random.normal(key, latent.shape)
        for time in (0.25, 1.0):
            x = flow.interpolate(latent, noise, jnp.full(4, time))
            seen = text.mean((1, 2)) + pooled.mean(1) + time
            losses.append(np.mean((0.5 * (x + seen[:, None, None, None, None]) - flow.target(latent, noise)) ** 2))
    losses = np.reshape(losses, (3, 2))
    assert found["validation_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["validation_loss_t0.25"] == pytest.approx(losses[:, 0].mean(), rel=1e-5)
    assert found["validation_loss_t1"] == pytest.approx(losses[:, 1].mean(), rel=1e-5)
    buckets = {str(plan[number].bucket) for number in range(3)}
    assert {name for name in found if " of " in name} == {f"validation_loss of {name}" for name in buckets}


def test_looking_twice_gives_the_same_and_the_average_is_what_is_looked_at():
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    first, again, other = look(mesh)[0], look(mesh)[0], look(mesh, gain=0.25)[0]
    assert first == again
    assert first["validation_loss"] != other["validation_loss"]


def test_buckets_that_are_never_looked_at_are_told_of(caplog):
    found, _ = look(make_mesh(MeshConfig(2, 2, 1, 2)), count=1)
    assert not any(" of " in name for name in found)
    assert "validation looks at 1 of 2 buckets: validation.batches=2 is for all" in caplog.text


def test_no_more_batches_are_read_than_an_epoch_has():
    found, plan = look(make_mesh(MeshConfig(2, 2, 1, 2)), count=1000)
    assert len(plan) < 10
    assert np.isfinite(found["validation_loss"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"times": ()}, "times lie above 0"),
        ({"times": (0.0, 0.5)}, "times lie above 0"),
        ({"batches": 0}, "batches at least 1"),
    ],
)
def test_what_measures_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**{"every": 1, "latents": "", "data_path": "", "batches": 1, "times": (0.5,)} | fields)


def test_clips_have_to_be_named():
    with pytest.raises(UserError, match=r"set --config\.validation\.latents=, or every=0"):
        ValidationConfig(5, "", "table.parquet", 1, (0.5,)).check(is_cached=True)
    ValidationConfig(0, "", "", 1, (0.5,)).check(is_cached=True)
