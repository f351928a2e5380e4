"""Errors that a user can cause and mend.

Each message is one line: what was got, what was expected, what to do. The command line prints it and exits with code 2;
from Python they are ordinary `ValueError`s.
"""


class CSKVError(ValueError):
    """A mistake in what the user gave: a value, a file, a model or a combination of them."""


class ConfigError(CSKVError):
    """A setting outside its range, or a rank that rounds to zero."""


class UnsupportedModelError(CSKVError):
    """The model's attention does not match the one generic path; it would give wrong results, so it is refused."""


class AdapterError(CSKVError):
    """An adapter folder that is damaged, or that belongs to another base model."""


class CacheError(CSKVError):
    """A cache object that cannot hold compressed layers (static, offloaded, filled without the compressor, ...)."""


class DataError(CSKVError):
    """Text or statistics that cannot be used: empty, too short, or not finite."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the name of the error where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
