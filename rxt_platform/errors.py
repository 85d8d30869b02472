"""The project's exception types: what a user sees when something is wrong.

Every message names the place (file, row, key, step) and the fix. The command line prints it as one line and leaves with
`exit_code`: 2 for input that must be changed before anything can run, 1 for a run that failed.
"""


class RxtError(Exception):
    """Base of everything that a user can mend; `exit_code` is the process's exit status."""

    exit_code = 1
    on_all_ranks = False  # raised by every rank of a training job at the same place


class ConfigError(RxtError):
    """The run's configuration is wrong: an unknown key, a bad value, an unknown preset."""

    exit_code = 2


class DataError(RxtError):
    """Input data is missing, empty or malformed; the message holds file:row:column."""

    exit_code = 2


class ArtifactError(RxtError):
    """A stored directory is missing, of the wrong kind, or its content does not match its manifest."""

    exit_code = 2


class ModelError(RxtError):
    """A model was given a memory that is not its own, or its weights or memory hold numbers that are not finite."""

    exit_code = 2


class ResumeError(RxtError):
    """A resume was asked for and cannot be done without losing or mixing work."""

    exit_code = 2


class BusyError(RxtError):
    """Somebody else is working on the same run."""

    exit_code = 2


class TrainingError(RxtError):
    """Training stopped: a loss that is not finite, a worker that failed for good."""


class RewardError(RxtError):
    """Rewards or values could not be had, or not of the version that was asked for; training never goes on without."""


class StoppedError(RxtError):
    """Training was asked to stop (SIGTERM, Ctrl-C) and did so with a checkpoint: the same command goes on."""

    exit_code = 3
