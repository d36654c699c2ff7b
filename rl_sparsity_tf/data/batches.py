"""Training and validation data in the forms that `fit` takes, checked and cut into batches."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.data.checks import Batch, BatchCheck, row_count
from rl_sparsity_tf.data.extremes import LargeRows
from rl_sparsity_tf.data.forms import as_rows, check_elements, read_batches
from rl_sparsity_tf.errors import DataError
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.structure import fixed_batch

# A dataset that does not know its size and goes on for longer than this is taken for endless.
ENDLESS_BATCHES = 10_000
_ENDLESS_BYTES = 2**33


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training data, once as the user gave it and once as a pool of cached batches.

    Attributes:
        pool: Equally shaped batches kept in memory, for statistics and short recoveries.
        steps: Batches in an epoch.
        large: Rows with numbers so large that training on them has to be tried.
    """

    make_dataset: Callable[[], tf.data.Dataset]
    pool: list[Batch]
    steps: int | None
    large: LargeRows | None = None

    @property
    def dataset(self) -> tf.data.Dataset:
        """Batches for training epochs, reshuffled in every one where the data allows it.

        Arrays are shuffled anew: a training does not depend on how often the data was gone over
        before. A dataset of the user's is the user's.
        """
        return self.make_dataset()

    def batch(self, index: int) -> Batch:
        """The pool's batch of a running number, around and around."""
        return self.pool[index % len(self.pool)]


@takes_keras_3
def training_data(
    data: Any,
    model: keras.Model,
    *,
    batch_size: int = 128,
    pool_size: int = 64,
    seed: int = 0,
    class_weight: list[float] | None = None,
) -> TrainingData:
    """Prepares training data: arrays, a dataset or a `keras.utils.Sequence`, as `fit` takes them.

    All rows are checked against the model and its compiled loss; of endless datasets, those in the
    pool. A finite dataset is read once for that. A dataset that does not know its size and has not
    ended after 10,000 batches counts as endless.

    Where the model fixes the rows per call, batches have that many and the remainder is left out;
    else they have `batch_size` rows unless `data` is batched already. The pool has `pool_size`
    batches at most. `class_weight` holds weights by class, which sample weights are multiplied
    with.

    Raises `DataError` if the data cannot be used, `ArgumentError` if the class weights do not fit
    the model, and `ModelError` if the model was never built.
    """
    check = BatchCheck(model, "train", class_weight)
    fixed = fixed_batch(model)
    arrays, batch_size = as_rows(data, "train", batch_size)
    if isinstance(arrays, tf.data.Dataset):
        return _training_dataset(arrays, check, pool_size, fixed)
    rows = row_count(arrays, "train")
    check(arrays)
    check.finish()
    if fixed is not None and rows < fixed:
        raise DataError(
            f"train has {rows} rows; the model takes exactly {fixed} per call. Expected at least "
            f"that many, or a model built with an open batch size."
        )
    arrays = _numpy(check.weighted(*arrays))
    size = fixed or min(batch_size, rows)
    order = np.random.default_rng(seed).permutation(rows)
    count = min(pool_size, rows // size)
    pool = [_tensors(_slice(arrays, order[i * size : (i + 1) * size])) for i in range(count)]
    x, y, weights = arrays
    columns = (x, y) if weights is None else (x, y, weights)
    slices = tf.data.Dataset.from_tensor_slices(columns)

    def make_dataset() -> tf.data.Dataset:
        # Every shuffle counts its epochs; a new one begins with the first.
        shuffled = slices.shuffle(min(rows, 100_000), seed=seed)
        return shuffled.batch(size, drop_remainder=fixed is not None)

    steps = rows // size if fixed else -(-rows // size)
    return TrainingData(make_dataset=make_dataset, pool=pool, steps=steps, large=check.large)


def _training_dataset(
    data: tf.data.Dataset, check: BatchCheck, pool_size: int, fixed: int | None
) -> TrainingData:
    check_elements(data, "train")
    size = int(data.cardinality())
    endless, unknown = (
        size == constant for constant in (tf.data.INFINITE_CARDINALITY, tf.data.UNKNOWN_CARDINALITY)
    )
    expected = "at least one batch"
    if fixed is not None and tf.nest.flatten(data.element_spec)[0].shape[:1] != [fixed]:
        check.shapes(next(read_batches(data, "train", expected)))
        data = data.unbatch().batch(fixed, drop_remainder=True)
        expected = f"at least {fixed} rows, which the model takes per call"
        unknown = not endless
    limit = pool_size if endless else ENDLESS_BATCHES if unknown else None
    pool: list[Batch] = []
    steps = 0
    for steps, batch in enumerate(read_batches(data, "train", expected), 1):
        check(batch)
        if len(pool) < pool_size:
            pool.append(batch)
        if steps == limit:
            endless = True
            break
    check.finish()
    if unknown and not endless and next(iter(data), None) is None:
        raise DataError(
            "train can be read only once: the second time it is empty. Expected a dataset that "
            "begins anew, as from_generator does with a function that makes a new generator at "
            "every call."
        )
    if check.class_weights is not None:
        data = data.map(_Weighting(check, pool[0]))
        pool = [check.weighted(*batch) for batch in pool]
    # An endless dataset has no epoch; one pass over the pool stands for it. Repeating gives a
    # dataset of unknown size the one that was counted, even if its epochs differ in length.
    shapes = [str(_shapes(batch)) for batch in pool]
    ((common, _),) = collections.Counter(shapes).most_common(1)
    pool = [batch for batch, shape in zip(pool, shapes, strict=True) if shape == common]
    if endless:
        steps = len(pool)
    if endless or unknown:
        data = data.repeat().take(steps)
    return TrainingData(make_dataset=lambda: data, pool=pool, steps=steps, large=check.large)


class _Weighting:
    def __init__(self, check: BatchCheck, example: Batch):
        self._check, self._example = check, example

    def __call__(self, *columns: Any) -> Any:
        # Datasets from generators may not know how many axes they have.
        like = self._example if len(columns) == 3 else self._example[:2]
        return self._check.weighted(*tf.nest.map_structure(_with_rank, columns, tuple(like)))


def _with_rank(part: tf.Tensor, like: Any) -> tf.Tensor:
    return part if like is None else tf.ensure_shape(part, [None] * like.shape.rank)


@takes_keras_3
def evaluation_data(
    data: Any, model: keras.Model, name: str, *, batch_size: int = 1024
) -> list[Batch]:
    """Prepares validation or test data: all of it, checked, as cached batches.

    It is given as arrays, a finite dataset or a `keras.utils.Sequence`, as `evaluate` takes them;
    errors call it by `name`. Where the model fixes the rows per call, batches have that many; else
    they have `batch_size` rows unless `data` is batched already. Raises `DataError` if the data
    cannot be used, and `ModelError` if the model was never built.
    """
    check = BatchCheck(model, name)
    fixed = fixed_batch(model)
    arrays, _ = as_rows(data, name, batch_size)
    if isinstance(arrays, tf.data.Dataset):
        check_elements(arrays, name)
        batches = _all_batches(arrays, check, name)
        _check_row_shapes(batches, name)
        if fixed is None or all(row_count(batch, name) == fixed for batch in batches):
            return batches
        arrays = _joined(batches)
    else:
        row_count(arrays, name)
        check(arrays)
        check.finish()
    rows, size = check.rows, fixed or batch_size
    if fixed is not None and rows % fixed:
        raise DataError(
            f"{name} has {rows} rows; the model takes exactly {fixed} per call. Expected a "
            f"multiple of {fixed}: leave out {rows % fixed} rows, or build the model with an open "
            "batch size."
        )
    return [_tensors(_slice(arrays, slice(at, at + size))) for at in range(0, rows, size)]


def _all_batches(data: tf.data.Dataset, check: BatchCheck, name: str) -> list[Batch]:
    size = int(data.cardinality())
    if size == tf.data.INFINITE_CARDINALITY:
        raise DataError(
            f"{name} is an infinite dataset. Expected a finite one: end it with .take(batches)."
        )
    batches: list[Batch] = []
    held = 0
    for batch in read_batches(data, name, "at least one batch"):
        check(batch)
        batches.append(batch)
        parts = [part for part in tf.nest.flatten(batch) if part is not None]
        held += sum(part.shape.num_elements() * part.dtype.size for part in parts)
        long = len(batches) >= ENDLESS_BATCHES or held > _ENDLESS_BYTES
        if size == tf.data.UNKNOWN_CARDINALITY and long:
            raise DataError(
                f"{name} is a dataset of unknown size that has not ended after {len(batches)} "
                "batches. Expected a finite one: end it with .take(batches), or give its size "
                "with .apply(tf.data.experimental.assert_cardinality(batches))."
            )
    check.finish()
    return batches


def sample_rows(
    batches: list[Batch],
    rows: int,
    *,
    seed: int = 0,
    batch_size: int = 1024,
    fixed: int | None = None,
) -> list[Batch]:
    """Draws rows from cached batches, without replacement; they stay in their old order.

    If there are no more than `rows`, the batches are returned as they are. `fixed` is the number of
    rows that every new batch must have, if the model fixes it, in place of `batch_size`.
    """
    if fixed is not None:
        rows, batch_size = max(fixed, rows - rows % fixed), fixed
    total = count_rows(batches)
    if total <= rows:
        return batches
    chosen = np.sort(np.random.default_rng(seed).choice(total, rows, replace=False))
    joined = _joined(batches)
    return [
        _tensors(_slice(joined, chosen[start : start + batch_size]))
        for start in range(0, rows, batch_size)
    ]


def count_rows(batches: list[Batch]) -> int:
    """Rows of all batches together."""
    return sum(len(tf.nest.flatten(batch[0])[0]) for batch in batches)


def inputs_of(batches: list[Batch]) -> Any:
    """The inputs of all batches in one array, or in one structure of arrays."""
    xs = [batch[0] for batch in batches]
    return tf.nest.map_structure(lambda *parts: np.concatenate([p.numpy() for p in parts]), *xs)


def _slice(arrays: Batch, rows: Any) -> Batch:
    x, y, weights = tf.nest.map_structure(
        lambda array: None if array is None else array[rows], arrays
    )
    return x, y, weights


def _tensors(arrays: Batch) -> Batch:
    x, y, weights = tf.nest.map_structure(
        lambda array: None if array is None else tf.constant(array), arrays
    )
    return x, y, weights


def _shapes(batch: Batch) -> list[Any]:
    return [None if part is None else tuple(part.shape) for part in tf.nest.flatten(batch)]


def _numpy(arrays: Batch) -> Batch:
    x, y, weights = tf.nest.map_structure(
        lambda array: None if array is None else np.asarray(array), arrays
    )
    return x, y, weights


def _joined(batches: list[Batch]) -> Batch:
    joined: Batch = tf.nest.map_structure(
        lambda *parts: None if parts[0] is None else np.concatenate([p.numpy() for p in parts]),
        *batches,
    )
    return joined


def _check_row_shapes(batches: list[Batch], name: str) -> None:
    first = [shape and shape[1:] for shape in _shapes(batches[0])]
    for index, batch in enumerate(batches):
        shapes = [shape and shape[1:] for shape in _shapes(batch)]
        if shapes != first:
            raise DataError(
                f"{name} has rows of the shapes {first} in batch 0 and {shapes} in batch {index}. "
                "Expected all batches to have rows of one shape: pad them to one length, for "
                "example with padded_batch(size, padded_shapes=...)."
            )
