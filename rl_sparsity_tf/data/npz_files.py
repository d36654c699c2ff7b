"""Reading .npz files of training data, with a clear refusal of those that cannot be used."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from rl_sparsity_tf.errors import DataError, did_you_mean
from rl_sparsity_tf.layers.claims import ClaimError, check_archive

_REQUIRED = ("x_train", "y_train", "x_validation", "y_validation")
_OPTIONAL = ("x_test", "y_test")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the splits of a file written by `numpy.savez`, and checks that they fit together.

    Args:
        path: The .npz file.

    Returns:
        `x_train`, `y_train`, `x_validation`, `y_validation` and, if the file has them, `x_test`
        and `y_test`; floats as float32, integers as they are.

    Raises:
        DataError: If the file is missing or damaged, or its arrays cannot be used.

    Example:
        >>> np.savez("data.npz", x_train=x, y_train=y, x_validation=xv, y_validation=yv)
        >>> sorted(read_npz(Path("data.npz")))
        ['x_train', 'x_validation', 'y_train', 'y_validation']
    """
    arrays = _read_arrays(path)
    for found, expected in _faults(arrays):
        raise _bad_file(path, found, expected)
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            arrays[name] = array.astype(np.float32, copy=False)
    return arrays


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    wanted = "a complete file written by numpy.savez(path, x_train=..., y_train=..., ...)"
    if not path.is_file():
        raise _bad_file(path, "is a folder" if path.is_dir() else "does not exist", wanted)
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            truncated = file.read(4) == b"PK\x03\x04"
        found = "is truncated: its end is missing" if truncated else "is not a .npz file"
        raise _bad_file(path, found, wanted)
    arrays = {}
    name = ""
    try:
        with zipfile.ZipFile(path) as members:
            check_archive(members)
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                arrays[name] = archive[name]
    except ClaimError as error:
        wanted += " (not savez_compressed, where nearly all values are equal)"
        raise _bad_file(path, f"was not read: {error}", wanted) from error
    except Exception as error:  # zlib, zipfile and numpy each have their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        found = f"is damaged at {name!r} ({reason})"
        if "allow_pickle" in str(error):
            found = f"holds Python objects in {name!r}, which are never unpickled"
            wanted = "numbers: rows of equal length, a numeric type"
        raise _bad_file(path, found, wanted) from error
    return arrays


def _bad_file(path: Path, found: str, expected: str) -> DataError:
    stop = "" if expected.endswith((".", "?")) else "."
    return DataError(f"The data file {str(path)!r} {found}. Expected {expected}{stop}")


def _faults(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """What is wrong with a file's arrays, each fault with what was expected instead."""
    known = _REQUIRED + _OPTIONAL
    for name in set(arrays).difference(known):
        yield f"holds an array {name!r}", did_you_mean(name, known).removeprefix("Expected ")
    wanted = known if set(_OPTIONAL) & set(arrays) else _REQUIRED
    missing = [name for name in wanted if name not in arrays]
    if missing:
        yield f"holds {sorted(arrays)}; missing: {missing}", str(list(wanted))
    for name in wanted:  # every x before its y, the training rows first
        # A member that is no array comes out of the archive as bytes.
        array, kind = arrays[name], getattr(arrays[name], "dtype", np.dtype("O"))
        if kind.kind not in "fiub":
            yield f"holds {name!r} of type {kind}", "numbers: floats or integers"
        axes = 2 if name.startswith("x_") else 1
        if array.ndim < axes or array.size == 0:
            expected = f"at least one row and {axes} axes, the first of which numbers the rows"
            yield f"holds {name!r} of shape {array.shape}", expected
        inputs, first = f"x{name[1:]}", f"{name[0]}_train"
        if len(array) != len(arrays[inputs]):
            found = f"has {len(arrays[inputs])} rows in {inputs!r} and {len(array)} in {name!r}"
            yield found, "one target per row"
        if array.shape[1:] != arrays[first].shape[1:]:
            shapes = f"{array.shape[1:]} in {name!r}, but {arrays[first].shape[1:]} in {first!r}"
            yield f"has rows of shape {shapes}", "the same shape in every split"
        # float32 is what is handed out, so a larger float64 is an infinity too.
        if kind.kind == "f" and (bad := np.sum(~(np.abs(array) <= np.finfo("f4").max))):
            yield f"holds {bad} NaN or infinite values in {name!r}", "finite numbers"
