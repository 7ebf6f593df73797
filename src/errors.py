"""The exceptions that are no bugs.

The user can fix this; the run was told to stop; there is nothing to do.
"""


class UserError(Exception):
    """Wrong input, found before any work. The message names the thing, both values and the fix.

    `src.cli.run` prints it once, from rank 0, without a traceback, and exits with code 2.
    """


class Stopped(Exception):
    """The run was told to stop, and what it needs to go on is saved.

    `src.cli.run` prints it once, from rank 0, and exits with `STOPPED`.
    """


class Finished(Exception):
    """The run was done already. `src.cli.run` prints it once, from rank 0, and exits with 0."""


STOPPED = 75  # sysexits.h, EX_TEMPFAIL: the same command may be run again
