"""What the kernels of a network cost in a file of a given kind, measured on its own weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation.budget import Budget
from rl_sparsity_tf.allocation.size_budget import KernelCosts, SizeBudget
from rl_sparsity_tf.allocation.storage import KernelStorage, Storage
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.export.size_model import SizeModel
from rl_sparsity_tf.layers.kernels import Kernel, count_weights
from rl_sparsity_tf.layers.rules import prune_by_magnitude

_DENSITIES = (0.0, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
# What the size model may be off by: the raw size within 1 %; the gzipped one changes with the
# weights while they are trained.
MARGINS = {"tflite_bytes": 0.01, "gzip_bytes": 0.03}
"""Room left for what the model of the size does not know, by kind of target."""


def formats_for(target: Target) -> str:
    """The formats that files for a target may use (see `export_tflite`)."""
    raw = target.kind in ("tflite_bytes", "max_accuracy_drop")
    return "raw" if raw else "gzip" if target.kind == "gzip_bytes" else "dense"


def size_model_for(model: keras.Model, target: Target) -> SizeModel:
    """The size model that a target in bytes needs."""
    return SizeModel(model, formats_for(target), compressed=target.gzip_bytes is not None)


def make_budget(
    model: keras.Model,
    kernels: list[Kernel],
    target: Target,
    storage: Storage,
    sizes: SizeModel | None = None,
) -> Budget:
    """The budget of a target: in weights for a sparsity, else in bytes; see [size_budget][].

    Raises:
        TargetError: If it cannot be reached, or is one for whole channels.
    """
    if target.needs_channels:
        raise TargetError(
            f"Target({target.kind}={target.value}) cannot be met by zeros among groups of "
            f"{storage.group!r}. Expected decisions on whole channels: pass group='channel'."
        )
    _, elements = count_weights(model)
    if target.sparsity is not None:
        weights = [storage.grouping(kernel).sizes for kernel in kernels]
        return Budget(target.sparsity, elements, weights)
    return size_budget(model, kernels, target, storage, elements, sizes)


def size_budget(
    model: keras.Model,
    kernels: Sequence[Kernel],
    target: Target,
    storage: Storage,
    elements: int,
    sizes: SizeModel | None = None,
) -> SizeBudget:
    """The budget of a target in bytes.

    Args:
        model: The dense model.
        kernels: The kernels that are decided, in order.
        target: The target; its kind says whether the raw or the gzipped size counts.
        storage: How the kernels are cut and stored.
        elements: All weights of rank >= 2.
        sizes: The model's size model for such targets; by default it is made.

    Raises:
        TargetError: If the size cannot be reached.
        ExportError: If the model cannot be converted.
    """
    kind = target.kind
    sizes = sizes or size_model_for(model, target)
    costs = [kernel_costs(sizes, kernel, storage.of(kernel.path), kind) for kernel in kernels]
    values = {kernel.path: kernel.value() for kernel in kernels}
    fixed = _bytes(sizes.file_size(values, {}), kind) - sum(
        _bytes(sizes.kernel_size(kernel.path, values[kernel.path]), kind) for kernel in kernels
    )
    return SizeBudget(
        target.value * (1.0 - MARGINS[kind]),
        fixed,
        costs,
        elements,
        [storage.grouping(kernel).sizes for kernel in kernels],
        f"Target({kind}={target.value:,.0f})".replace(",", "_"),
    )


def kernel_costs(
    sizes: SizeModel, kernel: Kernel, storage: KernelStorage, kind: str
) -> KernelCosts:
    """What a kernel costs at several densities, by its own weights.

    Args:
        sizes: The model of the size.
        kernel: The kernel.
        storage: How it is cut and stored.
        kind: Kind of the target: whether the raw or the gzipped size counts.
    """
    matrix, grouping = kernel.matrix(), kernel.grouping(storage.group)
    lives: list[int] = []
    floats: list[float] = []
    integers: list[float] = []
    for density in _DENSITIES:
        alive = grouping.expand_numpy(prune_by_magnitude(matrix, grouping, 1.0 - density))
        pruned = kernel.spec.from_matrix_numpy(np.where(alive, matrix, 0.0), kernel.shape)
        pruned = pruned.astype(np.float32)
        live = int(alive.sum())
        if lives and live <= lives[-1]:
            continue
        lives.append(live)
        compressed = kind == "gzip_bytes"
        size = sizes.kernel_size(kernel.path, pruned, compressed=compressed)
        floats.append(_bytes(size, kind))
        if kernel.spec.exports_int8:
            size = sizes.kernel_size(kernel.path, pruned, storage.bits, compressed=compressed)
            integers.append(_bytes(size, kind))
    return KernelCosts(
        np.array(lives, np.float64),
        np.maximum.accumulate(np.array(floats)),
        np.maximum.accumulate(np.array(integers)) if integers else None,
    )


def _bytes(size: object, kind: str) -> float:
    return float(getattr(size, "raw" if kind == "tflite_bytes" else "gzip"))
