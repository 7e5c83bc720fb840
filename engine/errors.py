"""Errors that a user can cause.

Launchers print them as one message, without a traceback, and exit with status 2.
"""


class TrunklineError(Exception):
    """What went wrong, with the file, key and value concerned, and what to do about it.

    heading, status: what a launcher prints it under, and the exit status
    """

    heading, status = "error", 2


class ConfigError(TrunklineError):
    """A configuration file or a command-line setting is wrong."""


class DataError(TrunklineError):
    """An input file is missing, damaged or does not have the layout that was promised."""


class MissingDataError(DataError):
    """There are no data where the configuration says that they are. `--plan` can do without."""


class CheckpointError(TrunklineError):
    """A checkpoint is damaged, does not fit this run, or none can be loaded though a resume was asked for."""
