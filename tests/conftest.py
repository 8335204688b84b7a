"""The setting of all tests: a CPU as 8 devices, exact float32 products, compiled programs kept between runs.

Eight devices are made through jax.config rather than the environment, so that commands started by tests see one.
Warnings are errors (pyproject.toml). Tests marked `slow` run too; `-m "not slow"` leaves them out. `--goldens` names
the folders whose cases tests/parity runs; their table is printed at the end, with pytest-xdist too.
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # for the commands that tests start as well

import jax
import pytest

from tests.environment import QUICK, cpu_devices

MAPPINGS = 15_000  # of memory: Linux allows 65,530 in a process, beyond them compiling crashes
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opensora_jax" / "jax-tests"

os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()  # for those commands too
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """Runs a command as a user does; see tests/commands.py."""
    from tests.commands import server  # once jax.config has all of the above

    with server(tmp_path_factory.mktemp("commands")) as run:
        yield run


@pytest.fixture
def convert(command):
    """Returns a function that runs `convert` on so many devices, however it ends."""

    def run(*arguments, devices=1):
        return command("convert", *arguments, status=None, environment=cpu_devices(devices))

    return run


def pytest_addoption(parser):
    own = str(Path(__file__).parent / "goldens")
    parser.addoption("--goldens", action="append", metavar="DIR", help=f"folder of golden cases, repeatable [{own}]")


def pytest_configure(config):
    given = config.option.goldens or [str(Path(__file__).parent / "goldens")]
    config.option.goldens = [str((config.invocation_params.dir / folder).resolve()) for folder in given]
    for folder in map(Path, config.option.goldens):
        if not folder.is_dir():
            raise pytest.UsageError(f"--goldens {folder} is not a folder; give one with json and safetensors files.")
        if not any(folder.rglob("*.json")):
            raise pytest.UsageError(f"--goldens {folder} holds no case; give a folder with json files in it.")


def pytest_runtest_teardown(item):
    """Drops compiled programs, each of which holds a few mappings of memory, before a process runs out of them."""
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = sorted(tuple(value) for report in calls for key, value in report.user_properties if key == "parity")
    if rows:
        terminalreporter.section("parity")
        for line in _table(rows):
            terminalreporter.write_line(line)


def _table(rows):
    """Returns the lines of the table of tests/parity/cases.py's results."""
    titles = ("case", "compared", "worst", "error", "tolerance", "")
    cells = [
        (case, str(count), worst, f"{error:.1e}", f"{limit:.1e}", verdict + (f": {note}" if note else ""))
        if count
        else (case, "-", "-", "-", "-", f"{verdict}: {note}")
        for case, count, worst, error, limit, verdict, note in rows
    ]
    widths = [max(len(row[i]) for row in [titles, *cells]) for i in range(5)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in [titles, *cells]
    ]
    verdicts = [row[5] for row in rows]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("pass", "FAIL", "pending"))
    return [*lines, f"{len(rows)} cases: {counts}; {sum(row[1] for row in rows)} comparisons"]
