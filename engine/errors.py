"""Errors that a user can cause.

Launchers print them as one message, without a traceback, and exit with status 2.
"""


class TrunklineError(Exception):
    """What went wrong, with the file, key and value concerned, and what to do about it.

    An error about a value of the configuration begins with its dotted key: "data.store: ...".

    heading, status: what a launcher prints it under, and the exit status
    origin: where that value came from; `RunConfig.naming_origins` sets it, and the text begins with it
    """

    heading, status = "error", 2
    origin: str | None = None

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.origin is None else f"{self.origin}: {text}"


class ConfigError(TrunklineError):
    """A configuration file or a command-line setting is wrong."""


class DataError(TrunklineError):
    """An input file is missing, damaged or does not have the layout that was promised."""


class MissingDataError(DataError):
    """There are no data where the configuration says that they are. `--plan` can do without."""


class CheckpointError(TrunklineError):
    """A checkpoint is damaged, does not fit this run, or none can be loaded though a resume was asked for."""
