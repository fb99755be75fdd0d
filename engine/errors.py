"""Errors a user can act on, each with the exit code the commands promise. One line each: what was wrong, what was wanted, what came."""


class UserError(Exception):
    """Base of every error that ends a command with one `error:` line instead of a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A flag, a config file or an override is wrong."""

    exit_code = 2


class MediaError(UserError):
    """The input video, image or folder cannot be used."""

    exit_code = 3


class WeightsError(UserError):
    """A checkpoint, tokenizer or cascade folder is missing, damaged or of another shape."""

    exit_code = 4


class DiskError(UserError):
    """A path cannot be read or written."""

    exit_code = 5


class NumericError(UserError):
    """A loss, gradient or sample is not finite."""

    exit_code = 6


class LockedError(UserError):
    """Another process is using the same output folder."""

    exit_code = 7


class OutOfMemory(UserError):
    """The work does not fit the memory at hand."""

    exit_code = 8
