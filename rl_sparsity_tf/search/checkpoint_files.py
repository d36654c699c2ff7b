"""Files of arrays that a run keeps: read only if nothing in them is other than it was written."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rl_sparsity_tf.files import replacing, sha256_of

_CHECKSUM = "checksum"
_KINDS = "biufSU"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], seal: str | None) -> None:
    """Writes arrays to a .npz file, in one step.

    Args:
        path: The file.
        arrays: Numbers and text.
        seal: What goes into the checksum beside them; None for a file without one.
    """
    named: dict[str, Any] = dict(arrays)
    if seal is not None:
        named[_CHECKSUM] = np.array(_digest(arrays, seal))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **named)


def read_arrays(path: Path, seal: str | None) -> dict[str, np.ndarray]:
    """Reads what [write_arrays][] wrote.

    No more memory is taken than the file has bytes, whatever it claims.

    Args:
        path: The file.
        seal: What it was written with; None for a file without a checksum, whose weights have to
            be finite instead. What an agent has learned always has to.

    Raises:
        ValueError: If it is anything else.
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > size:
                raise ValueError("it claims to hold more bytes than it has")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if member.compress_type != zipfile.ZIP_STORED or name in arrays:
                    raise ValueError(f"{name!r} is compressed or there twice")
                arrays[name] = _array(name, archive.read(member))
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile and the parser of headers each have their own
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if seal is not None:
        found = arrays.pop(_CHECKSUM, None)
        if found is None or str(found) != _digest(arrays, seal):
            raise ValueError("it does not have the checksum that it says, or is of another run")
    _check_finite(arrays, weights=seal is None)
    return arrays


def _array(name: str, content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, dtype = readers[version](file)
    if dtype.kind not in _KINDS:
        raise ValueError(f"{name!r} is of type {dtype}, where numbers and text are expected")
    left = content[file.tell() :]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(left):
        raise ValueError(f"{name!r} has {len(left)} bytes for the shape {shape}")
    if not dtype.itemsize:  # empty text
        if shape:
            raise ValueError(f"{name!r} holds nothing in the shape {shape}")
        return np.zeros((), dtype)
    array: np.ndarray = np.frombuffer(bytearray(left), dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _digest(arrays: Mapping[str, np.ndarray], seal: str) -> str:
    chunks = [seal.encode()]
    for name in sorted(arrays):
        value = np.asarray(arrays[name])
        chunks.append(f"\n{name} {value.dtype.str} {value.shape}\n".encode())
        chunks.append(np.ascontiguousarray(value).tobytes())
    return sha256_of(*chunks)


def _check_finite(arrays: Mapping[str, np.ndarray], weights: bool) -> None:
    for name, value in arrays.items():
        # A search may have evaluated a network that diverged.
        learned = "variables/" in name
        checked = learned or (weights and name.startswith(("weights:", "held:weights:")))
        if checked and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"{name!r} holds {int((~np.isfinite(value)).sum())} NaN or infinite")
