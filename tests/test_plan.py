"""The command as a user runs it: a small model compiled for TPUs that are not here, and what goes wrong in one line."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from opensora_jax.config.flag import load_config
from opensora_jax.forecast.topology import parse_topology
from tests.commands import ROOT, Command
from tests.forecast import small as forecast_small

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
TRAIN = "--config=configs/diffusion/train/demo.py"
SMALL = [
    *("hidden_size=128", "num_heads=1", "axes_dim=(32,48,48)", "depth=1", "depth_single_blocks=0"),
    "cond_embed=False",
]


@pytest.fixture(scope="module")
def plan(command, tmp_path_factory) -> Command:
    """Returns a function that runs the command; it waits for no other plan's lock."""
    apart = {"TMPDIR": str(tmp_path_factory.mktemp("tmp"))}

    def run(*arguments: str, status: int = 0):
        return command("plan", *arguments, status=status, environment=apart)

    return run


ASSUMED = {"kernel_efficiency": 0.6, "link_efficiency": 0.8}


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
def test_programs_that_are_kept_are_not_compiled_again(plan, tmp_path):
    """Answers go when sources change; the texts of a decode's programs, and where results lie, stay."""
    fields = ["model.in_channels=16", "model.num_heads=1", "model.axes_dim=(32,48,48)", "model.hidden_size=128"]
    fields += ["model.depth=1", "model.depth_single_blocks=0", "ae.latent_channels=4", "ae.block_out_channels=(4,4,8)"]
    fields += ["ae.layers_per_block=1", "ae.mid_block_add_attention=False"]
    fields += ["mesh.data=4", "batch_size=4", "decode_batch_size=4", "sampling_option.num_frames=1"]
    flags = ["--config=configs/diffusion/inference/demo.py", *(f"--config.{field}" for field in fields)]
    flags += ["--topology=v5e:2x2", f"--cache={tmp_path}"]
    first = plan(*flags).stdout
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "programs").iterdir()}
    for answer in (tmp_path / "answers").iterdir():
        answer.unlink()
    assert plan(*flags).stdout == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "programs").iterdir()} == made


def test_failures_are_shown_whatever_their_rank(monkeypatch):
    from opensora_jax import plan as command
    from opensora_jax.forecast.jobs import make_groups

    group, *_ = make_groups(forecast_small.training(), parse_topology("v5e:2x2"), [], {})
    answers = []
    for number in range(3):
        failed = command.Failure(f"reason {number}", Path("log"))
        answers.append((replace(group, title=f"candidate {number}"), [(group.wanted[0], failed)]))
    monkeypatch.setattr(command.flags, "FLAGS", SimpleNamespace(topology="v5e:2x2", price=None, **ASSUMED))
    said = list(command.lines(answers, 1))
    assert [line for line in said if line.startswith("candidate")] == [f"candidate {n}" for n in range(3)]
    assert any("reason 2" in line for line in said)


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
        (
            [TRAIN, "--topology=h100x0"],
            "topology 'h100x0': a slice has at least 1 chip along each dimension, as in h100x8",
        ),
        ([TRAIN, "--topology=v5e:2x2", "--json=."], "--json is the file to write, such as plan.json: got the folder ."),
        (
            [TRAIN, "--topology=v5e:2x2", "--json=nowhere/plan.json"],
            "there is no folder nowhere that can be written to",
        ),
        ([TRAIN, "--topology=v5e:2x2", "--memory=inf"], "--memory takes a number, as in --memory=4.2: got inf"),
        ([TRAIN, "--topology=v5e:2x2", "--price=nan"], "--price takes a number, as in --price=4.2: got nan"),
        (
            [
                "--config=configs/diffusion/inference/t2i2v_256px.py",
                "--topology=v5e:2x2",
                "--config.cond_type=v2v_head",
            ],
            "use_t2i2v makes the first frame: cond_type is i2v_head then: got 'v2v_head'",
        ),
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


def test_without_libtpu_the_command_that_installs_it_is_named(tmp_path):
    """A finder in front of all others hides the package, as if it were not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'libtpu' else found(name, *rest)\n"
    )
    hidden = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    line = [sys.executable, "-m", "opensora_jax.plan", TRAIN, "--topology=v5e:2x2"]
    found = subprocess.run(line, cwd=ROOT, env=hidden, text=True, capture_output=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(
        'error: compiling for v5e needs libtpu, which is not installed: pip install "libtpu=='
    )


def test_the_presets_are_there():
    for name in ("train/stage1", "train/stage2", "inference/256px"):
        assert load_config(ROOT / f"configs/diffusion/{name}.py").model.hidden_size == 3072
