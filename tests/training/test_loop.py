"""The loop on a model of one matrix: exact continuation, other meshes, and checkpoints that do not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.nn.linear import Linear
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training.loop import LoopConfig, Run
from opensora_jax.training.metrics import MetricsWriter, read_metrics
from opensora_jax.training.state import make_train_step, plan_state

META = {"type": "linear", "model": {"size": 8}, "ema": True}


def loss(model, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    return jnp.mean((model(batch["x"] + 0.1 * noise) - 1) ** 2), {}


def batches(start, stop):
    for step in range(start, stop):
        yield {"x": np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32), "step": np.asarray(step)}


def train(workdir, steps, *, mesh=(-1, 1, 1), meta=META, stop_after=None):
    mesh = make_mesh(MeshConfig(*mesh))
    tx = optax.adam(1e-2)
    graphdef, abstract, init = plan_state(lambda: Linear(8, 8, rngs=nnx.Rngs(0)), tx, mesh, ema=True)

    def some(start, stop):
        for batch in batches(start, stop):
            if stop_after is not None and batch["step"] == stop_after:
                raise KeyboardInterrupt
            yield batch

    config = LoopConfig(num_steps=steps, log_every=1, ckpt_every=2, keep_n_latest=2)
    run = Run(workdir, "test", 3, mesh, config, meta, {"loop": {"num_steps": steps}})
    return run.fit(make_train_step(graphdef, loss, tx, ema_decay=0.9), init, abstract, some)


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir / "metrics.jsonl")]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_an_interrupted_run_continues_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", 7)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 7, stop_after=5)  # the last checkpoint is that of step 4
    assert_same(train(tmp_path / "cut", 7), whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == list(range(1, 8))


def test_a_run_continues_on_another_mesh_with_the_same_losses(tmp_path):
    train(tmp_path / "one", 6, mesh=(2, 2, 2))
    train(tmp_path / "other", 2, mesh=(8, 1, 1))
    state = train(tmp_path / "other", 6, mesh=(1, 4, 2))
    assert state.params["kernel"][...].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(tmp_path / "one"), rtol=1e-6)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    assert_same(train(tmp_path, 4), train(tmp_path, 4))
    with pytest.raises(UserError, match="at step 4, past num_steps=3"):
        train(tmp_path, 3)


def test_a_checkpoint_of_another_model_is_refused_with_the_field(tmp_path):
    train(tmp_path, 2)
    with pytest.raises(UserError, match=r"model\.size is 8 there and 16 in the config"):
        train(tmp_path, 4, meta=META | {"model": {"size": 16}})


def test_a_folder_of_unreadable_steps_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(UserError, match="steps that cannot be read"):
        train(tmp_path, 8)


def test_the_average_follows_the_parameters(tmp_path):
    state = train(tmp_path, 5)
    assert not np.allclose(state.ema["kernel"][...], state.params["kernel"][...])
    assert int(state.step) == 5


def test_metrics_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n" + '{"step": 2, "lo')
    MetricsWriter(tmp_path, 1).close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_run_starts_from_given_parameters_and_an_average_of_them():
    mesh = make_mesh(MeshConfig(2, 4, 1))
    _, abstract, random = plan_state(lambda: Linear(8, 8, rngs=nnx.Rngs(0)), optax.adam(1e-2), mesh, ema=True)
    ours = jax.tree.map(lambda leaf: 2 * leaf, random().params)
    expected = jax.device_get(ours)  # the parameters themselves are given away
    _, _, init = plan_state(
        lambda: Linear(8, 8, rngs=nnx.Rngs(0)), optax.adam(1e-2), mesh, ema=True, pretrained=lambda: ours
    )
    state = init()
    assert_same(state.params, expected)
    assert_same(state.ema, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, abstract)
