"""Whether a model computes the same whenever it is called on the same rows, as its file does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.export.saved_model import flat_call, reference_outputs
from rl_sparsity_tf.layers.copy_checks import as_it_was
from rl_sparsity_tf.layers.signature import flat_inputs, input_specs
from rl_sparsity_tf.layers.structure import all_layers
from rl_sparsity_tf.quiet import quiet_tensorflow
from rl_sparsity_tf.randomness import python_and_numpy_random_kept

_ROWS = 8
# Sums in another order move an output by some units in the last place, more in a sensitive network;
# noise is larger. Where the graph draws random numbers, less is needed to tell.
_LIMIT, _LIMIT_IF_DRAWN = 1e-3, 1e-6
_RANDOM = re.compile(r"Random|TruncatedNormal|Multinomial|Stateful(Standard|Uniform)|Rng|PyFunc")


def check_repeatable(model: keras.Model, x: Any, batch_size: int | None = None) -> None:
    """Raises if a model's outputs differ from call to call, although it is not training.

    Args:
        model: A built, plain model. Its weights and states are as they were in the end.
        x: Inputs as the model takes them, or a list of one array per input.
        batch_size: Rows per call, where the model or its file fixes them.

    Raises:
        ModelError: Naming the layer, if its operators can be told apart.
    """
    fixed = batch_size or next((spec.batch for spec in input_specs(model) if spec.batch), None)
    rows = [np.asarray(array)[: fixed or _ROWS] for array in flat_inputs(model, x)]
    with quiet_tensorflow(), python_and_numpy_random_kept():
        first, second = (_called(model, rows, fixed) for _ in range(2))
        differs = max(map(_difference, first, second), default=0.0)
        if differs <= _LIMIT_IF_DRAWN:
            return
        with as_it_was(model):
            layers = _random_layers(model, rows, fixed)
    if differs <= _LIMIT and not layers:
        return
    named = [f"{layer.name!r} ({type(layer).__name__})" for layer in layers]
    which = f"its layer {named[0]} draws random numbers" if named else "something in it is random"
    if len(named) > 1:
        which = f"its layers {', '.join(named)} draw random numbers"
    raise ModelError(
        f"Model {model.name!r} is random at inference: {which}, and two calls on the same rows "
        f"with training=False differ by {differs:.2g} of the output's size. Expected a model that "
        "repeats itself, since its file is compared with it: build it without that (Dropout and "
        "noise without training=True) and copy the weights with set_weights."
    )


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference by the largest value."""
    same = np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    if same or not first.size:
        return 0.0
    one, other = (np.nan_to_num(array.astype(np.float64)) for array in (first, second))
    return float(np.abs(one - other).max() / (np.abs(one).max() or 1.0))


def _called(
    model: keras.Model, rows: Sequence[np.ndarray], batch_size: int | None
) -> list[np.ndarray]:
    with as_it_was(model):  # states and counts begin alike at both calls
        return reference_outputs(model, rows, batch_size)


def _random_layers(
    model: keras.Model, rows: Sequence[np.ndarray], batch_size: int | None
) -> list[keras.layers.Layer]:
    """The layers in whose scopes the model's graph draws random numbers."""
    flat = flat_call(model)
    specs = [tf.TensorSpec([batch_size, *array.shape[1:]], array.dtype) for array in rows]
    function = tf.function(lambda *inputs: flat(inputs))
    graph = function.get_concrete_function(*specs).graph.as_graph_def()
    nodes = [*graph.node, *(node for one in graph.library.function for node in one.node_def)]
    drawn = [node.name for node in nodes if _RANDOM.search(node.op)]
    by_name = {layer.name: layer for layer in all_layers(model) if layer is not model}
    found = {}
    for scopes in (name.split("/") for name in drawn):
        inside = [by_name[scope] for scope in scopes if scope in by_name]
        if inside:
            found[id(inside[-1])] = inside[-1]
    return list(found.values())
