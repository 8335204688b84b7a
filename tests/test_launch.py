"""launch/env.sh makes an environment once, installs when a list is new, and says in one line what is missing.

The scripts for pods, clusters and containers start the command they are given, in that environment. Stand-ins for
Python, gcloud and srun record what they are asked to do, so nothing is installed and no network is needed.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
LISTS = ("requirements.txt", "requirements-test.txt", "requirements-gpu.txt", "requirements-tpu.txt")
PYTHON = """#!/usr/bin/env bash
case "$*" in
    -c*) exit {old} ;;
    --version) echo "Python 3.11.0" ;;
    "-m venv .venv") [ {ensurepip} = 0 ] || exit 1; mkdir -p .venv/bin; cp "$0" .venv/bin/python
        touch .venv/pip ;;
    "-m venv --clear --without-pip .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip --version") [ -e .venv/pip ] ;;
    "-m pip --python .venv/bin/python --version") exit {system_pip} ;;
    *install*) echo "$*" >>pip.log; exit {offline} ;;
    "-m opensora_jax."*) echo "ran $*"; echo "XLA_FLAGS=$XLA_FLAGS" ;;&
    "-m opensora_jax.fail"*) exit 3 ;;
    "-m opensora_jax.wait"*) trap 'echo saved; exit 0' TERM
        for _ in {1..500}; do [ ! -e go ] || exit 0; sleep 0.02; done ;;
esac
"""
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$HOME/gcloud.log"
cd "$HOME/worker" || exit
for last; do :; done
case $4 in
    scp) cp "$5" "${6#*:}" ;;
    ssh) HOME=$PWD exec bash -c "${last#--command=}" ;;
esac
"""
SRUN = """#!/usr/bin/env bash
echo "srun with $SRUN_CPUS_PER_TASK CPUs: $*"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def tree(tmp_path):
    """Returns a function that copies the scripts, with a Python that behaves as told, and its environment."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    for number, name in enumerate(LISTS):
        (tmp_path / name).write_text(f"package{number}==1\n")

    def make(**behaviour):
        settings = dict.fromkeys(("old", "ensurepip", "system_pip", "offline"), 0) | behaviour
        text = PYTHON
        for name, value in settings.items():
            text = text.replace("{" + name + "}", str(value))
        write_program(tmp_path / "python", text)
        environment = os.environ | {"PYTHON": str(tmp_path / "python"), "REQUIREMENTS": ""}
        environment.pop("XLA_FLAGS", None)
        return environment

    return make


@pytest.fixture
def start(tree, tmp_path):
    """Returns a function that sources env.sh of a copied tree, with a Python that behaves as told."""

    def run(command="echo ready in $PWD", requirements="", **behaviour):
        environment = tree(**behaviour) | {"REQUIREMENTS": requirements}
        script = f"set -euo pipefail; source {tmp_path}/launch/env.sh; {command}"
        return subprocess.run(
            ["bash", "-c", script], cwd="/", env=environment, capture_output=True, text=True, timeout=60
        )

    return run


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def bash(*arguments, cwd, env) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def installs(tmp_path) -> list[str]:
    log = tmp_path / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_a_second_run_installs_nothing(start, tmp_path):
    for _ in range(2):
        process = start()
        assert process.returncode == 0, process.stderr
    assert f"ready in {tmp_path}" in process.stdout
    assert installs(tmp_path) == ["-m pip install -qq --no-compile -r requirements.txt"]


def test_a_changed_list_is_installed_again(start, tmp_path):
    start()
    (tmp_path / "requirements.txt").write_text("a==2\n")
    start()
    assert len(installs(tmp_path)) == 2


def test_the_lists_of_the_tests_come_on_top(start, tmp_path):
    start()
    start(requirements="requirements.txt requirements-test.txt")
    assert [line.split()[-1] for line in installs(tmp_path)] == ["requirements.txt", "requirements-test.txt"]


def test_an_interrupted_install_is_done_again(start, tmp_path):
    process = start(offline=1)
    assert process.returncode == 1
    assert process.stderr.endswith(
        "error: the packages of requirements.txt could not be installed: pip's reason is above\n"
    )
    shutil.rmtree(tmp_path / ".venv")
    assert start().returncode == 0
    assert len(installs(tmp_path)) == 2


def test_an_environment_that_an_interrupt_left_half_made_is_made_again(start, tmp_path):
    assert start().returncode == 0
    (tmp_path / ".venv" / "made-by").unlink()
    assert "Making .venv" not in start().stdout  # made by hand, with its own pip
    (tmp_path / ".venv" / "pip").unlink()
    again = start()
    assert again.returncode == 0
    assert "Making .venv" in again.stdout


def test_a_python_without_ensurepip_uses_the_systems_pip(start, tmp_path):
    process = start(ensurepip=1)
    assert process.returncode == 0, process.stderr
    line = "-m pip --python .venv/bin/python install -qq --no-compile"
    assert installs(tmp_path) == [f"{line} pip", f"{line} -r requirements.txt"]  # a pip of its own for what users add


def test_no_pip_at_all_is_one_line(start):
    process = start(ensurepip=1, system_pip=1)
    assert process.returncode == 1
    assert process.stderr.startswith("error: pip is missing")


def test_an_old_python_is_refused_in_one_line(start, tmp_path):
    process = start(old=1)
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: Python 3.11 or newer is needed")
    assert not (tmp_path / ".venv").exists()


def test_the_environment_comes_first(start, tmp_path):
    process = start("command -v python; echo $PYTHONPATH")
    assert process.stdout.splitlines()[-2:] == [f"{tmp_path}/.venv/bin/python", str(tmp_path)]


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


@pytest.mark.parametrize("extra", ["gpu", "tpu"])
def test_the_lists_of_accelerators_fit_the_one_for_all(extra):
    pins = {}
    for name in ("requirements.txt", f"requirements-{extra}.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                package, version = line.split(";")[0].split("==")
                assert pins.setdefault(package.split("[")[0], version) == version, line
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"{extras[extra][0]}=={pins['jax']}" in (ROOT / f"requirements-{extra}.txt").read_text().splitlines()


def test_a_gpu_node_runs_the_command_with_your_flags_last(tree, tmp_path):
    environment = tree() | {"XLA_FLAGS": "--mine"}
    process = bash("launch/gpu_node.sh", "opensora_jax.train", "--config=a b", cwd=tmp_path, env=environment)
    assert process.returncode == 0, process.stderr
    assert "ran -m opensora_jax.train --config=a b" in process.stdout
    assert process.stdout.rstrip().endswith(" --mine")
    assert [line.split()[-1] for line in installs(tmp_path)] == ["requirements.txt", "requirements-gpu.txt"]


def test_xla_knows_the_flags_of_a_gpu_node(tree, tmp_path):
    process = bash("launch/gpu_node.sh", "opensora_jax.train", cwd=tmp_path, env=tree())
    flags = process.stdout.split("XLA_FLAGS=")[1].strip()
    assert flags.startswith("--xla")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}  # XLA ends at a flag it does not know
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)


def test_slurm_starts_one_process_per_gpu_from_a_copy_of_the_script(tree, tmp_path):
    write_program(tmp_path / "bin" / "srun", SRUN)
    copy = tmp_path / "spool" / "slurm_script"
    write_program(copy, (LAUNCH / "slurm.sh").read_text())
    environment = tree() | {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_CPUS_PER_TASK": "7",
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    process = bash(str(copy), "opensora_jax.train", "--config=a b", cwd="/", env=environment)
    assert process.returncode == 0, process.stderr
    assert "srun with 7 CPUs: --kill-on-bad-exit=1 --label bash launch/gpu_node.sh" in process.stdout
    assert "ran -m opensora_jax.train --config=a b" in process.stdout


def test_slurm_saves_before_its_time_is_up_and_goes_on():
    header, _ = (LAUNCH / "slurm.sh").read_text().split("set -euo pipefail")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", header, flags=re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options  # would hide from a process the GPU that jax.distributed gives it
    name, seconds = options["signal"].split("@")
    assert name == "TERM"  # not B:TERM, which only the script would get
    assert int(seconds) >= 120
    assert options["array"].endswith("%1")


@pytest.mark.parametrize(("module", "status"), [("train", 0), ("fail", 3)])
def test_a_container_ends_with_the_status_of_its_command(tree, tmp_path, module, status):
    process = bash("launch/container.sh", f"opensora_jax.{module}", "--config=a b", cwd=tmp_path, env=tree())
    assert f"ran -m opensora_jax.{module} --config=a b" in process.stdout
    assert process.returncode == status


def test_a_container_that_is_stopped_saves_and_does_not_count_as_finished(tree, tmp_path):
    command = ["bash", "launch/container.sh", "opensora_jax.wait"]
    with subprocess.Popen(command, cwd=tmp_path, env=tree(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("XLA_FLAGS"):  # the command is about to wait for the signal
            pass
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 143


def test_the_image_copies_and_installs_what_is_there():
    text = (LAUNCH / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (\S+) ", text, flags=re.MULTILINE):
        assert list(ROOT.glob(source)), source
    for extra in re.findall(r"EXTRA=(\w+)", text):
        assert (ROOT / f"requirements-{extra}.txt").exists()
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", text, flags=re.MULTILINE)
    assert json.loads(entrypoint) == ["bash", "launch/container.sh"]


def test_the_manifest_runs_a_command_of_ours_on_all_chips_of_the_slice():
    claim, jobset = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]

    module, config, *fields = container["args"]
    assert importlib.util.find_spec(module) is not None
    path = ROOT / config.removeprefix("--config=")
    spec = importlib.util.spec_from_file_location("gke_config", path)
    assert spec is not None
    assert spec.loader is not None
    namespace = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(namespace)
    for field in fields:
        name, value = field.removeprefix("--config.").split("=")
        section = namespace.get_config()
        for part in name.split(".")[:-1]:
            section = section[part]
        assert name.split(".")[-1] in section, field
        assert value.startswith("/shared/"), field

    chips = math.prod(int(size) for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["completions"] == job["parallelism"]
    assert pod["terminationGracePeriodSeconds"] >= 120
    (mount,) = container["volumeMounts"]
    (cache,) = container["env"]
    assert cache["value"].startswith(mount["mountPath"] + "/")
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.fixture
def pod(tree, tmp_path):
    """Returns a function that runs tpu_pod.sh of a committed tree, with a gcloud that knows one worker."""
    environment = tree() | {
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "TPU_NAME": "my-pod",
        "ZONE": "us-east5-a",
        "PROJECT": "my-project",
    }
    write_program(tmp_path / "bin" / "gcloud", GCLOUD)
    write_program(tmp_path / "bin" / "python3.11", "")  # else apt-get is asked for one
    (tmp_path / "worker").mkdir()
    git = ["git", "-c", "user.name=test", "-c", "user.email=test", "-c", "commit.gpgsign=false"]
    for command in (["init"], ["add", "launch", *LISTS], ["commit", "-m", "a tree"]):
        subprocess.run([*git, *command], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60)

    def run(*arguments, **changes):
        return bash("launch/tpu_pod.sh", *arguments, cwd=tmp_path, env=environment | changes)

    return run


@pytest.mark.parametrize("name", ["TPU_NAME", "ZONE", "PROJECT"])
def test_a_pod_without_its_name_is_one_line(pod, name):
    process = pod("opensora_jax.train", **{name: ""})
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {name} is not set: give TPU_NAME, ZONE and PROJECT")
    assert process.stderr.count("\n") == 1


def test_a_pod_without_a_command_is_one_line(pod):
    process = pod()
    assert process.returncode == 1
    assert process.stderr.startswith("error: no command given")
    assert process.stderr.count("\n") == 1


def test_a_dry_run_prints_the_commands_and_runs_none(pod, tmp_path):
    (tmp_path / "launch" / "new.py").touch()
    process = pod("opensora_jax.train", "--config=a b", DRY_RUN="1", CACHE="/shared/cache")
    assert process.returncode == 0, process.stderr
    assert "note: changes and new files that are not committed stay here" in process.stderr
    assert not (tmp_path / "gcloud.log").exists()
    archive, copy, install, run, status = [
        shlex.split(line.removeprefix("$ ")) for line in process.stdout.splitlines() if line
    ]
    workers = ["--worker=all", "--zone=us-east5-a", "--project=my-project"]
    file = f"{tmp_path}/opensora_jax-my-pod.tar.gz"
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert archive == ["git", "archive", "--format=tar.gz", f"--output={file}", "HEAD"]
    assert copy == [*gcloud, "scp", file, "my-pod:opensora_jax.tar.gz", *workers]
    for command in (install, run, status):
        assert command[:-1] == [*gcloud, "ssh", "my-pod", *workers]
    assert shlex.split(run[-1].removeprefix("--command=")) == [
        "env",
        "JAX_COMPILATION_CACHE_DIR=/shared/cache",
        "bash",
        "opensora_jax/launch/tpu_worker.sh",
        "opensora_jax.train",
        "--config=a b",
    ]


@pytest.mark.parametrize(("module", "status"), [("train", 0), ("fail", 3)])
def test_a_worker_gets_the_commit_installs_and_runs(pod, tmp_path, module, status):
    process = pod(f"opensora_jax.{module}", "--config=a b")
    assert process.returncode == status, process.stderr
    assert [line.split()[3] for line in (tmp_path / "gcloud.log").read_text().splitlines()] == ["scp", *["ssh"] * 3]
    home = tmp_path / "worker" / "opensora_jax"
    assert [line.split()[-1] for line in installs(home)] == ["requirements.txt", "requirements-tpu.txt"]
    assert f"ran -m opensora_jax.{module} --config=a b" in process.stdout.splitlines()
    assert process.stdout.endswith(f": status {status}\n")
    assert (home / "run.status").read_text() == f"{status}\n"


def test_a_worker_that_is_busy_is_left_alone(pod, tmp_path):
    home = tmp_path / "worker" / "opensora_jax"
    home.mkdir()
    (home / "run.pid").write_text(str(os.getpid()))
    process = pod("opensora_jax.train")
    assert process.returncode == 1
    assert process.stderr.endswith("still runs the last command: stop it first\n")
    assert not (home / "launch").exists()


def test_a_new_connection_shows_the_run_that_goes_on(tree, tmp_path):
    environment = tree()
    write_program(tmp_path / "bin" / "python3.11", "")
    environment["PATH"] = f"{tmp_path}/bin:{environment['PATH']}"
    command = ["bash", "launch/tpu_worker.sh", "opensora_jax.wait"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        while not first.stdout.readline().startswith("ran"):
            pass
        first.kill()  # the connection breaks, the run does not
    number = (tmp_path / "run.pid").read_text()
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout is not None
        assert second.stdout.readline() == "ran -m opensora_jax.wait\n"
        (tmp_path / "go").touch()
        second.stdout.read()
    assert second.returncode == 0
    assert (tmp_path / "run.pid").read_text() == number
