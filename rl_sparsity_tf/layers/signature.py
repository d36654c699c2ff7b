"""What goes into a model and what comes out, whether it is functional or subclassed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.shape_advice import fits

# Size given to an axis that the model leaves open, such as an image's height.
_OPEN_AXIS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: The input's Keras name, or its key where a model takes a dict.
        shape: Shape of one row; None for an open axis.
        dtype: NumPy type name.
        batch: Rows per call, where the model fixes them.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    batch: int | None = None

    def accepts(self, array: np.ndarray) -> bool:
        """Whether an array is a batch of rows of this input."""
        return array.ndim > 0 and fits(array.shape[1:], self.shape)

    def batch_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of a batch of rows, with a size for the axes that the model leaves open."""
        return (rows, *(_OPEN_AXIS if size is None else size for size in self.shape))


def is_graph(layer: keras.layers.Layer) -> bool:
    """Whether a layer is itself a Sequential or functional model, whose graph is known."""
    return isinstance(layer, keras.Model) and (
        isinstance(layer, keras.Sequential) or bool(getattr(layer, "_is_graph_network", False))
    )


def input_specs(model: keras.Model) -> tuple[InputSpec, ...]:
    """Describes a built model's inputs in Keras's order.

    Args:
        model: A built model. Of a subclassed one, what it was called or built with is remembered;
            its batch size counts as open.

    Returns:
        One entry per input; empty if the model was never called or built.
    """
    if is_graph(model):
        if not model.inputs:
            return ()
        return tuple(
            InputSpec(
                name=name,
                shape=tuple(tensor.shape[1:]),
                dtype=tf.as_dtype(tensor.dtype).name,
                batch=tensor.shape[0],
            )
            for name, tensor in zip(_graph_input_names(model), model.inputs, strict=True)
        )
    structure = _subclassed_structure(model)
    names = list(structure) if isinstance(structure, dict) else None
    # Structures of dicts are flattened in the order of their sorted keys.
    names = sorted(names) if names is not None else None
    flat = tf.nest.flatten(structure) if structure is not None else []
    return tuple(
        InputSpec(
            name=names[index] if names is not None else f"input_{index + 1}",
            shape=tuple(spec.shape[1:]),
            dtype=spec.dtype.name,
        )
        for index, spec in enumerate(flat)
    )


def pack_inputs(model: keras.Model, arrays: Sequence[Any]) -> Any:
    """Arranges one value per input as the model's call takes them."""
    if is_graph(model):
        # Also for graphs made from a dict: they take a flat list in the order of `inputs`.
        return list(arrays) if len(arrays) > 1 else arrays[0]
    return tf.nest.pack_sequence_as(_subclassed_structure(model), list(arrays))


def flat_inputs(model: keras.Model, x: Any) -> list[Any]:
    """Lists a model's inputs, given as an array, a list or tuple, or a dict by name.

    Args:
        model: A built model.
        x: The x of `(x, y)`.

    Returns:
        One array or tensor per entry of [input_specs][]. Other entries of a dict are left out.
    """
    if isinstance(x, dict):
        return [x[spec.name] for spec in input_specs(model)]
    return list(x) if isinstance(x, list | tuple) else [x]


def output_names(model: keras.Model, outputs: Any) -> list[str]:
    """The names of a model's outputs in Keras's order, as a `.tflite` file's signature has them.

    Args:
        model: A built model.
        outputs: What the call of a subclassed model returned: its structure counts, and a None in
            it is left out.

    Returns:
        The keys of a dict, sorted; the output layers' names, numbered as Keras numbers them where
        one layer has several; else `output_1`, `output_2`, ...
    """
    if is_graph(model):
        outputs = getattr(model, "_nested_outputs", model.outputs)
    flat = tf.nest.flatten(outputs)
    names = list(getattr(model, "output_names", None) or ())
    if _is_flat_dict(outputs):
        names = sorted(str(key) for key in outputs)
    if len(names) != len(flat):
        names = [f"output_{number}" for number in range(1, len(flat) + 1)]
    return [name for name, output in zip(names, flat, strict=True) if output is not None]


def _graph_input_names(model: keras.Model) -> list[str]:
    nested: Any = getattr(model, "_nested_inputs", None)
    if _is_flat_dict(nested):
        return sorted(str(key) for key in nested)  # Keras takes a dict by its keys, in this order
    return [tensor.name.split(":")[0] for tensor in model.inputs]


def _is_flat_dict(structure: Any) -> TypeGuard[dict[Any, Any]]:
    return isinstance(structure, dict) and not any(map(tf.nest.is_nested, structure.values()))


def _subclassed_structure(model: keras.Model) -> Any:
    spec = getattr(model, "_saved_model_inputs_spec", None)
    if spec is not None:
        return spec
    shapes = getattr(model, "_build_input_shape", None)
    if shapes is None:
        return None
    if isinstance(shapes, dict):
        return {name: _float_spec(shape) for name, shape in shapes.items()}
    if isinstance(shapes, list) or (shapes and isinstance(shapes[0], tuple | list)):
        return [_float_spec(shape) for shape in shapes]
    return _float_spec(shapes)


def _float_spec(shape: Any) -> tf.TensorSpec:
    return tf.TensorSpec(tuple(shape), keras.backend.floatx())
