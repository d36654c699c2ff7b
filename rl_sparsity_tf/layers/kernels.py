"""Finding the compressible kernels of a model, and the layers that have none and why."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError, one_line
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.operations import constraint_of
from rl_sparsity_tf.layers.registry import built_kernel_specs
from rl_sparsity_tf.layers.structure import all_layers, follow, input_specs, is_graph, obstacle
from rl_sparsity_tf.layers.wrapper import CompressionWrapper, unwrapped


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compressible kernel of a model.

    Attributes:
        path: Layer path and attribute, e.g. `"encoder/dense/kernel"` or `"lstm/cell/kernel"`;
            unique in the model.
        layer: The layer of the model's graph that it belongs to (the inner one if it is wrapped).
    """

    path: str
    layer: keras.layers.Layer
    spec: KernelSpec
    wrapper: CompressionWrapper | None = None

    @property
    def variable(self) -> tf.Variable:
        """What the spec's attribute leads to, looked up at every access."""
        return follow(self.layer, self.spec.attribute)

    @property
    def owner(self) -> keras.layers.Layer:
        """The layer that holds the variable: the layer itself, a cell, a part of it."""
        return follow(self.layer, self.spec.attribute.rpartition("/")[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the variable, not of its matrix."""
        return tuple(int(size) for size in self.variable.shape)

    @functools.cached_property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def value(self) -> np.ndarray:
        """The variable's value (of a wrapped layer: before operations are applied)."""
        return np.asarray(self.variable)

    def matrix(self) -> np.ndarray:
        """The variable's value viewed as `(inputs, outputs)`."""
        return self.spec.to_matrix_numpy(self.value())

    def grouping(self, group: str) -> Grouping:
        """How the kernel's matrix is cut into groups of a kind."""
        return self.spec.grouping(self.shape, group)


def walk(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields `(path, layer)` of every layer, once, descending into nested models.

    Layers inside other layers (cells, wrapped layers, parts of custom layers and of subclassed
    models inside the model) are not listed by themselves; a subclassed model's own are.
    """
    seen: set[int] = set()
    paths: set[str] = set()

    def visit(parent: keras.Model, parent_path: str) -> Iterator[tuple[str, keras.layers.Layer]]:
        for layer in parent.layers:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = f"{parent_path}{unwrapped(layer).name}"
            # Only a graph makes sure that names are unique.
            numbered = (f"{path}_{number}" for number in itertools.count(1))
            path = path if path not in paths else next(n for n in numbered if n not in paths)
            paths.add(path)
            if is_graph(layer):
                yield from visit(layer, f"{path}/")
            else:
                yield path, layer

    yield from visit(model, prefix)


def layer_pairs(
    model: keras.Model, copied: keras.Model
) -> list[tuple[keras.layers.Layer, keras.layers.Layer]]:
    """The layers that [walk][] yields of a model and of a copy of it, side by side.

    Without inputs: a nested model may share those of the model around it, and its copy has its own.
    """
    columns = [
        [layer for _, layer in walk(one) if not isinstance(layer, keras.layers.InputLayer)]
        for one in (model, copied)
    ]
    return list(zip(*columns, strict=True))


def weight_pairs(
    model: keras.Model, copied: keras.Model
) -> Iterator[tuple[tf.Variable, tf.Variable]]:
    """Yields the weights of a model, each with the one that a copy has in its place."""
    for theirs, ours in layer_pairs(model, copied):
        yield from zip(unwrapped(theirs).weights, unwrapped(ours).weights, strict=False)
    if not is_graph(model):
        for name in ("_trainable_weights", "_non_trainable_weights"):
            yield from zip(getattr(model, name), getattr(copied, name), strict=False)


def find_kernels(model: keras.Model) -> list[Kernel]:
    """Lists the compressible kernels of a built model in the order of its layers.

    The model may be wrapped. Each variable is there once; layers of classes that are not known are
    passed over.
    """
    found = []
    seen: set[int] = set()
    for path, layer in walk(model):
        wrapper = layer if isinstance(layer, CompressionWrapper) else None
        inner = unwrapped(layer)
        for spec in built_kernel_specs(inner):
            kernel = Kernel(f"{path}/{spec.label}", inner, spec, wrapper)
            if id(kernel.variable) not in seen:
                seen.add(id(kernel.variable))
                found.append(kernel)
    return found


def check_model(model: object) -> None:
    """Raises `ModelError` unless a model can be taken apart: a built tf_keras model.

    The error says how to make one of what was received, if that can be told.
    """
    if not isinstance(model, keras.Model):
        received = f"{type(model).__name__} from module {type(model).__module__!r}"
        if isinstance(model, type):
            received = f"the class {model.__name__}"
        raise ModelError(
            f"Received {received}. Expected a tf_keras model or one of Keras 3 "
            f"(Sequential or Model).{_way_to_a_model(model)}"
        )
    if not model.built or not input_specs(model):
        raise ModelError(
            f"Model {model.name!r} is not built: its input shape is unknown. Call it once on data, "
            "call model.build(input_shape), or begin it with an Input layer."
        )
    for layer in all_layers(model)[1:]:
        reason = obstacle(layer)
        if reason:
            raise ModelError(f"Model {model.name!r} cannot be compressed as it is: {reason}.")


def _way_to_a_model(received: object) -> str:
    """How to make a model of what was given in its place, if that can be told."""
    if isinstance(received, type):
        return f" Make one of it: {received.__name__}(...)."
    if (type(received).__module__ or "").startswith("keras."):
        return (
            " This is a Keras 3 object, but no model: put it into one, "
            "keras.Sequential([keras.Input(shape), layer])."
        )
    if isinstance(received, str | os.PathLike):
        path = os.fspath(received)
        if str(path).endswith(".tflite"):
            return " A .tflite file cannot be turned back into one: load what it was made from."
        return f" Load it first: rl_sparsity_tf.load_model({path!r})."
    if isinstance(received, keras.layers.Layer):
        return " Put the layer into one: tf_keras.Sequential([Input(shape), layer])."
    return ""


def rank_of(weight: object) -> int:
    """A weight's number of axes; 0 for vocabularies, which are among the weights and have none."""
    shape = getattr(weight, "shape", None)
    return 0 if shape is None else shape.rank or 0


def count_weights(model: keras.Model) -> tuple[int, int]:
    """Counts `(zeros, elements)` over all weights of rank >= 2, each variable once.

    Masks and grids of wrappers are no weights of the model.
    """
    zeros = elements = 0
    seen: set[int] = set()
    layers = [unwrapped(layer) for _, layer in walk(model)]
    own = () if is_graph(model) else model._trainable_weights + model._non_trainable_weights
    for variable in itertools.chain(*(layer.weights for layer in layers), own):
        if rank_of(variable) < 2 or id(variable) in seen:
            continue
        seen.add(id(variable))
        value = np.asarray(variable)
        zeros += int(value.size - np.count_nonzero(value))
        elements += value.size
    return zeros, elements


def sparsity_of(model: keras.Model, dense: keras.Model | None = None) -> float:
    """Share of zeros among all weights of rank >= 2 of a plain model.

    Weights that are gone count as zeros, if `dense`, the model that it was made of, is given.
    """
    zeros, elements = count_weights(model)
    whole = elements if dense is None else count_weights(dense)[1]
    return (zeros + whole - elements) / whole if whole else 0.0


_SEED = 0


def check_constraints(kernels: Iterable[Kernel]) -> None:
    """Raises `ModelError` unless kernels can be pruned and keep their constraints.

    Zeros have to stay zeros under a constraint. Seen by trying it: half of the weights are pruned.
    """
    for kernel in kernels:
        constraint = constraint_of(kernel.variable)
        if constraint is None:
            continue
        live = np.random.default_rng(_SEED).random(kernel.shape) < 0.5
        pruned = np.where(live, kernel.value(), 0.0).astype(np.float32)
        name = getattr(constraint, "__name__", type(constraint).__name__)
        try:
            met = np.asarray(constraint(tf.constant(pruned)))
        except Exception as error:
            raise ModelError(
                f"The constraint {name} of the kernel {kernel.path!r} cannot be computed "
                f"({one_line(error)}). Expected a function of a tensor in the kernel's shape; "
                f"exclude={kernel.path!r} leaves the kernel alone."
            ) from error
        if (met[~live] != 0).any() or not np.isfinite(met).all():
            raise ModelError(
                f"The kernel {kernel.path!r} has the constraint {name}, which makes other numbers "
                "of pruned weights, so that pruning and the constraint cannot hold at once. "
                "Expected a constraint that leaves zeros alone, such as MaxNorm, UnitNorm or "
                f"NonNeg: exclude={kernel.path!r} leaves the kernel alone, or build the layer "
                "without the constraint."
            )
