"""The files that a latency table is measured with: layers and narrowed models, many at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.channels.channel_masks import mask_channels
from rl_sparsity_tf.channels.groups import find_groups
from rl_sparsity_tf.channels.shrinking import shrink
from rl_sparsity_tf.channels.widths import Chain, Width
from rl_sparsity_tf.data.calibration import random_rows
from rl_sparsity_tf.export.export import convert_traced
from rl_sparsity_tf.export.export_precision import in_float32
from rl_sparsity_tf.export.recurrent import stateless
from rl_sparsity_tf.export.stored_weights import store_weights
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.signature import input_specs
from rl_sparsity_tf.tflite.editing import split_file

# Models converted at a time.
_BATCH = 100
_ROWS = 2
# Shares of the channels of the whole models that are timed beside the layers.
_SHARES = (1.0, 0.8, 0.6, 0.4, 0.25)

# Prefix of names -> inputs and outputs.
Builder = Callable[[str], tuple[list[Any], list[Any]]]


def piece(chain: Chain, width: Width) -> Builder:
    """Builds a chain with other channels."""
    outputs = width.outputs
    if chain.tied:
        outputs = math.ceil(chain.width.outputs * width.inputs / chain.width.inputs)
    return lambda prefix: chain.build(Width(width.inputs, outputs), prefix)


def whole(model: keras.Model) -> Builder:
    """Builds a model, whose weights will be others."""

    def build(prefix: str) -> tuple[list[Any], list[Any]]:
        flat = keras.Model(list(model.inputs), list(model.outputs), name=prefix)
        inputs = [keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in model.inputs]
        return inputs, tf.nest.flatten(flat(inputs))

    return build


def nearly_nothing(prefix: str) -> tuple[list[Any], list[Any]]:
    """What a call costs whatever it does."""
    x = keras.Input((1,))
    return [x], [keras.layers.ReLU(name=prefix)(x)]


def narrowed(model: keras.Model) -> list[keras.Model]:
    """The model, and versions with a share of all channels that can be removed."""
    groups = [group for group in find_groups(model) if not group.frozen]
    models = []
    for share in _SHARES if groups else _SHARES[:1]:
        live = {g.index: np.arange(g.size) < math.ceil(share * g.size) for g in groups}
        models.append(shrink(mask_channels(model, live)))
    return models


@contextlib.contextmanager
def converted(
    builders: Sequence[Builder], batch_size: int | None, quantization: str
) -> Iterator[list[Path | None]]:
    """Files of the models that the builders build, in a folder that goes in the end."""
    files: list[Path | None] = []
    with scratch_folder() as folder:
        for start in range(0, len(builders), _BATCH):
            part = folder / str(start)
            part.mkdir()
            some = builders[start : start + _BATCH]
            built = [build(f"piece_{number}") for number, build in enumerate(some)]
            ends = [
                [tensor for some in side for tensor in some] for side in zip(*built, strict=True)
            ]
            together = keras.Model(*ends, name="pieces")
            _set_weights(together)
            file = _convert(together, part, batch_size, quantization)
            files += split_file(file, [len(inputs) for inputs, _ in built])
        yield files


def _set_weights(model: keras.Model) -> None:
    """Gives a model random weights: none that the converter could leave out, and alive.

    What an int8 file computes must have a range, or LiteRT aborts; narrowed models may have none.
    """
    rng = np.random.default_rng(0)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if not weight.dtype.is_floating or not shape:
            continue
        if "variance" in weight.name or "gamma" in weight.name:
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            value = rng.uniform(-0.1, 0.1, shape)
        else:
            fan_in = math.prod(shape[:-2] if "depthwise" in weight.name else shape[:-1])
            value = rng.normal(0.0, math.sqrt(2 / fan_in), shape)
        weight.assign(value)


def _convert(model: keras.Model, folder: Path, batch_size: int | None, quantization: str) -> Path:
    with in_float32(model) as (traced, _), stateless(traced):
        rows = None
        if quantization == "int8":
            rows = random_rows(traced, input_specs(traced), (batch_size or 1) * _ROWS)
        file = convert_traced(traced, folder, batch_size, quantization, rows)
        if quantization != "plan":
            return file
        kernels = {kernel.path: kernel.value() for kernel in find_kernels(traced)}
    return store_weights(file, kernels, dict.fromkeys(kernels, 8)).file
