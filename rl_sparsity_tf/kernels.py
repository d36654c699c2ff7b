"""Finding the compressible kernels of a model, and the layers that have none and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.grouping import Grouping
from rl_sparsity_tf.registry import KernelSpec, kernel_specs
from rl_sparsity_tf.signature import is_graph
from rl_sparsity_tf.wrapper import CompressionWrapper


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compressible kernel of a model.

    Attributes:
        path: Layer path and attribute, e.g. `"encoder/dense/kernel"`; unique in the model.
        layer: The layer that owns the variable (the inner one if it is wrapped).
        spec: How the kernel is viewed as a matrix.
        wrapper: The wrapper around the layer, if there is one.
    """

    path: str
    layer: keras.layers.Layer
    spec: KernelSpec
    wrapper: CompressionWrapper | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel variable."""
        return tuple(int(size) for size in getattr(self.layer, self.spec.attribute).shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    def value(self) -> np.ndarray:
        """The variable's value (of a wrapped layer: before operations are applied)."""
        return np.asarray(getattr(self.layer, self.spec.attribute))

    def matrix(self) -> np.ndarray:
        """The variable's value viewed as `(inputs, outputs)`."""
        return self.spec.to_matrix_numpy(self.value())

    def grouping(self, group: str) -> Grouping:
        """The kernel's groups."""
        return self.spec.grouping(self.shape, group)


def walk(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields `(path, layer)` of every layer, once, descending into nested models."""
    seen: set[int] = set()

    def visit(parent: keras.Model, parent_path: str) -> Iterator[tuple[str, keras.layers.Layer]]:
        for layer in parent.layers:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = f"{parent_path}{layer.name}"
            if is_graph(layer):
                yield from visit(layer, f"{path}/")
            else:
                yield path, layer

    yield from visit(model, prefix)


def find_kernels(model: keras.Model) -> list[Kernel]:
    """Lists the compressible kernels of a model in the order of its layers.

    Args:
        model: A built Sequential or functional model, plain or wrapped.

    Returns:
        The kernels; layers of classes that are not registered are passed over.
    """
    found = []
    for path, layer in walk(model):
        wrapper = layer if isinstance(layer, CompressionWrapper) else None
        inner = layer.layer if isinstance(layer, CompressionWrapper) else layer
        for spec in kernel_specs(inner):
            if getattr(inner, spec.attribute, None) is not None:
                found.append(Kernel(f"{path}/{spec.attribute}", inner, spec, wrapper))
    return found


def check_model(model: object) -> None:
    """Raises unless a model can be wrapped: a built Sequential or functional tf_keras model.

    Raises:
        ModelError: Saying what was received, what was expected and how to mend it.
    """
    if not isinstance(model, keras.Model):
        module = type(model).__module__ or ""
        hint = ""
        if module.startswith("keras."):
            hint = (
                " This is a Keras 3 object: build or load the model with tf_keras, or set "
                "TF_USE_LEGACY_KERAS=1 before TensorFlow is imported."
            )
        raise ModelError(
            f"Received {type(model).__name__} from module {module!r}. Expected a tf_keras model "
            f"(tf_keras.Sequential or tf_keras.Model).{hint}"
        )
    if not is_graph(model):
        raise ModelError(
            f"Model {model.name!r} is a subclass of tf_keras.Model ({type(model).__name__}), whose "
            "layers cannot be rebuilt. Expected a Sequential or functional model: build it with "
            "tf_keras.Model(inputs, outputs)."
        )
    if not model.built or not model.inputs:
        raise ModelError(
            f"Model {model.name!r} is not built: its input shape is unknown. Call it once on data, "
            "call model.build(input_shape), or begin it with an Input layer."
        )


def count_weights(model: keras.Model) -> tuple[int, int]:
    """Counts `(zeros, elements)` over all weights of rank >= 2, each variable once."""
    zeros = elements = 0
    seen: set[int] = set()
    for variable in model.weights:
        if variable.shape.rank is None or variable.shape.rank < 2 or id(variable) in seen:
            continue
        seen.add(id(variable))
        value = np.asarray(variable)
        zeros += int(value.size - np.count_nonzero(value))
        elements += value.size
    return zeros, elements


def sparsity_of(model: keras.Model) -> float:
    """Share of zeros among all weights of rank >= 2 of a plain model."""
    zeros, elements = count_weights(model)
    return zeros / elements if elements else 0.0
