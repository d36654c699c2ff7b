"""What operations in place of layers do to channels: `x + y`, `tf.nn.relu(x)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.channels.layer_rules import NotFollowedError, Shape, difference, equal, product
from rl_sparsity_tf.channels.steps import Elementwise, Join, Merge, Step

_MERGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "add": lambda values: values.sum(0),
    "subtract": difference,
    "multiply": product,
    "maximum": lambda values: values.max(0),
    "minimum": lambda values: values.min(0),
}
# Functions of every value by itself, also with a number beside it.
_ELEMENTWISE = frozenset(
    "relu relu6 leaky_relu elu selu gelu silu swish sigmoid tanh softplus softsign exp abs "
    "negative square truediv clip_by_value cast identity".split()
)
_REDUCTIONS = frozenset("reduce_mean reduce_max reduce_min".split())


def is_operation(layer: keras.layers.Layer) -> bool:
    """Whether a layer is one that Keras makes of an operation in a functional model."""
    return type(layer).__name__ == "TFOpLambda"


def operation_steps(node: Any, shapes: Sequence[Shape]) -> list[Step]:
    """Takes an operation's call apart.

    Args:
        node: Keras's node of the call.
        shapes: The shapes of the tensors of the model that it reads.

    Raises:
        NotFollowedError: With the reason, if its channels cannot be followed.
    """
    layer = node.layer
    name = str(layer.symbol).rpartition(".")[2]
    if any(len(shape) < 2 or shape[-1] is None for shape in shapes):
        raise NotFollowedError(f"{layer.name} reads a tensor without a fixed number of channels")
    if len(shapes) > 1 and name in _MERGES:
        return [Merge(layer, _MERGES[name])]
    if name == "concat":
        given = (*node.call_args[1:], node.call_kwargs.get("axis"))
        joins = given[0] in (-1, len(shapes[0]) - 1)
        return [Join(layer) if joins else Merge(layer, equal)]
    numbers = all(np.ndim(value) == 0 for value in _constants(node))
    if len(shapes) == 1 and numbers and (name in _MERGES or name in _ELEMENTWISE):
        return [Elementwise(layer, _with_constants(node))]
    if name in _REDUCTIONS and _leaves_channels(node, len(shapes[0])):
        return [Step(layer)]
    raise NotFollowedError(
        f"{layer.name} is a TensorFlow operation ({layer.symbol}) whose channels are not followed"
    )


def _constants(node: Any) -> list[Any]:
    """What the operation reads beside tensors of the model."""
    given = [*node.call_args, *node.call_kwargs.values()]
    kept = [value for value in given if value is not None and not _is_symbolic(value)]
    return [value for value in kept if not isinstance(value, str | tf.DType)]


def _is_symbolic(value: Any) -> bool:
    return hasattr(value, "_keras_history")


def _with_constants(node: Any) -> Callable[[Any], Any]:
    """The operation as a function of the one tensor of the model that it reads."""

    def function(value: Any) -> Any:
        args, kwargs = tf.nest.map_structure(
            lambda one: value if _is_symbolic(one) else one, (node.call_args, node.call_kwargs)
        )
        return node.layer.function(*args, **kwargs)

    return function


def _leaves_channels(node: Any, rank: int) -> bool:
    """Whether a reduction is over other axes than the batch and the channels."""
    given = node.call_args[1] if len(node.call_args) > 1 else node.call_kwargs.get("axis")
    if given is None or _is_symbolic(given):
        return False
    axes = {int(axis) % rank for axis in np.ravel(given)}
    return not axes & {0, rank - 1}
