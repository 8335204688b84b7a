"""The command as a user runs it: a small model compiled for TPUs that are not here, and what goes wrong in one line."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opensora_jax.config.flag import load_config

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
TRAIN = "--config=configs/diffusion/train/demo.py"
SMALL = [
    *("hidden_size=128", "num_heads=1", "axes_dim=(32,48,48)", "depth=1", "depth_single_blocks=0"),
    "cond_embed=False",
]


Plan = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """Returns a function that runs the command, which must end with `status`; it waits for no other plan's lock."""
    apart = os.environ | {"TMPDIR": str(tmp_path_factory.mktemp("tmp"))}

    def run(*arguments: str, status: int = 0, environment: dict[str, str] | None = None):
        command = [sys.executable, "-m", "opensora_jax.plan", *arguments]
        pipes = {"text": True, "capture_output": True, "timeout": 900}
        found = subprocess.run(command, cwd=ROOT, env=apart | (environment or {}), **pipes)
        assert found.returncode == status, found.stderr[-4000:]
        return found

    return run


def small(cache: Path, *more: str) -> list[str]:
    """Returns the arguments for a model that compiles in seconds."""
    model = [f"--config.model.{field}" for field in SMALL]
    return [TRAIN, "--config.optim.cls=adamw", *model, "--topology=v5e:2x2", f"--cache={cache}", *more]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def test_a_program_that_takes_long_is_seen_after_a_quick_one(capsys):
    from opensora_jax.plan import _say, progress

    with progress(2, is_shown=True, seconds=0.0) as bar:
        bar.update()
        for seconds in (5, 25):
            _say(bar, f"decode: {seconds} s")
            assert f"decode: {seconds} s" in capsys.readouterr().err


@needs_libtpu
def test_a_step_is_forecast_and_a_second_run_compiles_nothing(plan, cache, tmp_path):
    mesh = "--config.mesh.data=2", "--config.mesh.fsdp=2"
    answer = tmp_path / "plan.json"
    said = plan(*small(cache, *mesh, "--price=1.5", f"--json={answer}")).stdout
    assert "32px_ar1:1 1:1, 9 frames of 32x32" in said
    assert "of 15.75 GiB: parameters" in said
    assert "all-gather over fsdp" in said
    assert "for 1000 steps" in said
    assert "Assumed: fusions take the cycles that the compiler estimates, at 1.5 GHz" in said
    told = json.loads(answer.read_text())
    assert (told["topology"], told["chips"], told["price"]) == ("v5e:2x2", 4, 1.5)
    (program,) = told["groups"][0]["programs"]
    assert program["fits"]
    assert program["mesh"]["fsdp"] == 2
    assert program["state"]["parameters"] < program["peak_bytes"] < program["memory_bytes"]
    assert 0 < program["mfu"] < 1
    assert program["flops"] < program["executed_flops"] * 1.1
    assert {(one["kind"], one["axis"]) for one in program["collectives"]} >= {
        ("all-gather", "fsdp"),
        ("all-reduce", "data"),
    }
    parts = program["parts_seconds"]
    assert program["step_seconds"] == pytest.approx(sum(parts.values()))
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*") if path.is_file()}
    again = plan(*small(cache, *mesh, "--memory=0.001"))
    assert "does not fit   it needs 0." in again.stdout
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.*") if path.is_file()} == made


@needs_libtpu
def test_gathers_and_scatters_run_on_sparse_cores_where_there_are_some(plan, cache, tmp_path):
    answer = tmp_path / "plan.json"
    plan(*small(cache, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--topology=v5p:2x2x1", f"--json={answer}"))
    (program,) = json.loads(answer.read_text())["groups"][0]["programs"]
    sent = {one["kind"]: one for one in program["collectives"] if one["axis"] == "fsdp"}
    for kind in ("all-gather", "reduce-scatter"):
        assert sent[kind]["overlapped"] == sent[kind]["times"] > 0


@needs_libtpu
def test_what_the_compiler_refuses_is_a_result(plan, cache):
    size = "--config.bucket_config['32px_ar1:1'][9]=(1.0,400000)"
    said = plan(*small(cache, size)).stdout
    assert "does not fit   temporaries alone need" in said or "does not fit   the program needs" in said
    assert "of a device's 15.75 GiB" in said


@needs_libtpu
def test_a_bucket_that_the_mesh_cannot_split_ends_in_one_line(plan, cache):
    found = plan(*small(cache, "--config.mesh.data=1", "--config.mesh.seq=4"), status=1)
    assert found.stderr.splitlines()[-1].startswith("error: 1 attention heads do not divide by mesh.seq")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([TRAIN, "--topology=v9:2x2"], "topology 'v9:2x2' is not known: use one such as v4:4x4x4"),
        ([TRAIN], "--topology is missing"),
        (["--topology=v5p:4x4x4"], "--config is missing"),
        (
            [TRAIN, "--topology=h100x8"],
            "compiling for h100 needs the plugin of CUDA, which is not installed: pip install",
        ),
    ],
)
def test_mistakes_end_in_one_line(plan, arguments, said):
    if "h100x8" in arguments[-1] and importlib.util.find_spec("jax_plugins") is not None:
        pytest.skip("the plugin of CUDA is installed")
    (line,) = [one for one in plan(*arguments, status=1).stderr.splitlines() if one.startswith("error: ")]
    assert said in line


@needs_libtpu
def test_a_mesh_that_does_not_fit_ends_in_the_line_of_training(plan):
    found = plan(TRAIN, "--topology=v5e:2x2", "--config.mesh.data=3", status=1)
    assert found.stderr.splitlines()[-1].startswith("error: mesh axes must multiply to the 4 devices here")


def test_without_libtpu_the_command_that_installs_it_is_named(plan, tmp_path):
    """A finder in front of all others hides the package, as if it were not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'libtpu' else found(name, *rest)\n"
    )
    hidden = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    found = plan(TRAIN, "--topology=v5e:2x2", status=1, environment=hidden)
    assert found.stderr.splitlines()[-1].startswith(
        'error: compiling for v5e needs libtpu, which is not installed: pip install "libtpu=='
    )


def test_the_presets_are_there():
    for name in ("train/stage1", "train/stage2", "inference/256px"):
        assert load_config(ROOT / f"configs/diffusion/{name}.py").model.hidden_size == 3072
