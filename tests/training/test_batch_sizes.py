"""Batch sizes that memory decides: the search, on known functions and on compiled steps, and what a workdir keeps."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.parallel.batch import abstract_batch
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training import batch_sizes
from opensora_jax.training.batch_sizes import AutoBatchConfig, BatchSizes, largest_fitting, scaled
from opensora_jax.training.programs import GIB, Assembled, Program, Programs, TooLargeError
from tests.environment import cpu_devices, free_port

ROOT = Path(__file__).parents[2]
CONFIG = {"48px": {129: (1.0, "auto"), 33: ((1.0, 0.5), "auto"), 1: (0.5, 7)}}
LONG, SHORT = ("48px", 129), ("48px", 33)
BUCKETS = [
    Bucket("48px", "16:9", 129, 32, 64, 1),
    Bucket("48px", "1:1", 129, 48, 48, 1),  # the most pixels
    Bucket("48px", "1:1", 33, 48, 48, 1),
    Bucket("48px", "1:1", 1, 48, 48, 7),
]
STATE = 1 << 20
PER_PIXEL = 1 << 5


def search(function, limit, largest=1024):
    """Returns what is found and the calls it took; it must have been measured to fit."""
    calls = []

    def peak_bytes(size):
        assert size not in calls
        calls.append(size)
        return function(size)

    found = largest_fitting(peak_bytes, limit, largest)
    assert found == max((size for size in calls if function(size) <= limit), default=0)
    return found, calls


@pytest.mark.parametrize("fitting", [1, 2, 3, 5, 7, 12, 37, 101, 523, 1023])
def test_a_straight_line_takes_four_programs(fitting):
    found, calls = search(lambda n: 1000 + 60 * n, 1000 + 60 * fitting + 59)
    assert fitting - fitting // 16 <= found <= fitting
    assert calls[:2] == [1, 2]
    assert len(calls) <= 4


@pytest.mark.parametrize("limit", [3000, 4999, 10001, 33333])
@pytest.mark.parametrize(
    "function",
    [
        lambda n: 500 + 90 * math.ceil(n / 8) * 8,  # in steps
        lambda n: max(2500, 100 + 130 * n),  # flat, as long as the optimiser needs more than the activations
        lambda n: 500 + 70 * n + n * n,  # faster than a line
        lambda n: 2000 + 300 * math.sqrt(n),  # slower
        lambda n: 500 + 100 * n if n < 40 else math.inf,  # the compiler refuses the others
        lambda n: 500 + 100 * n if n < 300 else 10**9,
    ],
)
def test_other_shapes_are_found_within_a_sixteenth_by_few_programs(function, limit):
    found, calls = search(function, limit)
    best = max((n for n in range(1, 1025) if function(n) <= limit), default=0)
    assert len(calls) <= 11
    assert best - max(1, best // 16) <= found <= best


def test_bytes_that_fall_back_still_end_in_a_size_that_fits():
    rng = np.random.default_rng(0)
    for _ in range(200):
        noise = rng.uniform(0.8, 1.2, 1025)
        found, calls = search(lambda n, noise=noise: (500 + 100 * n) * noise[n], int(rng.uniform(1000, 100_000)))
        assert found
        assert len(calls) <= 14


def test_the_largest_is_the_end_of_the_search():
    assert search(lambda n: 10 + n, 10**9) == (1024, [1, 2, 1024])
    assert search(lambda n: 10, 10**9)[0] >= 1024 - 1024 // 16  # no line to follow
    assert search(lambda n: 10 + n, 10**9, largest=1) == (1, [1])
    assert search(lambda n: 10 + n, 10**9, largest=2) == (2, [1, 2])


def test_nothing_fits_when_one_sample_does_not():
    assert search(lambda n: 10 + n, 10) == (0, [1])
    assert search(lambda n: math.inf, 10) == (0, [1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_gib": 0.0}, "memory_gib is above 0"),
        ({"headroom": 1.0}, "0 <= headroom < 1: got 1.0"),
        ({"headroom": -0.1}, "0 <= headroom < 1"),
        ({"largest": 0}, "largest is at least 1: got 0"),
    ],
)
def test_a_config_that_leaves_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(**fields)


def config_of(**fields):
    return AutoBatchConfig(**{"memory_gib": 1.0, "headroom": 0.0, "largest": 1024} | fields)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, seq=1, tensor=2))


def batch_of(bucket, mesh):
    """Returns the batch of a bucket: one value for every pixel, and a scalar."""
    shape = (4, bucket.num_frames * bucket.height * bucket.width)
    return abstract_batch({"x": np.broadcast_to(np.float32(0), shape), "step": np.asarray(3)}, mesh)


class Known:
    """Measures by a formula and remembers for what."""

    def __init__(self, per_pixel=PER_PIXEL):
        self.per_pixel, self.calls = per_pixel, []

    def __call__(self, name, batch):
        samples, pixels = batch["x"].shape
        self.calls.append((name, samples // 4))
        return Program(name, samples, 0.0, STATE + samples // 4 * pixels * self.per_pixel, STATE)


def choose(tmp_path, mesh, measure, config=CONFIG, buckets=BUCKETS, depends=None, **fields):
    sizes = BatchSizes(tmp_path / "run", config_of(**fields), mesh, measure, depends or {"model": {"depth": 2}})
    return sizes.choose(config, buckets, {str(bucket): batch_of(bucket, mesh) for bucket in buckets})


def begin(tmp_path, step=5):
    (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)


@pytest.fixture
def log(caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        yield caplog


def test_a_batch_is_scaled_where_it_has_samples(mesh):
    found = scaled(batch_of(BUCKETS[3], mesh), 3)
    assert found["x"].shape == (12, 48 * 48)
    assert found["x"].dtype == np.float32
    assert found["x"].sharding.shard_shape(found["x"].shape) == (3, 48 * 48)
    assert found["step"].shape == ()


def test_the_bucket_with_the_most_pixels_decides_for_its_line(tmp_path, mesh, log):
    measure = Known()
    found = choose(tmp_path, mesh, measure)
    sizes = {line: (GIB - STATE) // (line[1] * 48 * 48 * PER_PIXEL) for line in (LONG, SHORT)}
    assert found[LONG] <= sizes[LONG] <= found[LONG] * 17 / 16
    assert found[SHORT] <= sizes[SHORT] <= found[SHORT] * 17 / 16
    assert {name for name, _ in measure.calls} == {str(BUCKETS[1]), str(BUCKETS[2])}
    assert len(measure.calls) <= 8
    assert f"kept in {tmp_path}/run/batch_sizes.json" in log.text
    assert re.search(rf"48px, 129 frames +{found[LONG]} samples of a data shard +0\.9\d\d GiB", log.text)


def test_headroom_and_what_lies_on_the_device_stay_free(tmp_path, mesh, monkeypatch):
    half = choose(tmp_path / "a", mesh, Known(), headroom=0.5)
    monkeypatch.setattr(batch_sizes, "resident_bytes", lambda mesh: GIB // 2)
    assert choose(tmp_path / "b", mesh, Known()) == half
    assert half[LONG] <= GIB / 2 / (129 * 48 * 48 * PER_PIXEL)


def test_a_line_without_samples_gets_one(tmp_path, mesh):
    measure = Known()
    assert choose(tmp_path, mesh, measure, buckets=BUCKETS[2:])[LONG] == 1
    assert choose(tmp_path, mesh, measure)[LONG] > 1  # once it has some, it is searched


def test_the_next_start_compiles_nothing(tmp_path, mesh):
    found, again = choose(tmp_path, mesh, Known()), Known()
    assert choose(tmp_path, mesh, again) == found
    begin(tmp_path)
    assert choose(tmp_path, mesh, again) == found
    assert again.calls == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"depends": {"model": {"depth": 3}}}, "model.depth = 3 (was 2)"),
        ({"memory_gib": 0.5}, "auto_batch.memory_gib = 0.5 (was 1.0)"),
        ({"largest": 3}, "auto_batch.largest = 3 (was 1024)"),
    ],
)
def test_other_settings_search_again_before_the_first_checkpoint(tmp_path, mesh, log, changed, said):
    choose(tmp_path, mesh, Known())
    found, again = choose(tmp_path, mesh, Known(), **changed), Known()
    assert f"48px, 129 frames: searched again, for {said}" in log.text
    assert found == choose(tmp_path / "anew", mesh, Known(), **changed)
    assert choose(tmp_path, mesh, again, **changed) == found
    assert again.calls == []


def test_a_killed_search_goes_on_at_the_next_line(tmp_path, mesh):
    def killed(name, batch):
        if "33 frames" in name:
            raise KeyboardInterrupt
        return Known()(name, batch)

    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path, mesh, killed)
    again = Known()
    assert choose(tmp_path, mesh, again) == choose(tmp_path / "whole", mesh, Known())
    assert {name for name, _ in again.calls} == {str(BUCKETS[2])}


def test_checkpoints_keep_their_sizes_as_long_as_these_fit(tmp_path, mesh, log):
    found, other = choose(tmp_path, mesh, Known()), make_mesh(MeshConfig(data=1, fsdp=4, seq=1, tensor=2))
    begin(tmp_path)
    less = Known(PER_PIXEL // 2)
    assert choose(tmp_path, other, less) == found
    assert less.calls == [(str(BUCKETS[1]), found[LONG]), (str(BUCKETS[2]), found[SHORT])]
    said = f"129 frames: stays at {found[LONG]}, which the checkpoints are tied to, with mesh.data = 1 (was 2)"
    assert said in log.text
    with pytest.raises(UserError) as refusal:
        choose(tmp_path, other, Known(PER_PIXEL * 2))
    assert re.fullmatch(
        rf"the checkpoints of {tmp_path}/run are tied to {found[LONG]} samples of a data shard for 48px, 129 frames, "
        r"but with mesh.data = 1 \(was 2\), mesh.fsdp = 4 \(was 2\) that needs 1\.\d+ GiB, 0\.001 of them for the "
        r"state, of 1\.000 GiB of a device: raise model.grad_ckpt_settings, .* or give another workdir",
        str(refusal.value),
    )
    assert choose(tmp_path, mesh, Known()) == found


def test_checkpoints_whose_sizes_are_not_known_are_refused(tmp_path, mesh):
    begin(tmp_path)
    measure = Known()
    with pytest.raises(
        UserError, match=r"tied to their batch sizes, but no batch_sizes.json .* write that number .*\]\[129\]"
    ):
        choose(tmp_path, mesh, measure)
    assert measure.calls == []


def test_an_unfinished_checkpoint_ties_nothing(tmp_path, mesh):
    (tmp_path / "run" / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert choose(tmp_path, mesh, Known())[LONG] > 1


def test_a_damaged_file_is_refused(tmp_path, mesh):
    (tmp_path / "run").mkdir()
    for text in ("{", '{"choices": [{"resolution": "48px"}]}', "[]"):
        (tmp_path / "run" / "batch_sizes.json").write_text(text)
        with pytest.raises(UserError, match=r"batch_sizes.json is damaged .* delete it"):
            choose(tmp_path, mesh, Known())


def test_one_sample_that_is_too_large_is_refused_with_its_bytes(tmp_path, mesh):
    with pytest.raises(UserError) as refusal:
        choose(tmp_path, mesh, Known(1 << 20))
    assert str(refusal.value) == (
        "48px 1:1, 129 frames of 48x48: one sample of a data shard needs 290.251 GiB, 0.001 of them for the state; of "
        "a device 1.000 GiB may be used (auto_batch.headroom, and what lies there already, taken off). Raise "
        "model.grad_ckpt_settings, mesh.fsdp or mesh.seq, set model.remat_policy=offload, or take the line out of "
        "bucket_config"
    )


def test_a_size_that_the_compiler_refuses_does_not_fit(tmp_path, mesh):
    def measure(name, batch):
        if batch["x"].shape[0] > 4 * 5:
            raise TooLargeError(name, "RESOURCE_EXHAUSTED: 20G of 16G hbm.")
        return Known()(name, batch)

    assert choose(tmp_path, mesh, measure) == {LONG: 5, SHORT: 5}

    def refusing(name, batch):
        raise TooLargeError(name, "RESOURCE_EXHAUSTED: 20G of 16G hbm.")

    with pytest.raises(UserError, match=r"one sample of a data shard is refused by the compiler .*20G of 16G hbm"):
        choose(tmp_path / "none", mesh, refusing)


def test_a_device_that_does_not_say_its_memory_needs_the_flag(tmp_path, mesh):
    with pytest.raises(UserError, match=r'"cpu" does not say: give it with --config.auto_batch.memory_gib=, or write'):
        choose(tmp_path, mesh, Known(), memory_gib=None)


def test_the_memory_that_a_device_says_is_taken(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(batch_sizes, "device_memory", lambda mesh: GIB)
    assert choose(tmp_path, mesh, Known(), memory_gib=None) == choose(tmp_path / "given", mesh, Known())


def step(state, batch, key):
    def loss(state):
        hidden = batch["x"] @ state
        return jnp.mean((jnp.tanh(hidden) @ state.T) ** 2)

    return state - jax.grad(loss)(state), {"mean": batch["x"].mean()}


def programs(abstract, mesh):
    return Programs(Assembled(None, abstract, lambda: None, step), mesh)


def test_compiled_steps_fit_at_their_size_and_not_far_above(tmp_path, mesh):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.ShapeDtypeStruct((48 * 48, 31), jnp.float32, sharding=place)
    made, example, calls = programs(state, mesh), batch_of(BUCKETS[3], mesh), []

    def measure(name, batch):
        calls.append(name)
        return made.measure(name, batch)

    def search(mib):
        memory = made.measure("", example).state_bytes / GIB + mib / 1024
        return choose(tmp_path, mesh, measure, {"48px": {1: (1.0, "auto")}}, BUCKETS[3:], memory_gib=memory), memory

    with pytest.raises(UserError, match=r"one sample of a data shard needs 0\.00\d GiB, 0\.000 of them for the state"):
        search(0.01)
    sizes, memory = search(2.0)
    found = sizes["48px", 1]
    fits, more = (made.measure("", scaled(example, size)).peak_bytes for size in (found, found + found // 16 + 1))
    assert found > 10
    assert fits <= memory * GIB < more
    assert len(calls) <= 8
    assert made._compiled == {}  # searching keeps no programs
    (stored,) = json.loads((tmp_path / "run" / "batch_sizes.json").read_text())["choices"]
    assert (stored["batch_size"], stored["peak_bytes"]) == (found, fits)


def test_what_a_compiler_says_of_memory_is_told_with_the_way_out(mesh, monkeypatch):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM.\nmore")

    made = programs(None, mesh)
    monkeypatch.setattr(made, "_step", type("Step", (), {"lower": refuse}))
    with pytest.raises(UserError, match=r"^long does not fit .*: RESOURCE_EXHAUSTED: Ran out of memory on HBM\. Lower"):
        made.compile({"long": batch_of(BUCKETS[3], mesh)})


PROCESS = """
import sys
import jax
from pathlib import Path
from tests.training import test_batch_sizes as here
index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
mesh = here.make_mesh(here.MeshConfig(data=-1, fsdp=2, seq=1, tensor=1))
measure = here.Known(here.PER_PIXEL * (1 + index))  # the second process finds twice the bytes
sizes = here.choose(folder / str(index), mesh, measure)
again = here.choose(folder / str(index), mesh, measure)
print(sizes == again, len(measure.calls), sorted(sizes.values()))
"""


def test_all_processes_take_what_the_first_one_finds_and_it_alone_writes(tmp_path):
    """Each has a folder of its own, as if there were no shared disk."""
    port = str(free_port())
    flags = cpu_devices(2) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), port, str(tmp_path)],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    (first, errors), (second, _) = (process.communicate(timeout=120) for process in started)
    assert [first.splitlines()[-1:], second.splitlines()[-1:]] == [["True 8 [56, 220]"]] * 2, errors[-2000:]
    assert (tmp_path / "0" / "run" / "batch_sizes.json").is_file()
    assert not (tmp_path / "1").exists()
