"""The `--config=file.py --config.a.b=value` flag, on top of ml_collections' config_flags.

The file is loaded and the names of overrides are checked here, since config_flags postpones a missing file
until its first use and answers an unknown key with a traceback; the values' types stay its business.
"""

import re
import runpy
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from opensora_jax.config.build import suggestion
from opensora_jax.config.errors import UserError

flags.disclaim_key_flags()  # --config then counts as the command's own flag, in its --help and in messages


def config_flag(*, required: bool = True) -> flags.FlagHolder[ConfigDict]:
    """Defines `--config`, once per process; the holder's `.value` is the locked config with its overrides."""
    if "config" not in flags.FLAGS:
        config_flags.DEFINE_config_file("config", None, "config file; --config.field=value overrides a field")
        flags.FLAGS["config"].parser = _ConfigFile()
        if required:
            flags.mark_flag_as_required("config")
    return flags.FlagHolder(flags.FLAGS, flags.FLAGS["config"])


def require(*names: str) -> None:
    """Raises UserError unless these flags were given. For verbs: they share one command's flags."""
    for name in names:
        if flags.FLAGS[name].value is None:
            raise UserError(missing(name))


def missing(name: str) -> str:
    """Returns what to tell a user who left out a flag."""
    example = "configs/....py" if name == "config" else "..."
    return f"--{name} is missing ({flags.FLAGS[name].help}): give --{name}={example}"


def load_config(path: str | Path) -> ConfigDict:
    """Returns the locked result of the file's `get_config()`.

    Raises: UserError when the file is missing or fails, with the line at fault.
    """
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist: the ones that come with the code are in configs/")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if get_config else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {path} fails{_place(path, error)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path} needs a function get_config() that returns a ConfigDict")
    return config.lock()


class _ConfigFile(flags.ArgumentParser[ConfigDict]):
    """Parses a config file's name into its config, after a check of all overrides on the command line."""

    def parse(self, argument: str) -> ConfigDict:
        """Returns the config without its overrides: config_flags applies them next, in their order."""
        config = load_config(argument)
        overrides = list(_overrides(sys.argv))
        for override in overrides:
            value = _check_override(config, override)
            if isinstance(value, tuple) and overrides.count(override) > 1:  # config_flags would join them
                raise UserError(f"--config.{override} is given {overrides.count(override)} times; give it once")
        return config


def _overrides(argv: list[str]) -> Iterator[str]:
    """Yields "a.b" for every `--config.a.b=1`, `--config.a.b 1` and `--noconfig.a.b`."""
    for argument in argv:
        if match := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            yield match[1]


def _check_override(config: ConfigDict, override: str) -> Any:
    """Returns the value to be overridden.

    Raises: UserError unless the path leads to a field of the config that the command line can set.
    """
    try:
        parts = config_path.split(override)
    except ValueError:
        raise UserError(f"--config.{override} is no path: write --config.a.b=1 or --config.a['key']=1") from None
    holder: Any = config
    trail = "config"
    for part in parts:
        if not isinstance(holder, ConfigDict):
            raise UserError(f"{trail} is {holder!r} and has no field {part!r} to override")
        if part not in holder:
            raise UserError(f"{trail} has no field {part!r}; {suggestion(part, holder)}")
        field_type = holder.get_type(part)
        holder = holder[part]
        trail += f".{part}" if isinstance(part, str) else f"[{part!r}]"
    if field_type in (types.NoneType, list):
        raise UserError(f"{trail} is {holder!r} and cannot be overridden: set it in a config file of your own")
    return holder


def _place(path: str | Path, error: Exception) -> str:
    """Returns " at line N" for the last line of the config file that ran before the error."""
    if isinstance(error, SyntaxError):
        return f" at line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" at line {frames[-1].lineno}" if frames else ""
