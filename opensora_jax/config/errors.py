"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in a config, a file or a request, told in one line: what was given, what is allowed, what to do.

    Commands print it without a traceback and exit with status 1 (`config.command`).
    """
