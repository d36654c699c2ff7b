"""The package's exceptions.

Every error raised here on purpose derives from [RLSparsityError][] and from the builtin that
fits, so that both `except rls.RLSparsityError` and `except ValueError` work. A message always says
what was received, what was expected and how to mend it.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any


class RLSparsityError(Exception):
    """Base class of every error raised by this package.

    Its text holds no control characters: names in it may come from files.

    Example:
        >>> try:
        ...     rls.Target(sparsity=2)
        ... except rls.RLSparsityError as error:
        ...     print(type(error).__name__)
        ArgumentError
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n\t")


class ArgumentError(RLSparsityError, ValueError):
    """An argument has a value that cannot be used.

    Example:
        >>> rls.Target(sparsity=2)
        Traceback (most recent call last):
        rl_sparsity_tf.errors.ArgumentError: ...
    """


class FileError(ArgumentError, OSError):
    """The system does not let a file or folder be read or written: no right to, no room, no name.

    `errno` is the system's number of the reason.

    Example:
        >>> plan.save("a" * 300)
        Traceback (most recent call last):
        rl_sparsity_tf.errors.FileError: ...
    """


class ModelError(RLSparsityError, ValueError):
    """The model given cannot be compressed or read.

    Example:
        >>> not_built = keras.Sequential([keras.layers.Dense(10)])
        >>> rls.baselines.erk(not_built, sparsity=0.9)
        Traceback (most recent call last):
        rl_sparsity_tf.errors.ModelError: ...
    """


class DataError(RLSparsityError, ValueError):
    """The data given does not fit the model or the task.

    Example:
        >>> rls.datasets.load_npz("forgotten.npz")
        Traceback (most recent call last):
        rl_sparsity_tf.errors.DataError: ...
    """


class PlanError(RLSparsityError, ValueError):
    """A compression plan is malformed or does not fit the model.

    Example:
        >>> rls.CompressionPlan.from_json("{}")
        Traceback (most recent call last):
        rl_sparsity_tf.errors.PlanError: ...
    """


class TargetError(RLSparsityError, ValueError):
    """The target cannot be reached.

    Example:
        >>> rls.baselines.lamp(model, sparsity=0.99999)
        Traceback (most recent call last):
        rl_sparsity_tf.errors.TargetError: ...
    """


class MissingDependencyError(RLSparsityError, ImportError):
    """An optional dependency is needed for this call and is not installed."""


class ExportError(RLSparsityError, RuntimeError):
    """A .tflite file could not be written, or is damaged.

    Example:
        >>> half = Path("model.tflite").read_bytes()[:10_000]
        >>> Path("half.tflite").write_bytes(half)
        10000
        >>> rls.inspect_tflite("half.tflite")
        Traceback (most recent call last):
        rl_sparsity_tf.errors.ExportError: ...
    """


class NotMeasuredError(ExportError):
    """Times scatter too much to mean anything.

    Example:
        >>> try:  # doctest: +SKIP
        ...     table = rls.measure_latency(model)
        ... except rls.NotMeasuredError:  # this machine has other things to do
        ...     table = rls.LatencyTable.load("phone.json")
    """


class VerificationError(ExportError):
    """A .tflite file was written but does not do what the Keras model does.

    Example:
        >>> rls.export_tflite(model, "half.tflite", "float16", tolerance=1e-9)
        Traceback (most recent call last):
        rl_sparsity_tf.errors.VerificationError: ...
    """


class FileExistsRLSparsityError(RLSparsityError, FileExistsError):
    """A file or folder is in the way and overwriting was not asked for."""


class RunError(RLSparsityError, RuntimeError):
    """A run directory cannot be used: foreign, damaged or from other arguments."""


class PolicyFileError(RLSparsityError, ValueError):
    """A file of a policy is damaged or foreign, or was made for other features."""


def printable(text: str, keep: str = "") -> str:
    r"""A text that does nothing but stand there when it is printed.

    Names from files may hold what terminals obey: escape sequences, changes of direction, halves of
    characters. These are written out, but for control characters in `keep`.

    Example:
        >>> print(printable("dense\x1b[2J"))
        dense\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _INVISIBLE
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


_LONGEST_WORD = 200
# Controls, formats (such as the direction of writing), halves of characters, ends of lines.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """Lists the choices and names the closest one.

    Example:
        >>> did_you_mean("elment", ["element", "channel"])
        "Expected one of 'element', 'channel'. Did you mean 'element'?"
    """
    names = [str(choice) for choice in choices]
    text = "Expected one of " + ", ".join(repr(name) for name in names) + "."
    # A file's text may be of any length, and comparing takes its square.
    close = difflib.get_close_matches(str(value)[:_LONGEST_WORD], names, n=1)
    return f"{text} Did you mean {close[0]!r}?" if close else text


def one_line(error: BaseException, limit: int = 200) -> str:
    """An error's class and the first line of its text, to be quoted in a message.

    Of the text there are `limit` characters at most.
    """
    text = printable((str(error).strip().splitlines() or [""])[0].rstrip(". "))
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Returns `value` if it is one of the choices, else raises an [ArgumentError][]."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name}={value!r} is not known. {did_you_mean(value, choices)}")
    return value


class AgentStateError(RLSparsityError, RuntimeError):
    """An agent's methods were called out of order, or it was given another agent's state."""


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a search after an episode.

    A `KeyboardInterrupt` and no `RLSparsityError`, so that whoever goes on after errors does not
    go on after this.

    Attributes:
        episodes: How many had been played.
        directory: The run directory, where everything is saved; None without one.
        plan: The best plan so far, for [wrap][rl_sparsity_tf.wrap].

    Example:
        >>> try:
        ...     result = compressor.search((x, y), validation_data=(x_val, y_val), verbose=0)
        ... except rls.SearchInterrupted as interrupted:
        ...     small = rls.strip(rls.wrap(model, interrupted.plan))
    """

    def __init__(self, message: str, *, episodes: int, directory: str | None, plan: Any):
        super().__init__(message)
        self.episodes = episodes
        self.directory = directory
        self.plan = plan
