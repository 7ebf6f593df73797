"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """Wrong input, found before any work. The message names the thing, both values and the fix.

    `src.cli.run` prints it once, from rank 0, without a traceback, and exits with code 2.
    """
