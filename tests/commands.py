"""Commands as a user runs them.

Their imports take longer than their work in tests: all are forks of one process that has imported everything.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
SERVER = """
import json, os, runpy, signal, sys, tempfile
import matplotlib.figure, tensorboardX, transformers
import opensora_jax.inference.encode, opensora_jax.inference.pipeline, opensora_jax.training.loop
for line in sys.stdin:
    module, arguments, environment, output = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, name in (1, "stdout"), (2, "stderr"):
            os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.environ.update(environment)
        tempfile.tempdir = None
        sys.argv[1:] = arguments
        signal.alarm(300)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ENVIRONMENT = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
Command = Callable[..., subprocess.CompletedProcess]


@contextmanager
def server(folder: Path) -> Iterator[Command]:
    """Yields a function that runs `python -m opensora_jax.NAME ARGUMENTS`, which must end with `status` unless None.

    `environment` has variables that are read when the command runs, not when its libraries load.
    """
    output = folder / "output"
    line = [sys.executable, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes) as process:

        def run(
            name: str, *arguments: str | Path, status: int | None = 0, environment: dict[str, str] | None = None
        ) -> subprocess.CompletedProcess:
            request = [f"opensora_jax.{name}", [str(one) for one in arguments], environment or {}, str(output)]
            print(json.dumps(request), file=process.stdin, flush=True)
            found = int(process.stdout.readline())
            printed = [output.with_suffix(f".{name}").read_text() for name in ("stdout", "stderr")]
            assert status in (None, found), printed[1][-4000:]
            return subprocess.CompletedProcess(arguments, found, *printed)

        yield run
