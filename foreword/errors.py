"""What can go wrong, as a tree. Every message says what was found, where, what was expected, and what to do.

ForewordError (a ValueError)
├── ConfigError             an option has a wrong value, or two options contradict each other
├── DataError               a row cannot be used: file, line number and reason
├── UnsupportedModelError   the model's attention cannot carry a prefix
├── ModelMismatchError      the prefix was made for another model
├── EngineError             another engine cannot hold the prefix, or did not use it
├── HubError                the Hugging Face Hub has no such prefix, refuses, or cannot be reached
├── PrefixFileError         the file is truncated, corrupt, of an unknown version, or no prefix at all
├── PositionError           prefix plus text overrun the model's table of learned positions
└── ServingError            a request cannot be served as things are
    ├── OverloadedError         too many requests wait; try again later
    ├── PrefixChangedError      the prefix was replaced or deleted before the request started
    └── ShutdownError           the engine ends, or has failed
"""

__all__ = [
    "ConfigError",
    "DataError",
    "EngineError",
    "ForewordError",
    "HubError",
    "ModelMismatchError",
    "OverloadedError",
    "PositionError",
    "PrefixChangedError",
    "PrefixFileError",
    "ServingError",
    "ShutdownError",
    "UnsupportedModelError",
]


class ForewordError(ValueError):
    """Any mistake that the caller can mend."""


class ConfigError(ForewordError):
    """An option has a wrong value, or two options contradict each other."""


class DataError(ForewordError):
    """A row of data cannot be used."""


class UnsupportedModelError(ForewordError):
    """The model's attention cannot carry a prefix."""


class ModelMismatchError(ForewordError):
    """The prefix was made for another model."""


class EngineError(ForewordError):
    """Another engine cannot hold the prefix, or did not use it."""


class HubError(ForewordError):
    """The Hugging Face Hub has no such prefix, refuses, or cannot be reached."""


class PrefixFileError(ForewordError):
    """The file is truncated, corrupt, of an unknown version, or no prefix at all."""


class PositionError(ForewordError):
    """Prefix plus text overrun the model's table of learned positions."""


class ServingError(ForewordError):
    """A request cannot be served as things are."""


class OverloadedError(ServingError):
    """Too many requests wait. `retry_after`: when to try again, in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PrefixChangedError(ServingError):
    """The prefix was replaced or deleted before the request started."""


class ShutdownError(ServingError):
    """The engine ends, or has failed."""
