"""What files claim to hold against what they are: archives and HDF5 files, before they are read.

A few bytes can claim gigabytes, and can name other files. Every limit here compares what a file
declares with its own size, so that large honest files pass and small dishonest ones do not.
"""

from __future__ import annotations

import math
import mmap
import re
import stat
import struct
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5o, h5t

from rl_sparsity_tf.errors import one_line

FREE_BYTES = 2**28
"""What any file may claim, however small it is."""

RATIO = 100
"""Above [FREE_BYTES][]: how many bytes a file may claim per byte that it has."""

# Of arrays of texts, whose honest size cannot be told: a list of all names in the file.
_FREE_TEXT_BYTES = 2**30
_NUMBERS = {h5t.INTEGER, h5t.FLOAT, h5t.COMPOUND, h5t.ENUM, h5t.STRING, h5t.OPAQUE, h5t.BITFIELD}
# Those that HDF5 itself brings: deflate, shuffle, Fletcher's checksum, szip, nbit, scale-offset;
# and h5py's lzf. Any other one would be looked for as a library to load.
_FILTERS = {1, 2, 3, 4, 5, 6, 32000}
_HEAP = b"GCOL"


DTYPE = re.compile(r"(bfloat|float|int|uint|complex)\d+|bool|str(ing)?|[SU|<>]{0,2}\d{0,3}")
"""Types that an array in a configuration may have: U1000000000 would make gigabytes of a letter."""


def dicts_of(config: object) -> Iterator[dict[str, Any]]:
    """All dicts of a configuration made of JSON values, each before those inside it, in order."""
    waiting: list[object] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(reversed(value))
        elif isinstance(value, dict):
            yield value
            waiting.extend(reversed(list(value.values())))


class ClaimError(ValueError):
    """A file claims what it does not hold, or leads to another file."""


class ArrayFileError(ValueError):
    """A .npz file cannot be read; the text goes on behind "The file ".

    The reason is `"damaged"` (or cut off, or another file), `"claims"` or `"objects"`.
    """

    def __init__(self, text: str, reason: str = "damaged"):
        super().__init__(text)
        self.reason = reason


def load_arrays(path: Path, *, largest: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file from elsewhere, which may have `largest` bytes together.

    Python objects are never unpickled: that runs code which the file brings.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            truncated = file.read(4) == b"PK\x03\x04"
        raise ArrayFileError(
            "is truncated: its end is missing" if truncated else "is not a .npz file"
        )
    arrays: dict[str, np.ndarray] = {}
    name = ""
    try:
        with zipfile.ZipFile(path) as members:
            check_archive(members, largest=largest)
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                arrays[name] = archive[name]
    except ClaimError as error:
        raise ArrayFileError(f"was not read: {error}", "claims") from error
    except Exception as error:  # zlib, zipfile and numpy each have their own
        if "allow_pickle" in str(error):
            text = f"holds Python objects in {name!r}, which are never unpickled"
            raise ArrayFileError(text, "objects") from error
        raise ArrayFileError(f"is damaged at {name!r} ({one_line(error, 300)})") from error
    return arrays


def check_claim(what: str, claimed: int, real: int) -> None:
    """Raises `ClaimError`, naming both, if something claims far more bytes than it has.

    `claimed` are the bytes it would take in memory or on the disk, `real` those it takes in the
    file.
    """
    allowed = max(FREE_BYTES, RATIO * real)
    if claimed > allowed:
        raise ClaimError(
            f"{what} claims {claimed:,} bytes and takes {real:,}; at most {allowed:,} are believed"
        )


def check_archive(archive: zipfile.ZipFile, *, largest: int | None = None) -> int:
    """Raises `ClaimError` unless a zip's members stay inside it and unpack to a credible size.

    All members together may have `largest` bytes, by default as many as [check_claim][] allows.
    Returns their bytes, unpacked.
    """
    seen: set[str] = set()
    for member in archive.infolist():
        name = member.filename
        windows = PureWindowsPath(name)
        # What zipfile itself makes of them when it unpacks depends on the system.
        outside = windows.is_absolute() or windows.drive or windows.root or "\\" in name
        if outside or ".." in PurePosixPath(name).parts or member.orig_filename != name:
            raise ClaimError(f"its member {member.orig_filename!r} leads out of the archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ClaimError(f"its member {name!r} is a symbolic link")
        if name in seen:
            raise ClaimError(f"it has two members {name!r}")
        if member.flag_bits & 1:
            raise ClaimError(f"its member {name!r} is encrypted")
        seen.add(name)
    claimed = sum(member.file_size for member in archive.infolist())
    assert archive.fp is not None
    # What members say of their packed size is a claim too, and they may share their bytes.
    real = archive.fp.seek(0, 2)
    if largest is not None and claimed > largest:
        raise ClaimError(f"it claims to hold {claimed:,} bytes; at most {largest:,} are believed")
    check_claim("its content", claimed, real)
    return claimed


def check_members(archive: zipfile.ZipFile, known: Collection[str], folder: str) -> None:
    """Raises `ClaimError` for the first member that is no known one and lies outside a folder."""
    for name in archive.namelist():
        if name not in known and not name.startswith(f"{folder}/"):
            raise ClaimError(f"it has the member {name!r}, which no model needs")


def check_hdf5(file: h5py.File, content: BinaryIO | Path, real: int) -> int:
    """Raises `ClaimError` unless an HDF5 file holds all of its data itself, in a credible size.

    All of it has to be in plain data sets. `content` is the same file's bytes or its path, `real`
    the number of those bytes. Returns the bytes of all data sets in memory.
    """
    claimed = stored = 0
    for path, item in _objects(file):
        _check_attributes(path, item, content, real)
        if isinstance(item, h5py.Dataset):
            size, storage = _check_data_set(path, item)
            claimed, stored = claimed + size, stored + storage
    if stored > real:
        raise ClaimError(f"its data sets take {stored:,} bytes of a file of {real:,}")
    check_claim("its data sets together", claimed, real)
    return claimed


def _objects(file: h5py.File) -> Iterator[tuple[str, Any]]:
    """Every object of a file once, with its path; links lead to none but those in the file."""
    waiting: list[tuple[str, Any]] = [("/", file["/"])]
    seen = {h5o.get_info(file["/"].id).addr}
    while waiting:
        path, item = waiting.pop()
        yield path, item
        if not isinstance(item, h5py.Group):
            continue
        for name in item:
            below = f"{path.rstrip('/')}/{name}"
            try:
                link = item.get(name, getlink=True)
            except TypeError as error:
                raise ClaimError(f"its {below!r} is a link of an unknown kind") from error
            if not isinstance(link, h5py.HardLink):
                target = getattr(link, "path", "")
                where = f" of the file {link.filename!r}" if hasattr(link, "filename") else ""
                raise ClaimError(f"its {below!r} is a link to {target!r}{where}")
            child = item[name]
            address = h5o.get_info(child.id).addr
            if address not in seen:
                seen.add(address)
                waiting.append((below, child))


def _check_data_set(path: str, data_set: h5py.Dataset) -> tuple[int, int]:
    """Bytes of one data set in memory and in the file."""
    properties = data_set.id.get_create_plist()
    if properties.get_external_count():
        raise ClaimError(f"its data set {path!r} lies in the file {_external(properties)!r}")
    if data_set.is_virtual:
        raise ClaimError(f"its data set {path!r} is virtual: it is put together from other ones")
    filters = {properties.get_filter(number)[0] for number in range(properties.get_nfilters())}
    if filters - _FILTERS:
        raise ClaimError(
            f"its data set {path!r} needs the unknown filter {min(filters - _FILTERS)}"
        )
    kind = data_set.id.get_type()
    _check_type(f"data set {path!r}", kind, texts=False)
    claimed = data_set.id.get_space().get_simple_extent_npoints() * kind.get_size()
    storage = data_set.id.get_storage_size()
    if data_set.chunks is None and claimed > storage:
        raise ClaimError(
            f"its data set {path!r} claims {claimed:,} bytes and takes {storage:,} in the file"
        )
    check_claim(f"its data set {path!r}", claimed, storage)
    return claimed, storage


def _external(properties: Any) -> str:
    return properties.get_external(0)[0].decode("utf-8", "replace")


def _check_attributes(path: str, item: Any, content: BinaryIO | Path, real: int) -> None:
    for name in item.attrs:
        attribute = item.attrs.get_id(name)
        kind = attribute.get_type()
        what = f"attribute {name!r} of {path!r}"
        _check_type(what, kind, texts=True)
        count = math.prod(attribute.shape or ())
        if not (kind.get_class() == h5t.STRING and kind.is_variable_str()):
            check_claim(f"its {what}", count * kind.get_size(), real)
        elif count > 1 and count * real > _FREE_TEXT_BYTES:
            # All its texts may be the same place in the file.
            claimed = count * _longest_text(content, real)
            if claimed > max(_FREE_TEXT_BYTES, RATIO * real):
                raise ClaimError(f"its {what} may claim {claimed:,} bytes of a file of {real:,}")


def _check_type(what: str, kind: Any, *, texts: bool) -> None:
    if kind.get_class() not in _NUMBERS:
        raise ClaimError(f"its {what} holds references or lists, no numbers")
    variable = kind.get_class() == h5t.STRING and kind.is_variable_str()
    inside = kind.detect_class(h5t.VLEN) or kind.detect_class(h5t.REFERENCE)
    if inside or (variable and not texts):
        raise ClaimError(f"its {what} holds references or lists, no numbers")


def _longest_text(content: BinaryIO | Path, real: int) -> int:
    """Bytes of the longest object in the heaps that texts of any length lie in."""
    if isinstance(content, Path):
        with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _longest_in(m, real)
    content.seek(0)
    return _longest_in(content.read(), real)


def _longest_in(data: Any, real: int) -> int:
    longest, start = 0, data.find(_HEAP)
    while start >= 0:
        # A heap's head takes 16 bytes, its size the last 8; an object's head as many.
        size = struct.unpack_from("<Q", data, start + 8)[0] if start + 16 <= real else 0
        place, end = start + 16, min(start + size, real)
        while place + 16 <= end:
            index, length = struct.unpack_from("<H6xQ", data, place)
            if index:  # 0 stands for what is free
                longest = max(longest, min(length, real))
            place += 16 + (length + 7) // 8 * 8
        start = data.find(_HEAP, start + 4)
    return longest
