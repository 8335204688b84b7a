"""launch/env.sh makes an environment once, installs when a list is new, and says in one line what is missing.

A stand-in for Python records what it is asked to do, so nothing is installed and no network is needed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
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
esac
"""


@pytest.fixture
def start(tmp_path):
    """Returns a function that sources env.sh of a copied tree, with a Python that behaves as told."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "requirements.txt").write_text("a==1\n")
    (tmp_path / "requirements-test.txt").write_text("b==1\n")

    def run(command="echo ready in $PWD", requirements="", **behaviour):
        settings = dict.fromkeys(("old", "ensurepip", "system_pip", "offline"), 0) | behaviour
        python = tmp_path / "python"
        text = PYTHON
        for name, value in settings.items():
            text = text.replace("{" + name + "}", str(value))
        python.write_text(text)
        python.chmod(0o755)
        environment = os.environ | {"PYTHON": str(python), "REQUIREMENTS": requirements}
        script = f"set -euo pipefail; source {tmp_path}/launch/env.sh; {command}"
        return subprocess.run(
            ["bash", "-c", script], cwd="/", env=environment, capture_output=True, text=True, timeout=60
        )

    return run


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


def test_a_python_without_ensurepip_uses_the_systems_pip(start, tmp_path):
    process = start(ensurepip=1)
    assert process.returncode == 0, process.stderr
    assert installs(tmp_path) == ["-m pip --python .venv/bin/python install -qq --no-compile -r requirements.txt"]


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
