"""Labelled data for a search: scikit-learn's digits, TFDS image sets, the user's .npz file.

Example:
    >>> data = rls.datasets.load_dataset("digits")
    >>> data.x_train.shape, data.x_validation.shape, data.x_test.shape
    ((1079, 8, 8, 1), (359, 8, 8, 1), (359, 8, 8, 1))
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rl_sparsity_tf.claims import ArrayFileError, load_arrays
from rl_sparsity_tf.errors import ArgumentError, DataError, did_you_mean, one_line
from rl_sparsity_tf.files import as_file

_REQUIRED = ("x_train", "y_train", "x_validation", "y_validation")
_OPTIONAL = ("x_test", "y_test")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the splits of a file written by `numpy.savez`, and checks that they fit together.

    Returns `x_train`, `y_train`, `x_validation`, `y_validation` and, if the file has them, `x_test`
    and `y_test`; floats as float32, integers as they are. Raises `DataError` if the file is missing
    or damaged, or its arrays cannot be used.

    Example:
        >>> np.savez("data.npz", x_train=x, y_train=y, x_validation=x_val, y_validation=y_val)
        >>> sorted(rls.datasets.read_npz(Path("data.npz")))
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
    try:
        return load_arrays(path)
    except ArrayFileError as error:
        if error.reason == "claims":
            wanted += " (not savez_compressed, where nearly all values are equal)"
        if error.reason == "objects":
            wanted = "numbers: rows of equal length, a numeric type"
        raise _bad_file(path, str(error), wanted) from error


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


_log = logging.getLogger(__name__)

# One as uint8, four as float32, and the copy made when rows are held out (5.8 were measured).
_BYTES_PER_PIXEL = 6
_READ_BATCH = 512
_SPLITS = ("train", "validation", "test")
_Part = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Training, validation and (perhaps) test rows.

    Attributes:
        name: Where the rows come from, e.g. `"digits"`, a TFDS name or a file name.
        x_train, x_validation: Inputs, shape `(rows, *input_shape)`.
        y_train, y_validation: Their targets, shape (rows, ...).
        x_test, y_test: Rows nobody looks at before the end, or None.
        input_shape: Shape of one row of x.
        num_classes: Number of classes if the targets are class indices, else None.

    Example:
        >>> data = rls.datasets.Data(
        ...     name="mine",
        ...     x_train=x,
        ...     y_train=y,
        ...     x_validation=x_val,
        ...     y_validation=y_val,
        ...     input_shape=x.shape[1:],
        ...     num_classes=10,
        ... )
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    input_shape: tuple[int, ...]
    num_classes: int | None


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    seed: int = 0,
    memory_limit_mb: float = 2048,
    validation_share: float = 0.1,
    limit: int | None = None,
) -> Data:
    """Loads `"digits"`, a .npz file or an image classification set of TFDS.

    Args:
        name_or_path: `"digits"`, a path that ends in .npz, or a name TFDS knows.
        seed: Decides which rows are held out (digits and TFDS).
        memory_limit_mb: TFDS only; see [load_tfds][].
        validation_share: TFDS only.
        limit: TFDS only.

    Raises:
        DataError: If the data cannot be found, read or used.

    Example:
        >>> rls.datasets.load_dataset("digits").input_shape
        (8, 8, 1)
    """
    name = os.fspath(name_or_path)
    if name == "digits":
        return load_digits_data(seed)
    if name.lower().endswith(".npz") or Path(name).is_file():
        return load_npz(name)
    options = {"memory_limit_mb": memory_limit_mb, "validation_share": validation_share}
    return load_tfds(name, seed=seed, limit=limit, **options)


def load_digits_data(seed: int = 0) -> Data:
    """Loads scikit-learn's 1,797 handwritten digits, which need no download.

    Args:
        seed: Decides which rows are held out.

    Returns:
        Images of shape (8, 8, 1), float32 in [0, 1]; 60 % to train on, 20 % for validation, 20 %
        for the test, every class in the same proportion.

    Example:
        >>> data = rls.datasets.load_digits_data()
        >>> data.x_train.shape, data.num_classes
        ((1079, 8, 8, 1), 10)
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images / 16).astype(np.float32)[..., np.newaxis]
    y = digits.target.astype(np.int64)
    rest, test = stratified_split(y, 0.2, seed)
    train, validation = stratified_split(y[rest], 0.25, seed)
    arrays = {}
    for split, part in zip(_SPLITS, (rest[train], rest[validation], test), strict=True):
        arrays[f"x_{split}"], arrays[f"y_{split}"] = x[part], y[part]
    return Data(name="digits", input_shape=x.shape[1:], num_classes=10, **arrays)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows in two so that every class is divided in the same proportion.

    `labels` holds one class index per row. The second part has `int(rows * share)` rows, and of
    every class at most one row more or less than its share; `seed` decides which. Returns the row
    numbers of both parts, ascending. Raises `ArgumentError` if the share is not between 0 and 1,
    and `DataError` if one of the parts would be empty.

    Example:
        >>> rest, held_out = rls.datasets.stratified_split(np.array([0, 0, 1, 1]), 0.5, seed=0)
        >>> len(rest), len(held_out)
        (2, 2)
    """
    _check_argument("share", share, 0 < share < 1, "a number between 0 and 1, such as 0.1")
    rows = len(labels)
    order = np.random.default_rng(seed).permutation(rows)
    order = order[np.argsort(labels[order], kind="stable")]
    # With the classes side by side, taking rows at regular distances takes the same share of
    # each. The small addend keeps a product such as 10 * 0.3 from being rounded below 3.
    taken = np.floor(np.arange(rows + 1) * share + 1e-9)
    chosen = np.diff(taken) > 0
    if not chosen.any() or chosen.all():
        raise DataError(
            f"{rows} rows cannot be split at a share of {share}: one part would be empty. Give "
            "more rows, or another share."
        )
    return np.sort(order[~chosen]), np.sort(order[chosen])


def load_npz(path: str | os.PathLike[str]) -> Data:
    """Loads arrays written by `numpy.savez` or `numpy.savez_compressed`.

    The file holds `x_train`, `y_train`, `x_validation`, `y_validation` and, if there is a test
    split, `x_test` and `y_test`. Floats are returned as float32, integers as they are: scale the
    inputs as the model expects them before saving.

    Args:
        path: The .npz file.

    Raises:
        DataError: If the file is missing or damaged, or its arrays cannot be used.

    Example:
        >>> np.savez("data.npz", x_train=x, y_train=y, x_validation=x_val, y_validation=y_val)
        >>> data = rls.datasets.load_npz("data.npz")
    """
    path = as_file("path", path, "a file written by numpy.savez")
    arrays = read_npz(path)
    shape, classes = arrays["x_train"].shape[1:], _count_classes(arrays)
    return Data(name=path.name, input_shape=shape, num_classes=classes, **arrays)


def load_tfds(
    name: str,
    *,
    seed: int = 0,
    memory_limit_mb: float = 2048,
    validation_share: float = 0.1,
    limit: int | None = None,
) -> Data:
    """Loads an image classification set by its TFDS name, downloading it if needed.

    The set must have images of one fixed shape and one integer label each. `TFDS_DATA_DIR` names
    the folder that prepared sets are kept in. The set's own validation split is used if it has
    one; a missing validation or test split is split off the training rows, class by class.

    Args:
        name: A name TFDS knows, e.g. `"fashion_mnist"` or `"mnist_corrupted/fog"`.
        seed: Decides which rows are held out.
        memory_limit_mb: Largest set to load, in MiB of memory while loading.
        validation_share: Share of the training rows for each split that is missing.
        limit: Read at most this many rows of every split TFDS has.

    Returns:
        Images as float32 in [0, 1], labels as int64.

    Raises:
        ArgumentError: If an argument has an impossible value.
        DataError: If the set is unknown, unsuitable, too large or cannot be downloaded.

    Example:
        >>> rls.datasets.load_tfds("fashion_mnist").x_train.shape  # doctest: +SKIP
        (54000, 28, 28, 1)
    """
    _check_argument("memory_limit_mb", memory_limit_mb, memory_limit_mb > 0, "a positive number")
    share_fits = 0 < validation_share < 0.5
    _check_argument("validation_share", validation_share, share_fits, "a number in (0, 0.5)")
    limit_fits = limit is None or (isinstance(limit, int) and limit > 0)
    _check_argument("limit", limit, limit_fits, "a positive number of rows, or None")
    builder = _tfds_builder(name)
    image_key, label_key = _image_and_label(name, builder.info)
    # The number of rows is often known before the download: better to refuse early.
    _check_memory(name, builder.info, image_key, limit, memory_limit_mb)
    try:
        builder.download_and_prepare()
        found = [split for split in _SPLITS if split in builder.info.splits]
        if "train" not in found:
            raise _unsuitable(name, f"has the splits {found}", "a split called 'train'")
        _check_memory(name, builder.info, image_key, limit, memory_limit_mb)
        parts = {split: _read_split(builder, split, image_key, label_key, limit) for split in found}
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"The TFDS data set {name!r} could not be prepared or read in "
            f"{str(builder.data_dir)!r} ({one_line(error, 300)}). Expected a network connection, "
            "or a complete prepared copy: set TFDS_DATA_DIR to the folder that holds one."
        ) from error
    lowest = min(int(y.min(initial=0)) for _, y in parts.values())
    if lowest < 0:
        raise _unsuitable(name, f"has labels down to {lowest}", "class indices from 0")
    for offset, split in enumerate(("test", "validation")):
        if split not in parts:
            _hold_out(name, parts, split, validation_share, seed + offset)
    classes = getattr(builder.info.features[label_key], "num_classes", None)
    arrays = {f"y_{split}": y for split, (_, y) in parts.items()}
    for split in _SPLITS:
        # Popped, so that one split's bytes are freed before the next is converted.
        arrays[f"x_{split}"] = np.divide(parts.pop(split)[0], np.float32(255), dtype=np.float32)
    shape, classes = arrays["x_train"].shape[1:], classes or _count_classes(arrays)
    return Data(name=name, input_shape=shape, num_classes=classes, **arrays)


def _tfds_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    # TFDS reads the variable once, when it is imported; reading it here honours later changes.
    data_dir = os.environ.get("TFDS_DATA_DIR") or None
    try:
        # What comes before a namespace's colon may be code from the network.
        if not re.fullmatch(r"[\w./=,+-]+(:[\d.*]+)?", name):
            raise ValueError("a namespace or a strange character")
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Its names: tfds.list_builders()."
        raise DataError(
            f"{name!r} is neither 'digits', nor a .npz file, nor one of the {len(known)} data sets "
            f"that TFDS knows. {hint}"
        ) from error
    except Exception as error:
        raise DataError(
            f"TFDS cannot use the name {name!r} ({one_line(error, 300)}). Expected 'name', "
            "'name/config' or 'name/config:version'."
        ) from error


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    """Finds the one image and the one label of a row, or says why there is none."""
    import tensorflow_datasets as tfds

    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    labels = [key for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)]
    keys = info.supervised_keys
    if keys and len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys):
        images, labels = [key for key in images if key == keys[0]], [keys[1]]
    if len(images) != 1:
        found = f"has {len(images)} input images among its features {sorted(features)}"
        raise _unsuitable(name, found, "exactly one image")
    if len(labels) != 1:
        raise _unsuitable(name, f"has {len(labels)} class labels {labels}", "exactly one label")
    image, label = features[images[0]], features[labels[0]]
    if image.shape is None or None in tuple(image.shape):
        found = f"has images of the shape {image.shape}, where None varies from image to image"
        raise _unsuitable(name, found, "one fixed shape (resize them first)")
    if np.dtype(image.np_dtype) != np.uint8:
        raise _unsuitable(name, f"has images of type {np.dtype(image.np_dtype)}", "uint8")
    # Text and nested features have a shape of () as well; only a tensor has a plain number.
    kind = np.dtype(label.np_dtype).kind if isinstance(label, tfds.features.Tensor) else "?"
    if label.shape != () or kind not in "iu":
        raise _unsuitable(name, f"has the target {labels[0]!r}: {label!r}", "one integer label")
    return images[0], labels[0]


def _unsuitable(name: str, found: str, expected: str) -> DataError:
    return DataError(
        f"The TFDS data set {name!r} {found}. Expected {expected}. Choose another set, or save the "
        "arrays you need to a .npz file."
    )


def _check_memory(
    name: str, info: Any, image_key: str, limit: int | None, memory_limit_mb: float
) -> None:
    shape = tuple(info.features[image_key].shape)
    sizes = [info.splits[split].num_examples for split in _SPLITS if split in info.splits]
    rows = sum(size if limit is None else min(size, limit) for size in sizes)
    needed = rows * math.prod(shape) * _BYTES_PER_PIXEL / 2**20
    if needed > memory_limit_mb:
        raise DataError(
            f"The TFDS data set {name!r} needs about {needed:,.3g} MiB of memory ({rows:,} images "
            f"of shape {shape}); the limit is {memory_limit_mb:,g} MiB. Raise it with "
            f"memory_limit_mb={math.ceil(needed)}, or read fewer rows with limit=."
        )


def _read_split(
    builder: Any, split: str, image_key: str, label_key: str, limit: int | None
) -> _Part:
    """Reads one split in its stored order, image as uint8."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    rows = builder.info.splits[split].num_examples
    rows = rows if limit is None else min(rows, limit)
    x = np.empty((rows, *features[image_key].shape), np.uint8)
    y = np.empty((rows,), np.int64)
    dataset = builder.as_dataset(
        split=f"{split}[:{rows}]",
        shuffle_files=False,
        batch_size=_READ_BATCH,
        decoders=tfds.decode.PartialDecoding({image_key: True, label_key: True}),
    )
    start = 0
    for batch in tfds.as_numpy(dataset):
        stop = start + len(batch[label_key])
        x[start:stop], y[start:stop] = batch[image_key], batch[label_key]
        start = stop
    return x[:start], y[:start]


def _hold_out(name: str, parts: dict[str, _Part], split: str, share: float, seed: int) -> None:
    """Moves a share of the training rows into the split that the set lacks."""
    x, y = parts["train"]
    rest, taken = stratified_split(y, share, seed)
    parts["train"], parts[split] = (x[rest], y[rest]), (x[taken], y[taken])
    # A validation split is missing nearly always; a missing test split is news.
    level = logging.WARNING if split == "test" else logging.INFO
    message = "%s has no %s split: %d of %d training rows are held out for it."
    _log.log(level, message, name, split, len(taken), len(y))


def _count_classes(arrays: Mapping[str, np.ndarray]) -> int | None:
    targets = [array for name, array in arrays.items() if name.startswith("y_")]
    if any(y.dtype.kind not in "iu" or y.size != len(y) or y.min() < 0 for y in targets):
        return None
    return max(int(y.max()) for y in targets) + 1


def _check_argument(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected {expected}.")
