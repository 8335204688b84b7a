"""Steps compiled ahead: for every shape of batch, with their memory, and refused where that is too large."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.parallel.batch import abstract_batch, batch_sharding, data_share, to_devices
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training import programs
from opensora_jax.training.programs import Assembled, Programs


def step(state, batch, key):
    return state + batch["x"].sum(), {"mean": batch["x"].mean()}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, seq=1, tensor=2))


@pytest.fixture
def state(mesh):
    return jax.device_put(jnp.zeros(()), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def assembled(state, **more):
    abstract = jax.ShapeDtypeStruct(state.shape, state.dtype, sharding=state.sharding)
    return Assembled(None, abstract, lambda: state, step, **more)


def shapes(length, mesh):
    return abstract_batch(batch(length), mesh)


def batch(length):
    return {"x": np.ones((8, length), np.float32), "step": np.asarray(3)}


def test_every_shape_has_its_program_and_no_step_compiles(mesh, state):
    made = Programs(assembled(state), mesh)
    found = made.compile({"short": shapes(3, mesh), "long": shapes(5, mesh)})
    assert [(one.bucket, one.samples) for one in found] == [("short", 8), ("long", 8)]
    assert all(one.peak_bytes > one.state_bytes > 0 for one in found)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "_step", None)
        for length in (5, 3):
            state, metrics = made(state, to_devices(batch(length), mesh), made.key(0))
            assert float(metrics["mean"]) == 1
    assert float(state) == 64


def test_a_step_that_is_due_does_not_wait_for_those_begun_before_it(mesh, state, monkeypatch):
    monkeypatch.setattr(programs, "compilers_at_once", lambda: 1)
    made, asked, begun, end = Programs(assembled(state), mesh), [], threading.Event(), threading.Event()

    def compile_slowly(name, batch):
        asked.append(name)
        begun.set()
        end.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(made, "_compile", compile_slowly)
        made.begin({"first": shapes(3, mesh), "second": shapes(4, mesh), "due": shapes(5, mesh)})
        assert begun.wait(60)
    here = to_devices(batch(5), mesh)
    assert made.bucket(here) == "due"
    assert float(made(state, here, made.key(0))[1]["mean"]) == 1
    made.close()
    end.set()
    made._pool.shutdown()
    assert asked == ["first"]


def test_what_lies_on_a_device_already_is_not_free(mesh, state, monkeypatch):
    monkeypatch.setattr(programs, "device_memory", lambda mesh: 20_000)
    monkeypatch.setattr(programs, "resident_bytes", lambda mesh: 17_000)  # encoders
    with pytest.raises(UserError, match="long needs"):
        Programs(assembled(state), mesh).compile({"long": shapes(500, mesh)})
    monkeypatch.setattr(programs, "resident_bytes", lambda mesh: 0)
    Programs(assembled(state), mesh).compile({"long": shapes(500, mesh)})


@pytest.mark.parametrize(
    ("known", "on_gpus", "expected"), [(True, False, "begin"), (True, True, "compile"), (False, False, "compile")]
)
def test_steps_that_fit_are_compiled_beside_a_run_but_not_on_gpus(mesh, state, monkeypatch, known, on_gpus, expected):
    made, asked = Programs(assembled(state), mesh), []
    made._on_gpus = on_gpus
    for name in ("begin", "compile"):
        monkeypatch.setattr(made, name, lambda examples, name=name: asked.append(name))
    made.prepare({}, known_to_fit=known)
    assert asked == [expected]


def test_a_step_begun_ahead_that_does_not_fit_is_refused_when_it_is_due(mesh, state, monkeypatch):
    monkeypatch.setattr(programs, "device_memory", lambda mesh: 3000)
    made = Programs(assembled(state), mesh)
    made.begin({"long": shapes(500, mesh)})
    with pytest.raises(UserError, match=r"long needs .* for 8 samples"):
        made(state, to_devices(batch(500), mesh), made.key(0))


def test_a_step_that_does_not_fit_is_refused_with_what_would(mesh, state, monkeypatch):
    monkeypatch.setattr(programs, "device_memory", lambda mesh: 3000)
    made = Programs(assembled(state, remedies="Recompute more."), mesh)
    with pytest.raises(
        UserError,
        match=r"1 bucket\(s\) do not fit .* long needs .* for 8 samples.* Lower its batch size \(about \d+ samples .*, "
        r"or raise mesh.fsdp or mesh.seq\. Recompute more$",
    ):
        made.compile({"short": shapes(3, mesh), "long": shapes(500, mesh)})


def test_the_compiler_gets_the_options_of_the_platform(mesh, state):
    example = {"short": shapes(3, mesh)}
    Programs(assembled(state, options={"tpu": {"xla_no_such_option": True}}), mesh).compile(example)
    with pytest.raises(UserError, match=r"No such compile option: 'xla_no_such_option'.*config\.compiler_options"):
        Programs(assembled(state, options={"cpu": {"xla_no_such_option": True}}), mesh).compile(example)
    with pytest.raises(UserError, match=r"xla_cpu_use_fusion_emitters.*config\.compiler_options"):
        Programs(assembled(state, options={"cpu": {"xla_cpu_use_fusion_emitters": "perhaps"}}), mesh).compile(example)


def test_one_process_reads_all_samples(mesh):
    assert data_share(mesh) == (0, 1)
    assert batch_sharding(mesh).shard_shape((8,)) == (2,)
