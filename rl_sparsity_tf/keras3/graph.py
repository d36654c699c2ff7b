"""The walk through a Keras 3 model's graph, which makes the tf_keras model call by call."""

from __future__ import annotations

import inspect
import itertools
import logging
from typing import Any

import keras as keras3
import tensorflow as tf
import tf_keras as keras
from keras.src.models.functional import Functional as Functional3

from rl_sparsity_tf.errors import ModelError, RLSparsityError, one_line
from rl_sparsity_tf.keras3.configs import NoCounterpartError, QuantizedError
from rl_sparsity_tf.keras3.functions import OPERATIONS
from rl_sparsity_tf.keras3.parts import Keras3Part, is_builtin, native, on_tensorflow

_log = logging.getLogger(__name__)

# Keras 3 writes the masks that it found itself into its calls; tf_keras finds its own.
_MASKS = ("mask", "query_mask", "value_mask", "key_mask")
_INLINE = object()


class _NotFollowedError(NoCounterpartError):
    """A call() that does not give a graph of what it does."""


class Conversion:
    """A tf_keras model made of a Keras 3 model.

    Attributes:
        original: The Keras 3 model.
        model: The tf_keras model, without weights yet.
        pairs: Layers of the two: those of a Keras 3 model that became a layer of tf_keras.
        parts: Layers and operations that run as they are, with the layers that run them.
        notes: Why they do, by their names; for people.
    """

    def __init__(self, original: Any):
        self.original = original
        self.pairs: list[tuple[Any, keras.layers.Layer]] = []
        self.parts: list[tuple[Any, Keras3Part]] = []
        self.notes: dict[str, str] = {}
        self._made: dict[int, Any] = {}
        self._names: set[str] = set()
        try:
            self.model: keras.Model = self._model(original)
        except RLSparsityError as error:
            raise ModelError(
                f"The Keras 3 model {original.name!r} cannot be taken: {str(error).rstrip('.')}. "
                "Expected a model whose parts have counterparts in tf_keras or can run beside "
                "them: change the part, or build the model with tf_keras."
            ) from error

    def _model(self, model: Any) -> keras.Model:
        if isinstance(model, keras3.Sequential):
            if not model.built or model._functional is None:
                raise ModelError(
                    f"{model.name!r} is not built: call it once on data, or begin it with an Input "
                    "layer"
                )
            return self._graph(model._functional, model)
        return self._graph(model if isinstance(model, Functional3) else _followed(model), model)

    def _graph(self, graph: Any, model: Any) -> keras.Model:
        outer, self._names = self._names, set()
        inputs = keras3.tree.map_structure(_input, graph._inputs_struct)
        flat = keras3.tree.flatten(inputs)
        outputs = self._walked(graph, flat)
        layers = [self._made.get(id(layer)) for layer in getattr(model, "layers", ())]
        if isinstance(model, keras3.Sequential) and all(
            isinstance(layer, keras.layers.Layer) for layer in layers
        ):
            first = flat[0]._keras_history.layer
            made = keras.Sequential([first, *layers], name=model.name)
        else:
            made = keras.Model(inputs, self._named(graph, outputs), name=model.name)
        self._names = outer
        if not model.trainable:
            made.trainable = False
        return made

    def _named(self, graph: Any, outputs: Any) -> Any:
        """Several outputs under the names that losses, metrics and labels know them by."""
        if len(graph.outputs) == 1:
            return outputs
        names = iter(graph.output_names)

        def named(y: Any) -> Any:
            name = next(names)
            if y._keras_history.layer.name == name or name in self._names:
                return y
            self._names.add(name)
            return keras.layers.Activation("linear", name=name, dtype=y.dtype)(y)

        return keras3.tree.map_structure(named, outputs)

    def _walked(self, graph: Any, inputs: list[Any]) -> Any:
        """The outputs of a Keras 3 graph, called on tensors of tf_keras."""
        known = {id(x): y for x, y in zip(graph.inputs, inputs, strict=True)}
        depths = sorted(graph._nodes_by_depth)
        nodes = [node for depth in depths for node in graph._nodes_by_depth[depth]]
        # What only computes masks is not converted.
        needed = {id(x) for x in graph.outputs}
        for node in nodes:
            if any(id(x) in needed for x in node.outputs):
                kept = {k: v for k, v in node.arguments.kwargs.items() if k not in _MASKS}
                needed |= {id(x) for x in keras3.tree.flatten((node.arguments.args, kept))}
        for node in reversed(nodes):
            if node.is_input or not any(id(x) in needed for x in node.outputs):
                continue
            args, kwargs = node.arguments.fill_in(known)
            outputs = keras3.tree.flatten(self._called(node.operation, args, kwargs))
            known |= {id(x): y for x, y in zip(node.outputs, outputs, strict=True)}
        return keras3.tree.map_structure(lambda x: known[id(x)], graph._outputs_struct)

    def _called(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not isinstance(operation, keras3.layers.Layer):
            return self._operation(operation, args, kwargs)
        layer = self._layer(operation)
        if layer is _INLINE:
            try:
                return self._inlined(operation, args, kwargs)
            except _NotFollowedError as error:
                layer = self._made[id(operation)] = self._part_of(operation, error)
        args, kwargs = _bound(operation, args, kwargs)
        return layer(*args, **kwargs)

    def _layer(self, layer: Any) -> Any:
        if id(layer) not in self._made:
            self._made[id(layer)] = self._new_layer(layer)
        return self._made[id(layer)]

    def _new_layer(self, layer: Any) -> Any:
        if isinstance(layer, keras3.Model):
            return self._model(layer)
        try:
            made = native(layer)
        except QuantizedError:
            raise
        except NoCounterpartError as error:
            if not is_builtin(layer) and _only_calls_layers(layer):
                return _INLINE
            return self._part_of(layer, error)
        made.trainable = layer.trainable
        made._name = self._own_name(made.name)
        self.pairs.append((layer, made))
        return made

    def _part_of(self, layer: Any, error: NoCounterpartError) -> Keras3Part:
        if not on_tensorflow():
            raise NoCounterpartError(
                f"its layer {layer.name!r} could only run as it is ({error}), which needs "
                f"Keras 3 on TensorFlow; KERAS_BACKEND is {keras3.backend.backend()}"
            ) from error
        return self._part(layer, str(error))

    def _part(self, part: Any, reason: str) -> Keras3Part:
        made = Keras3Part(part, reason, name=self._own_name(part.name))
        if isinstance(part, keras3.layers.Layer):
            made.trainable = part.trainable
            self.parts.append((part, made))
        self.notes[part.name] = reason
        _log.info("%r runs as a part of Keras 3, not compressed: %s.", part.name, reason)
        return made

    def _own_name(self, name: str) -> str:
        """The name, numbered if another layer has it: parts of custom layers may."""
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        chosen = next(one for one in itertools.chain([name], numbered) if one not in self._names)
        self._names.add(chosen)
        return chosen

    def _inlined(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls a custom layer's own call() on fresh Keras 3 tensors, and walks what it did."""
        kwargs = {k: v for k, v in kwargs.items() if k not in ("training", *_MASKS)}
        flat = [x for x in keras3.tree.flatten((args, kwargs)) if hasattr(x, "_keras_history")]
        fresh = [
            keras3.Input(batch_shape=tuple(x.shape), dtype=tf.as_dtype(x.dtype).name) for x in flat
        ]
        numbered = iter(fresh)
        args, kwargs = keras3.tree.map_structure(
            lambda x: next(numbered) if hasattr(x, "_keras_history") else x, (args, kwargs)
        )
        kind = type(layer).__name__
        try:
            graph = keras3.Model(fresh, layer.call(*args, **kwargs))
        except Exception as error:
            raise _NotFollowedError(
                f"the call() of {kind} cannot be followed ({one_line(error)})"
            ) from error
        if _in_training(layer, graph, fresh, args, kwargs) is not graph:
            raise _NotFollowedError(f"the call() of {kind} does something else in training")
        return self._walked(graph, flat)

    def _operation(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kind = type(operation).__name__
        reason = f"keras.ops has {kind}, which has no function of TensorFlow here"
        if kind in OPERATIONS and type(operation).__module__.startswith("keras."):
            try:
                result = OPERATIONS[kind](operation, *args, **kwargs)
            except (TypeError, ValueError, AttributeError) as error:
                result, reason = None, f"{kind} of keras.ops: {one_line(error)}"
            if result is not None:
                return result
        if not on_tensorflow():
            raise NoCounterpartError(
                f"its operation {kind} could only run as it is, which needs Keras 3 on TensorFlow; "
                f"KERAS_BACKEND is {keras3.backend.backend()}"
            )
        if id(operation) not in self._made:
            self._made[id(operation)] = self._part(operation, reason)
        return self._made[id(operation)](*args, **kwargs)


def _input(x: Any) -> Any:
    name = x._keras_history.operation.name
    sparse = bool(getattr(x, "sparse", False))
    return keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name, sparse=sparse)


def _only_calls_layers(layer: Any) -> bool:
    """Whether a custom layer has no weights of its own and only calls other layers."""
    own = layer._trainable_variables or layer._non_trainable_variables
    return not own and bool(layer._layers)


def _in_training(layer: Any, graph: Any, inputs: Any, args: Any, kwargs: Any) -> Any:
    """A graph of a call() in training if that has other operations than at inference, or `graph`.

    It is None if there is none.
    """
    if "training" not in inspect.signature(layer.call).parameters:
        return graph

    def kinds(one: Any) -> list[str]:
        return sorted(type(operation).__name__ for operation in one.operations)

    try:
        other = keras3.Model(inputs, layer.call(*args, **kwargs, training=True), name=graph.name)
    except Exception:
        return None
    return graph if kinds(graph) == kinds(other) else other


def _followed(model: Any) -> Any:
    """A functional Keras 3 model of what a subclassed model's call() does, with its layers."""
    config = model.get_build_config() or {}
    shape = config.get("input_shape") or next(
        iter((config.get("shapes_dict") or {}).values()), None
    )
    if shape is None:
        raise ModelError(
            f"the input shape of {type(model).__name__} is unknown: call it once on data"
        )

    def made(one: Any) -> Any:
        return keras3.Input(batch_shape=(None, *one[1:]))

    if isinstance(shape, dict):
        inputs: Any = {key: made(one) for key, one in shape.items()}
    elif isinstance(shape[0], list | tuple):
        inputs = [made(one) for one in shape]
    else:
        inputs = made(shape)
    try:
        graph = keras3.Model(inputs, model.call(inputs), name=model.name)
    except Exception as error:
        raise ModelError(
            f"the call() of {type(model).__name__} cannot be followed ({one_line(error)}); write "
            "it with layers and keras.ops"
        ) from error
    # A Dropout that is called in training only does nothing at inference; what does something there
    # is found when the outputs are compared.
    return _in_training(model, graph, inputs, (inputs,), {}) or graph


def _bound(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The first argument by place and the others by name: tf_keras orders them otherwise.

    The mode in which the graph was made is not passed on: a Dropout that is told training=False
    would never drop anything.
    """
    kept = {k: v for k, v in kwargs.items() if v is not None and k not in ("training", *_MASKS)}
    if len(args) <= 1:
        return args, kept
    parameters = inspect.signature(layer.call).parameters.values()
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    skipped = ("training", *_MASKS)
    pairs = zip(names[1:], args[1:], strict=False)
    named = {name: v for name, v in pairs if v is not None and name not in skipped}
    return args[:1], {**named, **kept}
