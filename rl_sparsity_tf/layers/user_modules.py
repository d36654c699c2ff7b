"""The user's own modules, which bring the classes that a saved model is made of."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError, did_you_mean, one_line
from rl_sparsity_tf.layers.untrusted import PARTS, ROOTS


@contextlib.contextmanager
def user_modules(names: Sequence[str]) -> Iterator[None]:
    """Imports modules; while the context lasts, Keras knows their classes, registered or not.

    Args:
        names: Modules that are installed or in the current folder, which is looked through first.

    Raises:
        ArgumentError: If one cannot be imported, or was written for Keras 3.
    """
    for name in names:
        _check_name(name)
    classes: dict[str, type] = {}
    for name in names:
        classes |= _classes_of(_imported(name))
    with keras.utils.custom_object_scope(classes):
        yield


def _check_name(name: str) -> None:
    path = Path(name)
    if path.suffix == ".py" or "/" in name or os.sep in name:
        folder = "" if path.parent == Path(".") else f" after: cd {path.parent}"
        raise ArgumentError(
            f"--import {name} is a path. Expected the name of a module, installed or in the "
            f"current folder: --import {path.stem}{folder}"
        )
    if not all(part.isidentifier() for part in name.split(".")):
        raise ArgumentError(
            f"--import {name!r} is no name of a module. Expected one such as layers, or "
            "project.layers."
        )


def _imported(name: str) -> ModuleType:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        # What was looked for before the folder had it is remembered as missing.
        importlib.invalidate_caches()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing == name or name.startswith(f"{missing}."):
            raise _not_found(name, folder) from error
        raise _failing(name, error) from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise _failing(name, error) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _not_found(name: str, folder: str) -> ArgumentError:
    here = sorted(
        path.stem
        for path in Path(folder).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    )
    known = f" {did_you_mean(name, here)}" if 0 < len(here) <= 20 else ""
    return ArgumentError(
        f"--import {name}: there is no module of that name, neither installed nor in the current "
        f"folder {folder!r}. Run the command in the folder that holds it, or put that on "
        f"PYTHONPATH.{known}"
    )


def _failing(name: str, error: BaseException) -> ArgumentError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    return ArgumentError(
        f"--import {name} fails: {one_line(error)}{where}. Expected a module that can be imported: "
        f"try python -c 'import {name}' in this folder."
    )


def _classes_of(module: ModuleType) -> dict[str, type]:
    """The user's classes in a module that models are made of, also those it took from elsewhere."""
    found = {}
    for name, value in vars(module).items():
        if not isinstance(value, type) or value.__module__.split(".")[0] in ROOTS:
            continue
        if any(base.__module__.split(".")[0] == "keras" for base in value.__mro__):
            raise ArgumentError(
                f"--import {module.__name__}: its class {name} is one of Keras 3. Expected classes "
                "of Keras 2: import tf_keras as keras in the module."
            )
        if issubclass(value, PARTS):
            found[value.__name__] = value
    return found
