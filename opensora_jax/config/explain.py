"""What to tell the user about an exception: one line for what they can mend, nothing for a bug.

Mistakes in flags come from absl, refusals of the disk from anywhere below: as an OSError or, from libraries
in C++, as some other error that carries the system's words.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator

from absl import flags

from opensora_jax.config.build import suggestion
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import missing


def explain(error: Exception) -> str | None:
    """Returns the line for what a user can mend, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, flags.Error):
        return _explain_flag(error)
    if isinstance(error, OSError) and error.errno in _PATH and error.filename is not None:
        return f"{error.filename}: {_PATH[error.errno]}"
    for cause in _chain(error):
        for code, advice in _DISK.items():
            if getattr(cause, "errno", None) == code or os.strerror(code) in str(cause):
                return f"{getattr(cause, 'filename', None) or _quoted_path(cause) or _output_folder()}: {advice}"
    return None


_DISK = {  # wherever they sit in a chain of errors, these are the reason
    errno.ENOSPC: "no space is left on the disk; free some or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
}

_PATH = {  # only as the error itself: code may master one of these and then fail for another reason
    errno.ENOENT: "there is no such file or folder; check the path, or choose another",
    errno.EACCES: "permission is denied; change its rights or choose another path",
    errno.EPERM: "the operation is not permitted; change its rights or choose another path",
    errno.EISDIR: "this is a folder, not a file; choose another path",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another path",
    errno.EEXIST: "a file has the name that a folder needs; move it or choose another folder",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def _explain_flag(error: flags.Error) -> str:
    """Returns absl's complaint in the house's words where there are any."""
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith("config."):
            return f"--{error.flagname} overrides a config that is not given: put --config=configs/... before it"
        return f"there is no flag --{error.flagname}; {suggestion(error.flagname, _own_flags())}"
    if match := re.search(r"Flag --(\S+) must have a value other than None", str(error)):
        return missing(match[1])
    return str(error)


def _own_flags() -> list[str]:
    """Returns the flags that the command itself defines, without absl's and the overrides of a config."""
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]) if "." not in flag.name]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _quoted_path(error: BaseException) -> str | None:
    """Returns the first absolute path that a message quotes."""
    match = re.search(r'"(/[^"]+)"', str(error))
    return match[1] if match else None


def _output_folder() -> str:
    """Returns where this command was told to write: a full disk does not say which file it refused."""
    flag = flags.FLAGS["output"].value if "output" in flags.FLAGS else None
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    fields = [config[name] for name in ("workdir", "save_dir") if config and name in config]
    return str(next(filter(None, [flag, *fields]), "the output folder"))
