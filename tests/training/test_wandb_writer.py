"""Runs at Weights & Biases, with a module in the place of its package that notes what it is told."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from absl import logging

from opensora_jax.config.errors import UserError
from opensora_jax.training.metrics import open_metrics, read_metrics
from opensora_jax.training.wandb_writer import WandbConfig, WandbWriter

CONFIG = WandbConfig(project="videos", name="")
CLIP = np.zeros((3, 6, 10, 3), np.uint8)


class Error(Exception):
    pass


class CommError(Error):
    pass


class AuthenticationError(CommError):
    pass


class UsageError(Error):
    pass


class FakeWandb(ModuleType):
    """Notes in `told` all calls, and raises `fails` in `init` when it is online, or `breaks` in a run's calls."""

    def __init__(self):
        super().__init__("wandb")
        self.errors = SimpleNamespace(
            Error=Error, CommError=CommError, AuthenticationError=AuthenticationError, UsageError=UsageError
        )
        self.told, self.fails, self.breaks = [], None, None

    def init(self, **arguments):
        self.told.append(("init", arguments))
        if self.fails is not None and arguments.get("mode") != "offline":
            raise self.fails
        return FakeRun(self)

    def teardown(self):
        self.told.append(("teardown", None))

    def Settings(self, **settings):  # noqa: N802
        return settings

    def Image(self, path):  # noqa: N802
        return "image", path

    def Video(self, path, *, format):  # noqa: N802
        return format, path

    def calls(self, name):
        return [arguments for called, arguments in self.told if called == name]


class FakeRun:
    def __init__(self, module):
        self.module = module

    def define_metric(self, name, step_metric=None):
        self.module.told.append(("define_metric", (name, step_metric)))

    def log(self, row):
        self._tell("log", row)

    def finish(self, exit_code):
        self._tell("finish", exit_code)

    def _tell(self, name, what):
        self.module.told.append((name, what))
        if self.module.breaks is not None:
            raise self.module.breaks


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *rest: lines.append(text % rest))
    return lines


def test_a_restarted_run_continues_the_same_run_there_and_repeats_steps(tmp_path, wandb):
    for start, stop in ((0, 5), (2, 7)):
        with open_metrics(tmp_path / "cats", start, True, CONFIG, {"loop": {"num_steps": stop}}) as writer:
            for step in range(start + 1, stop):
                writer.write(step, {"loss": step / 8}, "256px")
    first, second = wandb.calls("init")
    assert first["id"] == second["id"] == json.loads((tmp_path / "cats" / "wandb.json").read_text())["id"]
    assert (first["project"], first["name"], first["resume"]) == ("videos", "cats", "allow")
    assert [first["config"], second["config"]] == [{"loop": {"num_steps": 5}}, {"loop": {"num_steps": 7}}]
    assert second["allow_val_change"]
    assert first["dir"] == str(tmp_path / "cats")
    assert wandb.calls("define_metric")[:2] == [("step", None), ("*", "step")]
    rows = wandb.calls("log")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert rows[0] == {"step": 1, "loss": 1 / 8, "loss of 256px": 1 / 8}
    assert wandb.calls("finish") == [0, 0]
    assert [line["step"] for line in read_metrics(tmp_path / "cats" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_two_workdirs_are_two_runs_and_a_name_can_be_given(tmp_path, wandb):
    WandbWriter(tmp_path / "a", CONFIG, {}).close()
    WandbWriter(tmp_path / "b", WandbConfig("videos", "dogs"), {}).close()
    a, b = wandb.calls("init")
    assert a["id"] != b["id"]
    assert (a["name"], b["name"]) == ("a", "dogs")


def test_samples_are_the_files_of_the_workdir(tmp_path, wandb):
    with open_metrics(tmp_path, 0, True, CONFIG) as writer:
        writer.write(5, {"loss": 0.5}, "", {"cat": (CLIP, 8), "dog": (CLIP[:1], 8)})
    (row,) = wandb.calls("log")
    folder = tmp_path / "samples" / "5"
    assert row == {
        "step": 5,
        "loss": 0.5,
        "samples/cat": ("mp4", str(folder / "cat.mp4")),
        "samples/dog": ("image", str(folder / "dog.png")),
    }
    assert sorted(path.name for path in folder.iterdir()) == ["cat.mp4", "dog.png"]


@pytest.mark.parametrize(
    ("error", "exit_code"), [(SystemExit(0), 0), (SystemExit(None), 0), (SystemExit(1), 1), (ValueError(), 1)]
)
def test_a_run_that_fails_is_marked_so_and_one_that_is_preempted_is_not(tmp_path, wandb, error, exit_code):
    with pytest.raises(type(error)), open_metrics(tmp_path, 0, True, CONFIG):
        raise error
    assert wandb.calls("finish") == [exit_code]


def test_the_package_is_not_imported_without_a_project(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_metrics(tmp_path / "none", 0, True).close()
    open_metrics(tmp_path / "other process", 0, False, CONFIG).close()


@pytest.mark.parametrize("found", [None, ModuleType("wandb")], ids=["no package", "a folder of that name"])
def test_a_missing_package_is_told_with_what_to_do(tmp_path, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    with pytest.raises(UserError, match=r"pip install '\.\[wandb\]', or set --config\.loop\.wandb\.project= "):
        open_metrics(tmp_path, 0, True, CONFIG)


@pytest.mark.parametrize("error", [UsageError("no login"), AuthenticationError("no login"), Error("no login")])
def test_a_run_that_is_refused_is_an_error_of_the_user(tmp_path, wandb, error):
    wandb.fails = error
    with pytest.raises(UserError, match=r"W&B refuses the run: no login; or set --config\.loop\.wandb\.project= "):
        open_metrics(tmp_path, 0, True, CONFIG)


def test_a_run_without_a_network_is_kept_for_later_under_the_same_id(tmp_path, wandb, warnings):
    wandb.fails = CommError("no route to host")
    with open_metrics(tmp_path, 0, True, CONFIG, {"seed": 3}) as writer:
        writer.write(1, {"loss": 0.5}, "")
    assert [name for name, _ in wandb.told][:3] == ["init", "teardown", "init"]
    online, offline = wandb.calls("init")
    assert offline == online | {"mode": "offline"}
    assert wandb.calls("log") == [{"step": 1, "loss": 0.5}]
    assert warnings == [
        f"W&B cannot be reached (no route to host): the run is kept in {tmp_path / 'wandb'}, for `wandb sync`"
    ]


def test_a_service_that_dies_is_one_warning_and_the_files_go_on(tmp_path, wandb, warnings):
    with open_metrics(tmp_path, 0, True, CONFIG) as writer:
        writer.write(1, {"loss": 0.5}, "")
        wandb.breaks = ConnectionResetError(104, "Connection reset by peer")
        writer.write(2, {"loss": 0.25}, "")
        writer.write(3, {"loss": 0.125}, "")
    assert len(warnings) == 1
    assert "nothing more is written to W&B (ConnectionResetError" in warnings[0]
    assert len(wandb.calls("log")) == 2
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_an_error_at_the_end_is_a_warning(tmp_path, wandb, warnings):
    with open_metrics(tmp_path, 0, True, CONFIG):
        wandb.breaks = TimeoutError("uploads")
    assert len(warnings) == len(wandb.calls("finish")) == 1
