"""config.command ends every mistake of a user in one line, lets bugs speak, and records what a run took."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import errno
import signal
import sys
from pathlib import Path
from absl import flags, logging
from opensora_jax.config.command import run, run_verbs
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import config_flag, require

CONFIG = config_flag(required="verbs" not in sys.argv[0])
OUTPUT = flags.DEFINE_string("output", None, "folder to write")
DO = flags.DEFINE_string("do", "", "what to do")


def main(argv):
    logging.info("a message of another package")
    logging.warning("mind the %s", "gap")
    exec(DO.value)
    if OUTPUT.value:
        return Path(OUTPUT.value)
    print(CONFIG.value.lr, CONFIG.value.model.size, CONFIG.value.limit)


def make(argv):
    require("output", "config")
    print("made", OUTPUT.value, argv[1:])


if __name__ == "__main__":
    steps = {"mark": lambda: flags.DEFINE_integer("steps", 7, "how many")}
    run_verbs({"make": make, "mark": main}, steps) if "verbs" in sys.argv[0] else run(main)
"""
CONFIG = """
from ml_collections import ConfigDict, config_dict


def get_config():
    return ConfigDict(
        {"lr": 1.0, "steps": 3, "none": None, "limit": config_dict.placeholder(float),
         "model": {"size": (2, 3), "causal": True}, "table": {"a": {5: 7}}})
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Returns a function that runs a small command in its own folder and returns the finished process."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for name in ("fit.py", "verbs.py"):
        (tmp_path / name).write_text(COMMAND)
    (tmp_path / "c.py").write_text(CONFIG)

    def start(*arguments, name="fit.py"):
        line = [sys.executable, name, *arguments]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return start


def only_line(process, status=1) -> str:
    """Returns the error of a process that must end with one line and nothing else on stderr but log lines."""
    assert process.returncode == status, process.stderr
    lines = [line for line in process.stderr.splitlines() if "mind the gap" not in line]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def test_overrides_reach_the_config(command):
    arguments = (
        "--config.lr=2",
        "--config.model.size=(5,7)",
        "--config.limit",
        "3",
        "--noconfig.model.causal",
    )
    process = command("--config=c.py", *arguments, "--config.table['a'][5]=11")
    assert process.stdout == "2.0 (5, 7) 3.0\n", process.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--config.lrr=1"], "config has no field 'lrr'; did you mean 'lr'?"),
        (["--config.model.zzz=1"], "config.model has no field 'zzz'; it has causal, size"),
        (["--config.lr.rate=1"], "config.lr is 1.0 and has no field 'rate' to override"),
        (["--config.table['a'][7]=1"], "config.table.a has no field 7; it has 5"),
        (["--config.model[=1"], "config.model[ is no path"),
        (["--config.none=1"], "config.none is None and cannot be overridden"),
        (["--config.lr=fast"], "flag --config.lr=fast: could not convert string to float: 'fast'"),
        (["--config.steps=1.5"], "flag --config.steps=1.5: invalid literal for int()"),
        (["--config.model.causal=maybe"], "flag --config.model.causal=maybe: ('Non-boolean argument"),
        (["--ouput=x"], "there is no flag --ouput; did you mean 'output'?"),
        (["--zzz"], "there is no flag --zzz; it has config, do, output"),
        (["more"], "unexpected argument 'more': options are written --name=value"),
        (
            ["--config.model.size=(1,2)", "--config.model.size=(3,4)"],
            "--config.model.size is given 2 times; give it once",
        ),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(command, arguments, error):
    assert error in only_line(command("--config=c.py", *arguments))


def test_a_missing_config_flag_is_one_line(command):
    assert "--config is missing" in only_line(command())
    assert "--config.lr overrides a config that is not given" in only_line(command("--config.lr=1"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "config file broken.py does not exist"),
        ("def get_config():\n    return undefined", "broken.py fails at line 2: NameError"),
        ("def get_config():\n    return int('x')", "broken.py fails at line 2: ValueError"),
        ("def get_config(:", "broken.py fails at line 1: SyntaxError"),
        ("import no_such_module", "broken.py fails at line 1: ModuleNotFoundError"),
        ("x = 1", "broken.py needs a function get_config() that returns a ConfigDict"),
        (
            "def get_config():\n    return {}",
            "broken.py needs a function get_config() that returns a ConfigDict",
        ),
    ],
)
def test_a_config_file_that_is_missing_or_fails_is_one_line(command, tmp_path, text, error):
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    assert error in only_line(command("--config=broken.py", "--config.lr=1"))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise UserError('too short:\\n3 frames')", "too short: 3 frames"),
        ("open('/dev/full', 'w').write('x' * 9999999)", "out: no space is left on the disk"),
        ("raise OSError(errno.EROFS, 'x', 'out/a.mp4')", "out/a.mp4: the file system is read-only"),
        ("raise PermissionError(errno.EACCES, 'x', 'out/a')", "out/a: permission is denied"),
        ("Path('c.py').mkdir(exist_ok=True)", "c.py: a file has the name that a folder needs"),
        ("Path('c.py/x').mkdir()", "c.py/x: a part of this path is a file"),
        ("Path('.').write_text('x')", ".: this is a folder, not a file"),
        ("raise ValueError('write: No space left on device')", "out: no space is left on the disk"),
        (
            "raise ValueError('at \"/a b/c\": No space left on device')",
            "/a b/c: no space is left on the disk",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(command, code, error):
    assert error in only_line(command("--config=c.py", "--output=out", f"--do={code}"))


def test_ctrl_c_is_one_line_and_status_130(command):
    process = command(
        "--config=c.py",
        "--do=signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)",
    )
    assert "interrupted" in only_line(process, status=130)


def test_a_bug_keeps_its_traceback_even_where_a_file_error_was_met_before(command):
    code = "try:\n  Path('c.py').mkdir()\nexcept OSError:\n  {}['bug']"
    process = command("--config=c.py", f"--do={code}")
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "KeyError: 'bug'" in process.stderr


def test_verbosity_shows_the_traceback_behind_an_error(command):
    process = command("--config=c.py", "--verbosity=1", "--do=raise UserError('no')")
    assert "Traceback" in process.stderr
    assert process.stderr.endswith("error: no\n")


def test_help_names_the_flags_and_is_no_failure(command):
    for process in (command("--help"), command("--help", name="verbs.py")):
        assert process.returncode == 0
        assert "--config: config file" in process.stdout


def test_log_lines_are_short_and_ours_or_warnings(command):
    process = command("--config=c.py")
    assert "another package" not in process.stderr
    assert process.stderr.startswith("W ")
    assert process.stderr.endswith(" mind the gap\n")


def test_a_full_disk_that_a_library_logs_with_a_traceback_is_still_one_line(command):
    code = "try:\n  raise OSError(errno.ENOSPC, 'x', 'a')\nexcept OSError:\n  logging.exception('thread'); raise"
    assert only_line(command("--config=c.py", f"--do={code}")).startswith("a: no space is left")


def test_a_run_is_recorded_in_the_folder_it_returns(command, tmp_path):
    code = "import subprocess; subprocess.run([sys.executable, '-c', 'x = bytes(1) * 200_000_000'])"
    for arguments in (["--steps=3", "--do="], [f"--do={code}"]):
        process = command("mark", "--config=c.py", f"--output={tmp_path}", *arguments, name="verbs.py")
        process.check_returncode()
    first, second = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert first["command"] == "verbs mark"
    assert first["argv"] == ["mark", "--config=c.py", f"--output={tmp_path}", "--steps=3", "--do="]
    assert 0 <= first["seconds"] < 60
    assert second["peak_memory_bytes"] - first["peak_memory_bytes"] > 150_000_000
    assert first["date"].endswith("+00:00")


def test_a_verb_is_chosen_by_the_first_argument(command):
    process = command("make", "--output=x", "--config=c.py", name="verbs.py")
    assert process.stdout == "made x []\n", process.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "verbs needs one of: make, mark"),
        (["mkae"], "verbs has no 'mkae'; did you mean 'make'?"),
        (["mkae", "--steps=3"], "verbs has no 'mkae'; did you mean 'make'?"),
        (["--output", "make"], "verbs needs one of: make, mark"),
        (["it", "make"], "verbs has no 'it'; it has make, mark"),
        (["make", "it"], "unexpected argument 'it'"),
        (["make", "--steps=3"], "there is no flag --steps"),
        (["make", "--config=c.py"], "--output is missing (folder to write): give --output=..."),
    ],
)
def test_a_mistake_in_the_verb_is_one_line(command, arguments, error):
    assert error in only_line(command(*arguments, name="verbs.py"))


@pytest.mark.parametrize(
    ("name", "given"),
    [("XLA_CLIENT_MEM_FRACTION", None), ("XLA_CLIENT_MEM_FRACTION", "0.5"), ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")],
)
def test_a_command_takes_nine_tenths_of_a_gpu_unless_told(command, monkeypatch, name, given):
    for each in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(each, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    do = "import os; print({key: value for key, value in os.environ.items() if key.endswith('CLIENT_MEM_FRACTION')})"
    assert str({name: given or "0.9"}) in command("--config=c.py", f"--do={do}").stdout


def test_importing_the_frame_does_not_import_jax():
    code = "import sys, opensora_jax.config.command; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60)
