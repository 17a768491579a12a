"""Errors that are shown to users, each as one line: THING: FOUND; ALLOWED VALUES OR WHAT TO DO.

AnimeDiffusionError           exit code 2 unless another one is given
    ConfigError               a setting or an argument is wrong
    StorageError              a file or an object cannot be read or written
        FileError             one file is missing or forbidden; others may be usable
        UnreachableError      the store does not answer or is too busy
            StoreFailedError  the store answered before but fails now; exit code 1
    DataError                 a dataset or a source folder cannot be used
    ImageError                bytes are not a usable image
    BundleError               a model bundle is missing, damaged or does not fit
    RegistryError             a model version or alias does not exist, or MLflow or a check rejects a request
    ClusterError              Ray or a service on it cannot be reached or started
    TrainingError             a training run failed; its last checkpoint is kept; exit code 1
    Interrupted               a signal stopped a run or a command; what is done is saved; exit code 128 + signal
ServeError                    a request was not answered; serve/api/problems.py gives the HTTP status
    BusyError                 too many requests are waiting; try again later
    DeadlineError             a picture was not, or cannot be, finished by its deadline
    UnavailableError          an engine cannot make a picture now; another engine can, or this one later
        NoModelError          no version is loaded

    try:
        ...
    except AnimeDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

This module needs only the standard library, and all folders may import it.
"""

import re

_BREAKS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Line ends, control characters and bytes that are not UTF-8, which file names may contain; messages escape them."""


def _escape(found: re.Match[str]) -> str:
    byte = ord(found[0]) - 0xDC00  # Python's surrogate for a byte that is not UTF-8
    return f"\\x{byte:02x}" if byte >= 0x80 else found[0].encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """The text with escapes for what would end a line, move a terminal's cursor or cannot be printed."""
    return _BREAKS.sub(_escape, text)


class AnimeDiffusionError(Exception):
    """Base class of all errors that are shown to users, worded for the user who can fix the cause.

    Args:
        thing: the input, file or setting that has the error.
        found: what is wrong with it; values are quoted.
        allowed: what is allowed, or what to do now.
    """

    exit_code = 2

    def __init__(self, thing: str, found: str, allowed: str) -> None:
        super().__init__(thing, found, allowed)
        self.thing = thing
        self.found = found
        self.allowed = allowed

    def __str__(self) -> str:
        return one_line(f"{self.thing}: {self.found}; {self.allowed}")


class ConfigError(AnimeDiffusionError):
    """A setting or an argument is wrong."""


class StorageError(AnimeDiffusionError):
    """A file or an object cannot be read or written; the message names the path or URI."""


class FileError(StorageError):
    """A single file is missing or cannot be accessed; other files of the same store may be usable."""


class UnreachableError(StorageError):
    """The store does not answer or is too busy, whatever the file."""


class StoreFailedError(UnreachableError):
    """A store that answered before has failed for longer than the retry time; the same command resumes later."""

    exit_code = 1


class DataError(AnimeDiffusionError):
    """A dataset or a source folder cannot be used."""


class ImageError(AnimeDiffusionError):
    """Bytes are not a usable image.

    Attributes:
        reason: one of `truncated`, `not_an_image`, `empty`, `too_large`, `inverted`, `unreadable`.
    """

    def __init__(self, thing: str, found: str, allowed: str, *, reason: str = "unreadable") -> None:
        super().__init__(thing, found, allowed)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _image_error, (self.thing, self.found, self.allowed, self.reason)


def _image_error(thing: str, found: str, allowed: str, reason: str) -> ImageError:
    return ImageError(thing, found, allowed, reason=reason)


class BundleError(AnimeDiffusionError):
    """A model bundle is missing, damaged, incomplete or of another format."""


class RegistryError(AnimeDiffusionError):
    """The registry has no such model, version or alias, or MLflow or a check rejects a request."""


class ClusterError(AnimeDiffusionError):
    """Ray, or a service on it, cannot be reached or started."""


class TrainingError(AnimeDiffusionError):
    """A training run failed; its last checkpoint is kept."""

    exit_code = 1


class Interrupted(AnimeDiffusionError):  # noqa: N818 - a stop request is not an error
    """A signal stopped a run or a command; what is done is saved.

    Args:
        signum: number of the signal.
        thing: what was stopped: `run NAME`, or the command.
        step: what is done: the step of the saved checkpoint, or the number of units.
        unit: the unit that `step` counts.
        total: last step of the whole run; None if it is not known.
    """

    def __init__(self, signum: int, thing: str, step: int, unit: str = "step", total: int | None = None) -> None:
        of = "" if total is None else f" of {total}"
        super().__init__(thing, f"stopped at {unit} {step}{of}", "run the same command again to resume")
        self.signum, self.step = signum, step
        self.exit_code = 128 + signum


class ServeError(Exception):
    """Base class of the errors of serving. The arguments are plain values, so that processes can exchange errors."""


class BusyError(ServeError):
    """Too many requests are waiting. Arguments: the reason, and the seconds after which to retry, if known."""

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which to retry; None if unknown."""
        return float(self.args[1]) if len(self.args) > 1 else None


class DeadlineError(ServeError):
    """The picture was not, or cannot be, finished by its deadline."""


class UnavailableError(ServeError):
    """An engine cannot make a picture now. Argument: the reason. A retry on another engine, or later, can work."""


class NoModelError(UnavailableError):
    """No version is loaded. Argument: the reason."""
