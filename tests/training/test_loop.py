"""The loop on a model of one matrix: exact continuation, other meshes, and checkpoints that do not fit."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.nn.linear import Linear
from opensora_jax.parallel.batch import abstract_batch
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training import checkpoint
from opensora_jax.training import preemption as preemption_module
from opensora_jax.training.loop import LoopConfig, Run
from opensora_jax.training.metrics import MetricsWriter, read_metrics
from opensora_jax.training.optimizer import Optimizer
from opensora_jax.training.periodic import Periodic, Seen
from opensora_jax.training.preemption import Preemption
from opensora_jax.training.profiling import ProfileConfig
from opensora_jax.training.programs import Assembled, Programs
from opensora_jax.training.state import make_train_step, plan_state
from opensora_jax.training.wandb_writer import WandbConfig
from opensora_jax.weights.workdir import Stored
from tests.training.losses import Keyed

ADAM = Optimizer(optax.scale_by_adam(), lambda step: 1e-2, grad_clip=float("inf"))
META = {"type": "linear", "model": {"size": 8}, "ema": True}


def loss(model, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    return jnp.mean((model(batch["x"] + 0.1 * noise) - 1) ** 2), {}


def batches(start, stop):
    for step in range(start, stop):
        x = np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32)
        replaced = np.arange(8) < (3 if step in (1, 5) else 0)
        yield {"x": x, "step": np.asarray(step), "replaced": replaced}


LOOP = LoopConfig(
    num_steps=1,
    log_every=1,
    ckpt_every=2,
    keep_n_latest=2,
    keep_every=0,
    max_skipped=0,
    on_full_disk="stop",
    profile=ProfileConfig(at=0, steps=1),
    wandb=WandbConfig(project="", name=""),
)


def train(
    workdir,
    steps,
    *,
    mesh=(-1, 1, 1, 1),
    meta=META,
    stop_after=None,
    make_batches=batches,
    periodic=(),
    preemption=None,
    **loop,
):
    mesh = make_mesh(MeshConfig(*mesh))
    graphdef, abstract, init = plan_state(lambda: Linear(8, 8, rngs=nnx.Rngs(0)), ADAM, mesh, ema=True)

    def some(start, stop):
        for batch in make_batches(start, stop):
            if stop_after is not None and batch["step"] == stop_after:
                raise KeyboardInterrupt
            yield batch

    run = Run(workdir, "test", 3, mesh, replace(LOOP, num_steps=steps, **loop), meta, {"loop": {"num_steps": steps}})
    run = run if preemption is None else replace(run, preemption=preemption)
    step = make_train_step(graphdef, Keyed(loss), ADAM, ema_decay=0.9)
    examples = {"all": abstract_batch(next(batches(0, 1)), mesh)}
    return run.fit(Assembled(graphdef, abstract, init, step), some, examples, periodic=periodic)


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir / "metrics.jsonl")]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_an_interrupted_run_continues_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", 7)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 7, stop_after=5)  # the last checkpoint is that of step 4
    killed = tmp_path / "cut" / "checkpoints" / "5.orbax-checkpoint-tmp"
    killed.mkdir()
    assert_same(train(tmp_path / "cut", 7), whole)
    assert not killed.exists()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == list(range(1, 8))


def test_a_run_that_continues_on_the_same_devices_begins_before_all_is_compiled(tmp_path, monkeypatch):
    known = []
    prepare = Programs.prepare
    monkeypatch.setattr(
        Programs, "prepare", lambda self, examples, known_to_fit: known.append(known_to_fit) or self.compile(examples)
    )
    train(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 6, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 6, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 6, stop_after=5, mesh=(2, 2, 1, 2))
    assert known == [False, False, True, False]  # another schedule, the same, other devices
    monkeypatch.setattr(Programs, "prepare", prepare)
    monkeypatch.setattr(Programs, "compile", None)
    train(tmp_path, 6)


def test_a_checkpoint_holds_the_config_and_the_versions_it_was_made_with(tmp_path, caplog, monkeypatch):
    train(tmp_path, 2)
    meta = Stored(tmp_path).meta
    assert meta["config"] == {"loop": {"num_steps": 2}}
    assert meta["versions"]["jax"] == jax.__version__
    monkeypatch.setattr(checkpoint, "versions", lambda: meta["versions"] | {"jax": "0.1"})
    with caplog.at_level("INFO", logger="absl"):
        train(tmp_path, 4)
    assert f"step 2 was saved with jax {jax.__version__}: losses may differ" in caplog.text


def test_replaced_samples_are_counted_through_a_restart(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 7, stop_after=5)
    train(tmp_path, 7)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["replaced_samples"] for line in lines] == [0, 3, 3, 3, 3, 6, 6]
    assert all(line["data_wait_seconds"] >= 0 for line in lines)


def test_a_run_continues_on_another_mesh_with_the_same_losses(tmp_path):
    train(tmp_path / "one", 6, mesh=(2, 2, 1, 2))
    train(tmp_path / "other", 2, mesh=(8, 1, 1, 1))
    state = train(tmp_path / "other", 6, mesh=(1, 4, 1, 2))
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


def test_the_config_of_another_run_is_refused_with_the_fields_that_have_changed(tmp_path):
    train(tmp_path, 2, meta=META | {"plan": "one"})
    with pytest.raises(UserError, match=r"plan is 'one' there and 'two' .*config\.json .* changed: loop\.num_steps$"):
        train(tmp_path, 4, meta=META | {"plan": "two"})


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
    mesh = make_mesh(MeshConfig(2, 4, 1, 1))
    _, abstract, random = plan_state(lambda: Linear(8, 8, rngs=nnx.Rngs(0)), ADAM, mesh, ema=True)
    ours = jax.tree.map(lambda leaf: 2 * leaf, random().params)
    expected = jax.device_get(ours)  # the parameters themselves are given away
    _, _, init = plan_state(lambda: Linear(8, 8, rngs=nnx.Rngs(0)), ADAM, mesh, ema=True, pretrained=lambda: ours)
    state = init()
    assert_same(state.params, expected)
    assert_same(state.ema, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, abstract)


def spoiled(*steps):
    """Returns batches that hold a NaN at these steps."""

    def some(start, stop):
        for batch in batches(start, stop):
            yield batch | {"x": batch["x"] * np.float32(np.nan)} if int(batch["step"]) in steps else batch

    return some


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path):
    state = train(tmp_path, 6, make_batches=spoiled(2, 3), max_skipped=2)
    assert int(state.skipped) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
    assert int(state.step) == 6


def test_too_many_skipped_updates_end_the_run_with_its_last_good_state(tmp_path):
    with pytest.raises(UserError, match="2 updates until step 4 had a loss or gradient that is not finite"):
        train(tmp_path, 9, make_batches=spoiled(2, 3, 4, 5), max_skipped=1)
    assert int(train(tmp_path, 9, max_skipped=1).step) == 9


def test_sigterm_saves_the_step_and_exits_with_status_0(tmp_path):
    def some(start, stop):
        for batch in batches(start, stop):
            if int(batch["step"]) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "cut", 9, make_batches=some)
    assert ended.value.code == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    kept = max(int(path.name) for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert kept == 5  # the batch of step 6 was asked for while step 5 ran
    assert_same(train(tmp_path / "cut", 9), train(tmp_path / "whole", 9))


def test_sigterm_during_the_last_step_is_noted_for_what_comes_next(tmp_path):
    def last(start, stop):
        yield from batches(start, stop)
        os.kill(os.getpid(), signal.SIGTERM)  # batches are asked for a step ahead

    preemption = Preemption()
    assert int(train(tmp_path, 4, make_batches=last, preemption=preemption).step) == 4
    assert preemption.told
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_several_processes_ask_for_numbers_that_grow_over_runs(monkeypatch):
    """JAX stops at the number after the last one asked for: a stage that counts from 1 again would pass it by."""
    asked, answers = [], iter([False, False, True])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    ask = lambda number: asked.append(number) or next(answers)  # noqa: E731
    monkeypatch.setattr(preemption_module.multihost_utils, "reached_preemption_sync_point", ask)
    for _ in range(2):
        with Preemption() as first:
            assert not first.is_due()
    with Preemption() as second:
        assert second.is_due()
    assert second.told
    assert asked == list(range(asked[0], asked[0] + 3))


def test_what_looks_at_the_state_does_so_now_and_then_and_at_the_end(tmp_path):
    seen = []

    def look(state):
        seen.append(int(state.step))
        return Seen({"seen": 10.0 * int(state.step)}, {})

    def other(state):
        return Seen({"other": 1.0}, {})

    train(tmp_path, 7, log_every=5, periodic=[Periodic(3, look), Periodic(0, other)])
    assert seen == [3, 6, 7]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [3, 5, 6, 7]
    assert [(line["step"], line["seen"]) for line in lines if "seen" in line] == [(3, 30.0), (6, 60.0), (7, 70.0)]
    assert not any("other" in line for line in lines)


@pytest.mark.parametrize("every", [2, 3])
def test_a_look_that_fails_leaves_the_step_that_it_looked_at_saved(tmp_path, every):
    def look(state):
        raise MemoryError

    with pytest.raises(MemoryError):
        train(tmp_path / "run", 3, periodic=[Periodic(every, look)])
    assert Stored(tmp_path / "run").latest_step == every
    assert_same(train(tmp_path / "run", 3), train(tmp_path / "whole", 3))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


# Threads of Orbax that meet a full disk leave coroutines behind.
ORBAX_THREADS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def disk(tmp_path):
    """Returns a disk of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "disk", str(place)], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def filling(disk, free=None):
    """Returns batches in front of which the disk gets full once step 2 is saved, and free again before another."""

    def some(start, stop):
        for batch in batches(start, stop):
            if int(batch["step"]) == 3:
                deadline = time.monotonic() + 60
                while not (disk / "run" / "checkpoints" / "2").exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                    while file.write(b"x" * 4096):
                        pass
            if int(batch["step"]) == free:
                (disk / "filler").unlink()
            yield batch

    return some


@ORBAX_THREADS
def test_a_full_disk_stops_a_run_that_keeps_its_last_checkpoint(disk):
    with pytest.raises(UserError, match=r"no space is left.* keeps the checkpoint of step 2, where the same command"):
        train(disk / "run", 9, make_batches=filling(disk))
    assert sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()) == ["2"]
    (disk / "filler").unlink()
    assert int(train(disk / "run", 9).step) == 9


@ORBAX_THREADS
def test_a_run_may_go_on_without_the_checkpoints_that_a_full_disk_refuses(disk, tmp_path, caplog):
    state = train(disk / "run", 9, make_batches=filling(disk, free=7), on_full_disk="go_on")
    assert "keeps the checkpoint of step 2; training goes on" in caplog.text
    assert sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()) == ["8", "9"]
    assert_same(state, train(tmp_path / "whole", 9))


@ORBAX_THREADS
def test_the_last_checkpoint_has_to_be_saved_even_where_a_run_goes_on(disk, caplog):
    saves, state = checkpoint.Checkpoints(disk / "run", 1, goes_on=True), {"weights": jnp.zeros(1000)}
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass

    def save_last():
        saves.save(4, state, {}, last=True)
        saves.close()

    saves.save(2, state, {})
    with pytest.raises(UserError, match="keeps no checkpoint yet, where the same command continues"):
        save_last()
    assert "keeps no checkpoint yet; training goes on" in caplog.text


def test_a_metric_that_the_disk_refuses_leaves_the_save_under_way(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, 1)
    checkpoints.save(6, {"weights": jnp.zeros(3)}, {})  # waits until the thread that tidies up is done
    saving = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    saving.mkdir()
    with pytest.raises(UserError, match="where the same command continues"), checkpoints.refusals():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert saving.is_dir()
    checkpoints.close()
