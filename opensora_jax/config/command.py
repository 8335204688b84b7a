"""The frame around every command: one line of error out, and a record of the time and memory it took.

A user's mistake, a full disk or Ctrl-C end in one `error: ...` line on stderr; a bug keeps its traceback.
Flags are absl's, and nothing here imports JAX.
"""

import datetime
import json
import logging as python_logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from absl import app, flags, logging

from opensora_jax.config.build import suggestion
from opensora_jax.config.errors import UserError
from opensora_jax.config.explain import explain

Main = Callable[[list[str]], Path | None]


def run(main: Main) -> NoReturn:
    """Parses the command line, runs `main(argv)` and ends the process; `argv` holds the command's name alone.

    `main` returns the folder that gets a line in its `runs.jsonl`, or None (on all hosts but the first, say).
    Exit status: 0, 1 after an error, 130 after Ctrl-C. `--verbosity=1` shows the traceback behind an error.
    """
    _run(lambda argv: main(_without_arguments(argv)), _parse_flags)


def run_verbs(
    verbs: Mapping[str, Main], define_flags: Mapping[str, Callable[[], object]] = MappingProxyType({})
) -> NoReturn:
    """Does as `run` for a command of several: `dataset demo --output=...` runs `verbs["demo"](argv)`.

    Of `define_flags` only the entry of that verb is called, so that a flag of another verb is refused.
    """
    given = next((argument for argument in sys.argv[1:] if argument in verbs), None)
    define_flags.get(given or "", lambda: None)()

    def parse_flags(argv: list[str]) -> list[str]:
        if given is None and not any(argument.startswith(("-h", "--help")) for argument in argv):
            raise UserError(_without_verb(argv, verbs))
        return _parse_flags(argv)

    def dispatch(argv: list[str]) -> Path | None:
        if len(argv) < 2 or argv[1] not in verbs:
            raise UserError(_without_verb(argv, verbs))
        return verbs[argv[1]](_without_arguments(argv[:1] + argv[2:]))

    _run(dispatch, parse_flags)


def peak_memory_bytes() -> int:
    """Returns the most memory this process held at a time plus the most that any one of its children did."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


_QUIET = {  # read when these libraries load, so a command that wants them quiet imports them in its functions
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "GRPC_VERBOSITY": "ERROR",
}
_MEMORY = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jaxlib refuses both at once; the second is old
GPU_SHARE = 0.9  # of a GPU's memory that JAX takes; three quarters by its own default


def _run(main: Main, parse_flags: Callable[[list[str]], list[str]]) -> NoReturn:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in _MEMORY):
        os.environ[_MEMORY[0]] = str(GPU_SHARE)
    try:
        app.run(lambda argv: _record(main, argv), flags_parser=parse_flags)
    except KeyboardInterrupt:
        message, status = "interrupted: the same command starts or continues the work", 130
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        logging.debug("behind the error below:\n%s", traceback.format_exc())
        message, status = explanation, 1
    # Past the except blocks the traceback is gone, and with it the progress bars that would share this line.
    print("error:", " ".join(filter(None, map(str.strip, message.splitlines()))), file=sys.stderr, flush=True)
    sys.exit(status)


def _parse_flags(argv: list[str]) -> list[str]:
    """Returns what is left of the command line; a request for help is no failure."""
    flags.FLAGS.set_gnu_getopt(True)  # `dataset demo --output=...`: flags may follow the verb
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        raise SystemExit(0) from None
    handler = logging.get_absl_handler().python_handler
    handler.setFormatter(python_logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_is_worth_showing)
    return rest


def _is_worth_showing(record: python_logging.LogRecord) -> bool:
    """Says whether a log record is ours or another's warning: Orbax shares absl's logger and tells a lot."""
    if logging.get_verbosity() > 0 or Path(__file__).parents[1] in Path(record.pathname).parents:
        return True
    cause = record.exc_info[1] if record.exc_info else None
    if isinstance(cause, Exception) and explain(cause):
        return False  # a thread of Orbax tells of a full disk before the error line does
    return record.levelno >= python_logging.WARNING


def _name(argv: list[str]) -> str:
    return " ".join([Path(argv[0]).stem, *argv[1:]])


def _without_arguments(argv: list[str]) -> list[str]:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
    return argv


def _without_verb(argv: list[str], verbs: Iterable[str]) -> str:
    """Returns the complaint about a command line whose first word is no verb."""
    word = next((argument for argument in argv[1:] if not argument.startswith("-")), None)
    if word is None:
        return f"{_name(argv[:1])} needs one of: {', '.join(verbs)}"
    return f"{_name(argv[:1])} has no {word!r}; {suggestion(word, verbs)}"


def _record(main: Main, argv: list[str]) -> None:
    """Runs main and appends what it took to `runs.jsonl` in the folder that it returns."""
    start = time.perf_counter()
    folder = main(argv)
    if folder is None:
        return
    line = {
        "command": _name(argv),
        "argv": sys.argv[1:],
        "seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with (folder / "runs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
