"""Traces of a tiny step: where they are asked for, how long they last, and that nothing about them ends a run."""

import gzip
import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.training.profiling import ProfileConfig, Profiler


@jax.jit
def update(x):
    return jnp.tanh(x @ x)


def run(profiler, steps, *, meanwhile=lambda step: None):
    """Does these steps under the profiler; `meanwhile(step)` runs before each."""
    x = jnp.eye(7)
    with profiler:
        for step in range(1, steps + 1):
            meanwhile(step)
            profiler.before(step)
            x = update(x)
            profiler.after(step, x)


def ask():
    os.kill(os.getpid(), signal.SIGUSR1)


def traces(folder):
    """Returns step folder -> (numbers of its steps, whether the step's program is in it)."""
    found = {}
    for path in folder.glob("*/plugins/profile/process_0/*.trace.json.gz"):
        (path.parent / path.name.replace(".trace.json.gz", ".xplane.pb")).stat()
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        numbers = sorted({int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {})})
        found[path.parents[3].name] = numbers, any("update" in e.get("name", "") for e in events)
    return found


@pytest.fixture
def said(monkeypatch):
    """Returns the list of what is logged from here on, as (level, line)."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *rest, level=level: lines.append((level, text % rest)))
    return lines


def test_the_step_of_the_config_and_those_after_it_are_traced(tmp_path, said):
    run(Profiler(ProfileConfig(at=3, steps=2), tmp_path), 6)
    assert traces(tmp_path) == {"step_3": ([3, 4], True)}
    ((level, line),) = said
    assert level == "info"
    assert f"tensorboard --logdir={tmp_path / 'step_3'}" in line
    assert f"xprof --logdir={tmp_path / 'step_3'}" in line
    assert "ui.perfetto.dev" in line


def test_no_step_is_traced_unasked(tmp_path, said):
    run(Profiler(ProfileConfig(at=0, steps=1), tmp_path), 3)
    assert list(tmp_path.iterdir()) == said == []


def test_a_signal_asks_for_the_next_step_and_another_within_the_window_is_ignored(tmp_path, said):
    run(
        Profiler(ProfileConfig(at=0, steps=3), tmp_path),
        9,
        meanwhile=lambda step: ask() if step in (2, 3, 7) else None,
    )
    assert traces(tmp_path) == {"step_2": ([2, 3, 4], True), "step_7": ([7, 8, 9], True)}
    assert [line for _, line in said if "ignored" in line] == [
        f"signal {signal.SIGUSR1} is ignored: the profile in {tmp_path / 'step_2'} is not finished"
    ]


def test_a_window_cut_short_is_written_and_the_handler_restored(tmp_path):
    def handler(number, frame):
        """Takes the signal before and after a run."""

    def stop(step):
        if step == 4:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Profiler(ProfileConfig(at=2, steps=7), tmp_path), 9, meanwhile=stop)
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert traces(tmp_path) == {"step_2": ([2, 3], True)}


def test_other_threads_and_platforms_profile_without_the_signal(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=run, args=(Profiler(ProfileConfig(at=1, steps=1), tmp_path / "thread"), 2))
    thread.start()
    thread.join()
    assert list(traces(tmp_path / "thread")) == ["step_1"]
    monkeypatch.delattr(signal, "SIGUSR1")
    run(Profiler(ProfileConfig(at=1, steps=1), tmp_path / "platform"), 2)
    assert list(traces(tmp_path / "platform")) == ["step_1"]
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_folder_that_cannot_be_made_is_one_warning_and_blocks_no_later_profile(tmp_path, said):
    (tmp_path / "file").write_text("in the way")
    run(Profiler(ProfileConfig(at=2, steps=2), tmp_path / "file" / "profile"), 4)
    ((level, line),) = said
    assert level == "warning"
    assert line.startswith("no profile of step 2:")
    run(Profiler(ProfileConfig(at=2, steps=2), tmp_path / "profile"), 4)
    assert list(traces(tmp_path / "profile")) == ["step_2"]


def test_a_trace_of_someone_else_is_left_alone(tmp_path, said):
    with jax.profiler.trace(tmp_path / "other"):
        run(Profiler(ProfileConfig(at=2, steps=1), tmp_path / "ours"), 3)
    assert [level for level, _ in said] == ["warning"]
    assert list((tmp_path / "other").glob("plugins/profile/*/*.xplane.pb"))


def test_a_trace_that_cannot_be_written_is_one_warning(tmp_path, said, monkeypatch):
    stop = jax.profiler.stop_trace

    def fail():
        stop()
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    run(Profiler(ProfileConfig(at=2, steps=1), tmp_path), 3)
    assert said == [("warning", f"the profile in {tmp_path / 'step_2'} is lost: no space left on device")]


@pytest.mark.parametrize("section", [{"at": -1, "steps": 1}, {"at": 1, "steps": 0}])
def test_a_window_without_steps_is_refused(section):
    with pytest.raises(UserError, match=r"config\.profile: at is a step, or 0 for no profile, and steps is at least 1"):
        build(ProfileConfig, section, "config.profile")
